"""The layers of docs/architecture.md, read from the imports of every module, and the limits on sizes."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "ds_gradmix"

# A module may import modules of lower layers and of its own package, not others of its layer. Every module of
# ds_gradmix stands here by its own name or by its package's; the empty name is ds_gradmix/__init__.py.
# Rules hand their costs to costs.model, which imports nothing but costs.inputs.
LAYERS = {
    "ops": 0,
    "comm": 0,
    "log": -1,
    "costs.model": -1,
    "costs.inputs": -2,
    "slurm": 0,
    "megatron": 0,
    "config_messages": 0,
    "optim": 1,
    "rules": 1,
    "telemetry": 1,
    "config": 2,
    "combine": 3,
    "exchange": 3,
    "weights": 3,
    "engines": 4,
    "costs": 5,
    "report": 5,
    "": 6,
    "commands": 6,
    "testing": 6,
    "cli": 7,
    "__main__": 8,
}
# __init__ imports deepspeed in the functions that need it, since that takes seconds.
IMPORT_DEEPSPEED = {"engines", "megatron", ""}
IMPORT_TORCH_DISTRIBUTED = {"comm", "engines", "megatron", "__main__"}

# For what version 0.1.0 could do first (5,500); rules from outside (250), optimizers (100), and sketches with
# exchanges by node, their costs and settings (380), params that depend on others, or on the number of workers
# (60), a state over steps in `combine` (50), and what ZeRO-3 needs beside its adapter (160) add to it.
MAX_LINES = 6730
# Modules and packages that came later have their own limits.
MAX_LINES_OF_NEW = {
    ("comm.peers", "engines.deepspeed_api", "engines.engine_request"): 400,
    ("rules.lookup", "rules.scaling.andmask", "exchange.mixing_state", "testing"): 860,
    ("optim", "engines.optimizer_install", "engines.optimizer_layout", "engines.optimizer_section"): 950,
    ("engines.zero3", "engines.gathered_weights"): 510,
    ("ops.gram",): 78,
    ("rules.mixing.adacons", "rules.mixing.adasum", "rules.mixing.geometricmedian"): 230,
    ("rules.mixing.krum", "rules.mixing.multikrum", "rules.mixing.torchjd"): 360,
    ("cli", "commands"): 810,
    ("ops.sketch", "ops.agreement", "ops.kernels", "exchange.sketched"): 500,
    ("rules.mixing.guard", "rules.mixing.normclip", "ops.cosines", "exchange.group_reduction"): 400,
    ("exchange.observer", "exchange.parameter_observer", "exchange.participation", "exchange.watch"): 540,
    ("telemetry", "engines.telemetry", "engines.places", "ops.stopwatch"): 800,
    ("report",): 970,
}
MAX_LINES_OF_FILE = 300
MAX_LINES_OF_FUNCTION = 40
MAX_PARAMETERS = 6
# Settings of optimizers are parameters, as in torch.optim.
SETTINGS = {"optim.lamb.__init__", "optim.lars.__init__"}
# Programs for a GPU have no tuples.
SETTINGS |= {"ops.kernels.sketch._add_blocks", "ops.kernels.agreement._filter"}

Function = ast.FunctionDef | ast.AsyncFunctionDef
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix("."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
SOURCES = {name: path.read_text() for name, path in MODULES.items()}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}


def package_of(module: str) -> str:
    return module if module in LAYERS else module.split(".")[0]


def imports_of(name: str) -> Iterator[str]:
    """The full names of what a module imports, at its top or in a function."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports_of(name: str) -> Iterator[str]:
    """The modules of ds_gradmix that a module imports: of `from ds_gradmix.a import b` a.b, or else a."""
    for full_name in imports_of(name):
        parts = full_name.split(".")
        if parts[0] == "ds_gradmix":
            while parts and ".".join(parts[1:]) not in MODULES:
                parts.pop()
            yield ".".join(parts[1:])


