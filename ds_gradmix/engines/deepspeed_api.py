"""Everything of DeepSpeed that ds_gradmix replaces, overrides, calls or reads, and the patches put into it.

deepspeed_api.json beside this file names the tested versions, every function with a hash of its source and
the signature relied on, and the attributes of instances. After a change of versions or names in it,

    python -m ds_gradmix.engines.deepspeed_api

writes the hashes and signatures of the installed DeepSpeed into it; `git diff` shows what has changed.
"""

import functools
import hashlib
import importlib.metadata
import inspect
import json
import pydoc
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ds_gradmix.log import logger

_FILE = Path(__file__).with_suffix(".json")
TABLE: dict[str, Any] = json.loads(_FILE.read_text())
TESTED_VERSIONS: tuple[str, ...] = tuple(TABLE["versions"])


class DeepSpeedApiError(RuntimeError):
    """The installed DeepSpeed lacks something that ds_gradmix relies on, or has it in another form."""


def check_functions() -> None:
    """Compare the functions of the installed DeepSpeed with the table.

    Raises a DeepSpeedApiError for functions that are missing or have another signature, and logs one warning
    if the version is untested or the source of any function differs.
    """
    wrong, changed = [], []
    for name, relied in TABLE["functions"].items():
        found = _describe(pydoc.locate(name))
        if found is None:
            changed.append(f"{name} (replaced by other code)")
        elif found.partition(" ")[2] != relied.partition(" ")[2]:
            wrong.append(f"{name} is {found.partition(' ')[2]}, relied on is {relied.partition(' ')[2]}")
        elif found != relied:
            changed.append(name)
    if wrong:
        raise DeepSpeedApiError("\n".join(f"{_versions()}: {line}" for line in wrong) + _INSTALL)
    if changed or _installed() not in TESTED_VERSIONS:
        differs = f"it has other code in {', '.join(changed)}" if changed else "it is untested"
        logger.warning(
            f"ds_gradmix: {_versions()}: {differs}; compare a run with mixing Mean to one without the block "
            "before you trust it"
        )


def check_attributes(instance: Any, kind: str) -> None:
    """Raise a DeepSpeedApiError if an instance lacks attributes that the table lists for its class `kind`."""
    missing = [name for name in TABLE["attributes"].get(kind, ()) if not hasattr(instance, name)]
    if missing:
        raise DeepSpeedApiError(f"{_versions()}: {kind} has no attribute {', '.join(missing)}{_INSTALL}")


def parameters_of(name: str) -> list[str]:
    """The parameters of a function in the table, without `self`."""
    signature = TABLE["functions"][name].partition(" ")[2]
    return [part.partition("=")[0] for part in signature.strip("()").split(", ")][1:]


def patch(owner: type, name: str, make: Callable[[Any], Any]) -> None:
    """Replace a method by `make(method)`, unless ours is in place already, even under someone else's."""
    original = getattr(owner, name)
    if not any(_is_ours(function) for function in _chain(original)):
        wrapper = functools.wraps(original)(make(original))
        wrapper.__gradmix__ = wrapper  # type: ignore[attr-defined]  # wrappers of it may copy the attribute
        setattr(owner, name, wrapper)


def restore(owner: type, name: str) -> None:
    """Take `patch` back; where someone else has wrapped our method it stays there, and a warning says so."""
    current = getattr(owner, name)
    if _is_ours(current):
        setattr(owner, name, current.__wrapped__)
    elif any(_is_ours(function) for function in _chain(current)) or _describe(current) is None:
        code = getattr(current, "__code__", None)  # its name may be copied from ours
        by = f"{code.co_filename}, line {code.co_firstlineno}" if code else repr(current)
        logger.warning(
            f"ds_gradmix: {owner.__name__}.{name} was wrapped after ds_gradmix ({by}), so it is not "
            "restored; until enable() it does what DeepSpeed's does"
        )


def _is_ours(function: Any) -> bool:
    return getattr(function, "__gradmix__", None) is function


def _chain(function: Any) -> Iterator[Any]:
    """A function and what it wraps: by `__wrapped__`, or as the first function in its closure."""
    while function is not None:
        yield function
        inner = getattr(function, "__wrapped__", None)
        if inner is None and "<locals>" in getattr(function, "__qualname__", ""):
            cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
            inner = next((cell for cell in cells if inspect.isfunction(cell)), None)
        function = inner


def _describe(function: Any) -> str | None:
    """Hash of the source and signature without annotations, one space between; None if not DeepSpeed's."""
    if function is None:
        return "- missing"
    import deepspeed

    *_, function = _chain(function)
    code = getattr(function, "__code__", None)
    if code is None or not code.co_filename.startswith(str(Path(deepspeed.__file__).parent)):
        return None
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except OSError:
        source = ""  # counts as changed
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    return f"{digest} {signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)}"


def _installed() -> str:
    return importlib.metadata.version("deepspeed").split("+")[0]


def _versions() -> str:
    return f"DeepSpeed {_installed()} (tested: {', '.join(TESTED_VERSIONS)})"


_INSTALL = f"; install deepspeed=={TESTED_VERSIONS[-1]}"


if __name__ == "__main__":
    TABLE["functions"] = {name: _describe(pydoc.locate(name)) for name in TABLE["functions"]}
    _FILE.write_text(json.dumps(TABLE, indent=1) + "\n")
