"""The class that a `type` in the block names: one of our own rules, or `package.module:Class` from elsewhere.

Importing a module runs its code, so a module named by a config is imported only if its source, which is read
before, defines the class as one derived from a base of the slot in `ds_gradmix.rules`: `os:system` never is.
"""

import ast
import importlib
import inspect
import keyword
import os
import sys
import tokenize
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import resolve_name
from types import ModuleType

from ds_gradmix.rules.base import (
    Extrapolation,
    GradientFreeMixing,
    GramianMixing,
    Mixing,
    NormMixing,
    Rule,
    Scaling,
)

_REQUIRED = {Scaling: ("num_statistics", int), Extrapolation: ("needs_gradient", bool)}


class NotARule(Exception):
    """The reason why what a `type` names cannot be used."""


def import_rule(kind: str, base: type[Rule]) -> type[Rule]:
    """The class named `package.module:Class`; `base` is that of the slot.

    Raises:
        NotARule: if it is none of that slot, or cannot be imported.
    """
    module, _, name = kind.partition(":")
    words = [*module.split("."), name]
    if not all(word.isidentifier() and not keyword.iskeyword(word) for word in words):
        raise NotARule('write "package.module:Class"')
    found = _loaded(module, name)
    if found is None:
        if not _derives(f"{module}.{name}", base, set()):
            raise NotARule(
                f"the source of {module} was not found, or has no class {name} derived from {base.__name__} "
                "of ds_gradmix.rules, so it was not imported"
            )
        found = _imported(module, name)
    return check_class(found, base)


def _loaded(module: str, name: str) -> object:
    """What a module that is imported already has by a name, without its own ways to look for more."""
    loaded = sys.modules.get(module)
    return vars(loaded).get(name) if isinstance(loaded, ModuleType) else None


def _imported(module: str, name: str) -> object:
    try:
        return getattr(importlib.import_module(module), name, None)
    except (Exception, SystemExit) as error:
        raise NotARule(f"importing {module} failed: {type(error).__name__}: {error}") from error


def check_class(found: object, base: type[Rule]) -> type[Rule]:
    """The class, if it is one of the rules of a slot and lacks nothing; else NotARule is raised."""
    if not isinstance(found, type) or not issubclass(found, base):
        raise NotARule(f"it is no class derived from {base.__name__} of ds_gradmix.rules")
    if base is Mixing and not issubclass(found, (GradientFreeMixing, NormMixing, GramianMixing)):
        raise NotARule("derive it from GradientFreeMixing, NormMixing or GramianMixing")
    missing = sorted(found.__abstractmethods__) if inspect.isabstract(found) else []
    if issubclass(found, GramianMixing):
        both = ("decide", "decide_with_state")
        missing += ["decide"] * all(getattr(found, name) is getattr(GramianMixing, name) for name in both)
    if issubclass(found, Mixing) and found.observes and not issubclass(found, NormMixing):
        raise NotARule("only a rule derived from NormMixing observes; this one sees Gram matrices as it is")
    if issubclass(found, NormMixing) and found.observes and found.observe is NormMixing.observe:
        missing.append("observe")
    name, kind = _REQUIRED.get(base, ("model_config", dict))
    missing += [name] * (not isinstance(getattr(found, name, None), kind))
    if missing:
        raise NotARule(f"it lacks {', '.join(missing)}")
    return found


def _derives(path: str, base: type[Rule], seen: set[str]) -> bool:
    """Whether `module.name` is a class derived from the base. Modules that are not imported are only read."""
    module, _, name = path.rpartition(".")
    if path in seen or not module:
        return False
    seen.add(path)
    if isinstance(found := _loaded(module, name), type):
        return issubclass(found, base)
    return any(_derives(other, base, seen) for other in _origins(module, name))


def _origins(module: str, name: str) -> list[str]:
    """By a module's source, the full names of what a class is derived from, or of what a name stands for."""
    tree, package = _source(module)
    imported: dict[str, str] = {}
    stars: list[str] = []
    found: list[ast.expr] | None = None
    for node in _statements(tree.body):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                imported[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            imported |= {alias.asname or alias.name: f"{origin}.{alias.name}" for alias in node.names}
            stars += [origin] * (node.names[0].name == "*")
        elif isinstance(node, ast.ClassDef) and node.name == name:
            found = node.bases
        elif isinstance(node, ast.Assign) and [name] in map(_dotted, node.targets):
            found = [node.value]
    if found is None:
        return [imported[name]] if name in imported else [f"{star}.{name}" for star in stars]
    origins = []
    for head, *rest in filter(None, map(_dotted, found)):
        heads = [imported[head]] if head in imported else [f"{place}.{head}" for place in (module, *stars)]
        origins += [".".join([full, *rest]) for full in heads]
    return origins


def _dotted(node: ast.expr) -> list[str]:
    """`["a", "b"]` for the expression `a.b`; empty for what is no such name."""
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return [*before, node.attr] if before else []
    return [node.id] if isinstance(node, ast.Name) else []


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, also those inside of its `if` and `try`."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try)):
            yield from _statements([*node.body, *node.orelse, *getattr(node, "finalbody", [])])
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)


def _source(module: str) -> tuple[ast.Module, str]:
    """A module's syntax tree, empty if there is no source, and the package its imports are relative to."""
    try:
        spec = _spec(module)
        if spec is not None and spec.origin is not None:
            package = module if spec.submodule_search_locations is not None else module.rpartition(".")[0]
            if spec.origin.endswith(".py") and os.path.isfile(spec.origin):
                with tokenize.open(spec.origin) as file:
                    return ast.parse(file.read()), package
            get_source = getattr(spec.loader, "get_source", None)  # of a zip archive, say
            return ast.parse((get_source and get_source(module)) or ""), package
    except (ImportError, OSError, SyntaxError, ValueError, RecursionError):
        pass
    return ast.Module([], []), module


def _spec(module: str) -> ModuleSpec | None:
    """Where a module is found, like `importlib.util.find_spec`, which would import the packages around it."""
    path: Sequence[str] | None = None
    spec = None
    parts = module.split(".")
    for i, part in enumerate(parts):
        name = ".".join(parts[: i + 1])
        finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
        try:
            spec = next(filter(None, (finder.find_spec(name, path) for finder in finders)), None)
        except KeyError:  # a folder without __init__.py, in a package that importlib wants imported
            path = [os.path.join(folder, part) for folder in path or sys.path]
            continue
        path = spec.submodule_search_locations if spec is not None else None
        if path is None:
            return spec if i + 1 == len(parts) else None
    return spec
