"""`"type": "package.module:Class"`: which classes are taken, and which modules are never imported."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ds_gradmix import combine
from ds_gradmix.config import ConfigError, GradmixConfig, parse_block
from ds_gradmix.rules import GAF, Mean
from tests.support import outside_rules
from tests.support.gradients import gaussian
from tests.support.outside_rules import MODULE, Spread, Trust

RULE = """
from ds_gradmix.rules import Extrapolation, GradientFreeMixing, Mean, Scaling
import numpy as np
imported = True

class First(GradientFreeMixing):
    share: float = 1.0
    def weights(self, key, num_workers, num_parameters):
        return np.eye(num_workers)[:1]
"""
SIDE_EFFECT = "import pathlib\npathlib.Path(__file__).with_suffix('.ran').touch()\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path for modules, which are forgotten after the test."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def mixing(kind: object, **params: Any) -> GradmixConfig:
    return parse_block({"mixing": {"type": kind, "params": params}})


def message(block: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_block(block)
    return str(caught.value)


def test_every_slot_takes_rules_from_outside() -> None:
    block = {
        "mixing": {"type": f"{MODULE}:Trust", "params": {"decay": 0.25}},
        "scaling": {"type": f"{MODULE}:Spread"},
        "extrapolation": {"type": f"{MODULE}:Backwards"},
    }
    config = parse_block(block)
    assert config.mixing == Trust(decay=0.25) and config.scaling == Spread()
    assert config.extrapolation == outside_rules.Backwards()
    assert f"{MODULE}:Trust(decay=0.25, skip_below=-2.0)" in config.describe()
    combined, info = combine(gaussian(4), {**block, "extrapolation": None})
    assert combined.isfinite().all() and info["weights"].std() > 0


def test_params_are_validated_like_those_of_our_own_rules() -> None:
    text = message({"mixing": {"type": f"{MODULE}:Trust", "params": {"decai": 1, "skip_below": "no"}}})
    assert text.splitlines() == [
        "gradmix.mixing.params.decai: unknown key (value 1); allowed: decay, skip_below; "
        'did you mean "decay"?',
        'gradmix.mixing.params.skip_below: is "no"; allowed: number (default -2.0); '
        "change it, or remove it for the default",
    ]


def test_our_own_rules_by_their_full_name() -> None:
    assert mixing("ds_gradmix.rules:GAF", threshold=0.5).mixing == GAF(threshold=0.5)
    assert mixing("ds_gradmix.rules.mixing.mean:Mean").mixing == Mean()


def test_a_module_that_is_imported_for_the_rule(folder: Path) -> None:
    write(folder, {"my_rules.py": RULE})
    rule = mixing("my_rules:First", share=0.5).mixing
    assert type(rule).type_name() == "my_rules:First" and rule.model_dump() == {"share": 0.5}
    assert sys.modules["my_rules"].imported


WAYS = {  # in which a class can be seen to be a rule without importing the module
    "in a package": ("pack.sub.rules:First", {"pack/__init__.py": "", "pack/sub/rules.py": RULE}),
    "exported by the package": (
        "pack:First",
        {"pack/__init__.py": "from .rules import First", "pack/rules.py": RULE},
    ),
    "under another name": (
        "pack:Renamed",
        {"pack/__init__.py": "from pack.rules import First as Renamed", "pack/rules.py": RULE},
    ),
    "by a star": ("pack:First", {"pack/__init__.py": "from .rules import *", "pack/rules.py": RULE}),
    "by an assignment": ("rules_by:Other", {"rules_by.py": f"{RULE}\nOther = First\n"}),
    "derived from one of ours": (
        "derived:Own",
        {"derived.py": "import ds_gradmix.rules as r\nclass Own(r.GAF):\n    threshold: float = 0.3\n"},
    ),
    "derived from a derived one": (
        "derived:Own",
        {"base_rules.py": RULE, "derived.py": "import base_rules\nclass Own(base_rules.First): pass\n"},
    ),
    "in an if": ("derived:First", {"derived.py": f"if True:{textwrap.indent(RULE, '    ')}"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_name_a_rule(folder: Path, way: str) -> None:
    kind, files = WAYS[way]
    write(folder, files)
    assert mixing(kind).mixing.needs_gram in (True, False)


NOT_IMPORTED = {
    "not a rule": ("class First:\n    pass\n", "First"),
    "a function": ("def First():\n    pass\n", "First"),
    "another slot's": ("from ds_gradmix.rules import Scaling\nclass First(Scaling): pass\n", "First"),
    "the class of another name": (RULE, "Second"),
    "a base of the same name": ("class GramianMixing: pass\nclass First(GramianMixing): pass\n", "First"),
    "made at run time": ("from ds_gradmix.rules import Mean\nFirst = type('First', (Mean,), {})\n", "First"),
    "no Python": ("this is ] no Python\n", "First"),
    "itself": ("class First(First): pass\n", "First"),
    "a circle": ("class First(Other): pass\nclass Other(First): pass\n", "First"),
}


@pytest.mark.parametrize("what", NOT_IMPORTED)
def test_other_modules_are_not_imported(folder: Path, what: str) -> None:
    source, name = NOT_IMPORTED[what]
    write(folder, {"unknown.py": SIDE_EFFECT + source})
    text = message({"mixing": {"type": f"unknown:{name}"}})
    assert text.startswith("gradmix.mixing.type: ") and "it was not imported" in text
    assert "unknown" not in sys.modules and not (folder / "unknown.ran").exists()


def test_the_package_around_is_not_imported_either(folder: Path) -> None:
    write(folder, {"around/__init__.py": SIDE_EFFECT, "around/inner.py": "class First: pass"})
    assert "it was not imported" in message({"mixing": {"type": "around.inner:First"}})
    assert "around" not in sys.modules and not (folder / "around" / "__init__.ran").exists()


@pytest.mark.parametrize(
    "kind",
    [
        "os:system",
        "subprocess:Popen",
        "antigravity:Mixing",
        "builtins:eval",
        "no_such_module:Rule",
        "no_such.module:Rule",
        "os.path.posixpath:join",
        "ds_gradmix.rules:GramianMixing",
        "ds_gradmix.rules:VRGD",
        "ds_gradmix.rules:AndMask",
        "ds_gradmix.rules:nothing",
        f"{MODULE}:NoRule",
        f"{MODULE}:a_function",
        f"{MODULE}:Unfinished",
        f"{MODULE}:Spread",
        f"{MODULE}:Trust.decide",
        f"{MODULE}:",
        f"{MODULE}: Trust",
        ":Trust",
        ":",
        "a:b:c",
        "..os:system",
        ".rules:GAF",
        "import:class",
        "x" * 5000 + ":" + "y" * 5000,
        "ſ.é:Ñ",
        "os\n:system",
    ],
    ids=lambda kind: ascii(kind[:40]),
)
def test_what_is_no_rule_of_the_slot_is_refused(kind: str) -> None:
    before = set(sys.modules)
    line = message({"mixing": {"type": kind}})
    assert line.startswith("gradmix.mixing.type: is ") and len(line.splitlines()) == 1
    assert (
        'allowed: "AdaCons", "Adasum", "GAF", ' in line
        and ', or a rule of your own as "package.module:Class"' in line
    )
    assert set(sys.modules) == before


def test_what_is_in_the_way_of_an_import(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy:
        def __getattr__(self, name: str) -> object:
            raise AssertionError("never asked")

    for odd in (None, Lazy()):
        monkeypatch.setitem(sys.modules, "odd_module", odd)
        assert "it was not imported" in message({"mixing": {"type": "odd_module:First"}})


def test_a_rule_of_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "Trust", Trust, raising=False)
    assert mixing("__main__:Trust").mixing == Trust()


@pytest.mark.parametrize(
    "fails, told",
    [
        ("raise RuntimeError('no GPU\\nhere')", "RuntimeError: no GPU\\nhere"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
    ],
)
def test_an_import_that_fails_is_a_mistake_of_the_block(folder: Path, fails: str, told: str) -> None:
    write(folder, {"fails.py": f"{RULE}\n{fails}\n"})
    line = message({"mixing": {"type": "fails:First"}})
    assert line.startswith("gradmix.mixing.type: is ") and f"importing fails failed: {told}" in line
    assert len(line.splitlines()) == 1


def test_a_validator_of_the_users_that_fails(folder: Path) -> None:
    write(
        folder,
        {"odd.py": RULE + "    def model_post_init(self, context):\n        raise KeyError('one\\ntwo')\n"},
    )
    line = message({"mixing": {"type": "odd:First"}})
    assert line.startswith("gradmix.mixing.params: KeyError") and len(line.splitlines()) == 1
