"""The three kinds of tests: no file of tests imports another, and unit tests start no process."""

from __future__ import annotations

import ast
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.rglob("*.py"))


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_test_is_of_one_kind() -> None:
    folders = {path.parent.name for path in FILES if path.name.startswith("test_")}
    assert folders == {"unit", "distributed", "system"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_imports_another(path: Path) -> None:
    tests = {other.stem for other in FILES if other.stem.startswith("test_")}
    assert not [name for name in imports_of(path) if tests & set(name.split("."))]


STARTS: dict[str, Callable[[], object]] = {
    "subprocess": lambda: subprocess.run([sys.executable, "-c", ""]),
    "os.system": lambda: os.system("true"),
    "fork": lambda: os.fork(),
    "spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "multiprocessing": lambda: multiprocessing.get_context("forkserver").Process(target=print).start(),
}


@pytest.mark.parametrize("way", STARTS)
def test_no_process_is_started_here(way: str) -> None:
    with pytest.raises(PermissionError, match="unit tests start no process"):
        STARTS[way]()