def functions_of(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def test_every_module_has_a_layer() -> None:
    assert {package_of(name) for name in MODULES} <= set(LAYERS)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name: str) -> None:
    package = package_of(name)
    for imported in map(package_of, own_imports_of(name)):
        assert imported == package or LAYERS[imported] < LAYERS[package], f"{name} imports {imported}"


@pytest.mark.parametrize("name", MODULES)
def test_third_parties_stay_in_their_layers(name: str) -> None:
    imported = set(imports_of(name))
    if package_of(name) not in IMPORT_DEEPSPEED:
        assert not {full_name for full_name in imported if package_of(full_name) == "deepspeed"}
    if package_of(name) not in IMPORT_TORCH_DISTRIBUTED:
        used = {ast.unparse(node) for node in ast.walk(TREES[name]) if isinstance(node, ast.Attribute)}
        assert not {full_name for full_name in used | imported if full_name.startswith("torch.distributed")}


def test_cost_model_imports_the_standard_library_only() -> None:
    for name in ("costs.model", "costs.inputs"):
        imported = {package_of(full_name) for full_name in imports_of(name)} - {"ds_gradmix"}
        assert imported <= sys.stdlib_module_names
    assert set(own_imports_of("costs.model")) == {"costs.inputs"} and not list(own_imports_of("costs.inputs"))


def test_sizes() -> None:
    lines = {name: source.count("\n") for name, source in SOURCES.items()}
    too_large = [f"{name}: {num} lines" for name, num in lines.items() if num > MAX_LINES_OF_FILE]
    for name, tree in TREES.items():
        for function in functions_of(tree):
            num_lines = (function.end_lineno or 0) - function.lineno + 1
            if num_lines > MAX_LINES_OF_FUNCTION:
                too_large.append(f"{name}.{function.name}: {num_lines} lines")
            num = num_parameters(function)
            if num > MAX_PARAMETERS and f"{name}.{function.name}" not in SETTINGS:
                too_large.append(f"{name}.{function.name}: {num} parameters")
    rest = dict(lines)
    for modules, limit in MAX_LINES_OF_NEW.items():
        new = sum(rest.pop(name) for name in lines if {name, *packages_of(name)} & set(modules))
        too_large += [f"{', '.join(modules)}: {new} lines"] * (new > limit)
    too_large += [f"all others: {sum(rest.values())} lines"] * (sum(rest.values()) > MAX_LINES)
    assert not too_large, "\n".join(too_large)


def packages_of(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def num_parameters(function: Function) -> int:
    """Without self and cls, *args and **kwargs."""
    names = [arg.arg for arg in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def test_public_names_have_docstrings() -> None:
    """A docstring says more than the name. A method may leave it to the method of ds_gradmix it overrides."""
    classes = {
        node.name: node
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    missing = []
    for module, tree in TREES.items():
        for owner in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
            for node in owner.body:
                if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
                    continue
                if not says_more(node) and not inherits_docstring(owner, node.name, classes):
                    missing.append(f"{module}: {getattr(owner, 'name', '')}.{node.name}")
    assert not missing, "\n".join(missing)


def says_more(node: Function | ast.ClassDef) -> bool:
    words = set(re.findall("[a-z0-9]+", (ast.get_docstring(node) or "").lower()))
    in_name = re.findall("[a-z0-9]+", re.sub("([a-z])([A-Z])", r"\1 \2", node.name).lower())
    return bool(words - set(in_name) - {"a", "an", "the", "of", "s", "is"})


def inherits_docstring(owner: ast.Module | ast.ClassDef, name: str, classes: dict[str, ast.ClassDef]) -> bool:
    if isinstance(owner, ast.Module):
        return False
    bases = [classes[base.id] for base in owner.bases if isinstance(base, ast.Name) and base.id in classes]
    return any(
        any(isinstance(node, Function) and node.name == name and says_more(node) for node in base.body)
        or inherits_docstring(base, name, classes)
        for base in bases
    )
