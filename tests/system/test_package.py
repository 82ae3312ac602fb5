"""The wheel and the sdist: what is in them, that they agree, and that they work outside of the repository."""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.documents import ROOT, blocks, commands

KEPT_OUT = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
USE = """
import sys
from pathlib import Path
import ds_gradmix
from ds_gradmix.cli import main
from ds_gradmix.testing import check_rule
assert Path(ds_gradmix.__file__).is_relative_to(sys.argv[1]), ds_gradmix.__file__
assert main(["check", "ds_config.json"]) == 0
from my_rules import Clip
check_rule(Clip())
"""


def run(folder: Path, *arguments: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    """As `pip` and `python -m build` do, by the build backend."""
    out.mkdir()
    return out / run(source, "-c", BUILD.format(kind=kind), str(out)).split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpacked, built from a copy of the repository."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "source", ignore=KEPT_OUT, symlinks=True)
    with tarfile.open(build("sdist", folder / "source", folder / "out")) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.glob("ds_gradmix-*")
    return unpacked


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> dict[str, bytes]:
    """Its files, built from the sdist."""
    with zipfile.ZipFile(build("wheel", sdist, sdist.parent / "wheel")) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_sdist_has_what_is_needed_and_said(sdist: Path) -> None:
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        assert (sdist / name).read_bytes() == (ROOT / name).read_bytes()


def test_wheel_has_the_package_alone(wheel: dict[str, bytes]) -> None:
    sources = [path for path in (ROOT / "ds_gradmix").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    in_package = {name for name in wheel if not name.partition("/")[0].endswith(".dist-info")}
    assert in_package == {path.relative_to(ROOT).as_posix() for path in sources}
    assert {"ds_gradmix/py.typed", "ds_gradmix/engines/deepspeed_api.json"} <= in_package


def test_metadata(wheel: dict[str, bytes]) -> None:
    (name,) = [name for name in wheel if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(wheel[name])
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["License-File"] == "LICENSE"
    assert metadata["Author"] == "The ds_gradmix authors"
    assert wheel[name.replace("METADATA", "licenses/LICENSE")] == (ROOT / "LICENSE").read_bytes()
    assert all(metadata[field] for field in ("Summary", "Keywords", "Classifier", "Requires-Python"))
    assert "# ds_gradmix" in metadata.get_payload()
    version = f'__version__ = "{metadata["Version"]}"'
    for file, line in (
        ("ds_gradmix/__init__.py", version),
        ("CITATION.cff", f"version: {metadata['Version']}"),
    ):
        assert line in (ROOT / file).read_text().splitlines()
    assert metadata["Version"] in (ROOT / "CHANGELOG.md").read_text()


def test_installed_it_works_elsewhere(sdist: Path, wheel: dict[str, bytes], tmp_path: Path) -> None:
    """By the command of docs/starting.md, into a folder of its own and without the network."""
    (command,) = [line for line in commands("docs/starting.md") if line.startswith("pip ")]
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    run(sdist.parent / "source", "-m", *command.split(), *offline, "--target", str(site))
    installed = {name: (site / name).read_bytes() for name in wheel if name.startswith("ds_gradmix/")}
    assert installed == {name: wheel[name] for name in installed}, "the sdist builds the same wheel"
    elsewhere.mkdir()
    rules, *_ = (block.text for block in blocks("docs/adding-a-rule.md", "python"))
    (elsewhere / "my_rules.py").write_text(rules)
    block = {"mixing": {"type": "my_rules:Clip"}, "scaling": {"type": "VRGD"}}
    (elsewhere / "ds_config.json").write_text(json.dumps({"gradmix": block}))
    assert "my_rules:Clip: " in run(elsewhere, "-c", USE, str(site), PYTHONPATH=str(site))
    assert (site / "bin" / "ds_gradmix").exists()
