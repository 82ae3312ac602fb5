"""The documents, and the parts of them that are generated from the code.

    python -m tests.support.documents       rewrites the generated parts

A generated part stands between `<!-- generated: NAME -->` and `<!-- end of generated -->`. A rule that is
added to the tuples of ds_gradmix.rules is in the tables after that, without another line.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.evidence import summary, troubles
from benchmarks.evidence.studies import STUDIES
from ds_gradmix.config import SLOTS, GradmixConfig
from ds_gradmix.engines.deepspeed_api import TESTED_VERSIONS
from ds_gradmix.optim import Lamb, Lars
from ds_gradmix.rules import GradientFreeMixing, GramianMixing, NormMixing, Rule, Scaling
from ds_gradmix.telemetry.settings import TelemetrySettings
from launch.gradmix_pretrain import comparison
from tests.support import scaling_table, support_matrix

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "docs" / "pictures"
_PART = re.compile(r"(<!-- generated: ([\w ]+) -->\n)(.*?)(<!-- end of generated -->)", flags=re.DOTALL)
_BOUNDS = {"exclusiveMinimum": "> {}", "minimum": "≥ {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}
_TYPES = {"integer": "an integer", "number": "a number", "string": "a string", "null": "`null`"}


class Block(NamedTuple):
    """A fenced block of a document."""

    document: str
    language: str
    text: str


def documents() -> list[Path]:
    """README.md and its neighbours, and all pages of docs/."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def name_of(document: Path) -> str:
    """Its path in the repository."""
    return document.relative_to(ROOT).as_posix()


def blocks(name: str | None = None, language: str | None = None) -> list[Block]:
    """The fenced blocks of a document, or of all of them, in a language, or in any."""
    found = [
        Block(name_of(document), *match)
        for document in documents()
        for match in re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(), re.DOTALL | re.MULTILINE)
    ]
    return [block for block in found if name in (None, block.document) and language in (None, block.language)]


def commands(name: str) -> list[str]:
    """The lines of a document's bash blocks."""
    return "".join(block.text for block in blocks(name, "bash")).splitlines()


def rules_of(slot: str) -> Sequence[type[Rule]]:
    """Our own rules of a slot, in the order of the tuple."""
    return SLOTS[slot].known


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line).replace("\n", " ") + " |\n" for line in lines)


def versions() -> str:
    """The row of supported versions, from pyproject.toml and the table of DeepSpeed's functions."""
    project = (ROOT / "pyproject.toml").read_text()  # Python 3.10 has no parser for it
    (python,) = re.findall(r'^requires-python = "(.*)"$', project, re.MULTILINE)
    wanted = dict(re.findall(r'"(torch|deepspeed)([<>=][^"]*)"', project))
    ran = dict(
        re.findall(r"^(torch|deepspeed)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    )
    head = ["Python", "PyTorch", "DeepSpeed", "tests ran with"]
    tests = f"torch {ran['torch']}, DeepSpeed {', '.join(TESTED_VERSIONS)}"
    return table(head, iter([[f"`{python}`", f"`{wanted['torch']}`", f"`{wanted['deepspeed']}`", tests]]))


_DEFINITIONS = GradmixConfig.model_json_schema()["$defs"]


def allowed(schema: Mapping[str, Any]) -> str:
    """What a JSON schema allows, for a reader."""
    if "anyOf" in schema:
        return " or ".join(map(allowed, schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "$ref" in schema:
        model = _DEFINITIONS[schema["$ref"].rsplit("/", 1)[1]]
        keys = [f'`"{key}":` {allowed(value)}' for key, value in model["properties"].items()]
        return f"an object with {' and '.join(keys)}"
    if schema.get("type") == "boolean":
        return "`true`, `false`"
    bounds = [_BOUNDS[key].format(_number(schema[key])) for key in _BOUNDS if key in schema]
    return ", ".join([_TYPES.get(schema.get("type", ""), "see the rule"), *bounds])


def _number(value: float) -> str:
    exponent = int(value).bit_length() - 1
    return f"2^{exponent}" if value == 2**exponent and exponent > 15 else f"{value:g}"


def config_keys() -> str:
    """Every key of the block: those of the block itself, and under each slot those of its rules."""
    return table(["key", "default", "allowed", "meaning"], _key_rows())


def _key_rows() -> Iterator[Sequence[str]]:
    default = GradmixConfig()
    properties = GradmixConfig.model_json_schema()["properties"]
    for name, schema in properties.items():
        if name == "telemetry":
            yield ["`telemetry`", "`false`", "`true`, `false` or an object", schema["description"]]
            for key, part in TelemetrySettings.model_json_schema()["properties"].items():
                usual = f"`{json.dumps(part['default'])}`"
                yield [f"`telemetry.{key}`", usual, allowed(part), part["description"]]
        elif name not in SLOTS:
            yield [
                f"`{name}`",
                f"`{json.dumps(getattr(default, name))}`",
                allowed(schema),
                schema["description"],
            ]
        if name not in SLOTS:
            continue
        rule = getattr(default, name)
        types = ", ".join(f"`{json.dumps(known.type_name())}`" for known in rules_of(name))
        usual = "none" if rule is None else f"`{json.dumps(rule.type_name())}`"
        yield [f"`{name}.type`", usual, f'{types}, `"package.module:Class"`', schema["description"]]
        for known in rules_of(name):
            for key, param in known.model_json_schema()["properties"].items():
                where = f"`{name}.params.{key}` ({known.type_name()})"
                yield [
                    where,
                    f"`{json.dumps(param['default'])}`" if "default" in param else "must be given",
                    allowed(param),
                    param.get("description", ""),
                ]


def rules() -> str:
    """Every rule of the package: what it does, who described it, and what it needs."""
    return table(["slot", "`type`", "what it does", "described in", "needs"], _rule_rows())


def _rule_rows() -> Iterator[Sequence[str]]:
    for slot in SLOTS:
        for rule in rules_of(slot):
            text = inspect.getdoc(rule) or ""
            first = text.partition("\n\n")[0].rstrip(".")
            yield [slot, f"`{rule.type_name()}`", first, ", ".join(_papers(text)), _needs(rule)]


def _papers(text: str) -> list[str]:
    """Links to the papers that a docstring cites."""
    arxiv = [
        f"[arXiv {number}](https://arxiv.org/abs/{number})"
        for number in re.findall(r"arXiv (\d+\.\d+)", text)
    ]
    forum = re.findall(r"OpenReview ([\w-]+)", text)
    return [*arxiv, *(f"[OpenReview {name}](https://openreview.net/forum?id={name})" for name in forum)]


def _needs(rule: type[Rule]) -> str:
    """What a rule asks of the exchange."""
    if issubclass(rule, GradientFreeMixing):
        return "nothing: DeepSpeed's own reduction"
    if issubclass(rule, NormMixing):
        return "W numbers a bucket" + "; a sketch, after the step" * rule.observes
    if issubclass(rule, GramianMixing):
        return "an exchange, and the Gram matrix"
    if issubclass(rule, Scaling):
        statistics = f"{rule.num_statistics} statistic{'s' * (rule.num_statistics != 1)} a coordinate"
        fewest = f"; {rule.min_workers} workers or more" * (rule.min_workers > 1)
        return f"an exchange, {statistics}{fewest}"
    return (
        "the worker's own gradient of the step before"
        if getattr(rule, "needs_gradient", False)
        else "nothing"
    )


def compared() -> comparison.Results:
    """What `make compare` came to."""
    results: comparison.Results = json.loads((PICTURES / "compare.json").read_text())
    return results


def picture() -> str:
    """What came out, and the conditions, from the results that the picture is drawn from."""
    results = compared()
    words = f"{comparison.fault(results)}. {comparison.findings(results)} {comparison.conditions(results)}"
    head, *rows = comparison.rows(results)
    return f"{textwrap.fill(words, 118, break_on_hyphens=False)}\n\n{table(head, iter(rows))}"


def pictures() -> Mapping[str, str]:
    """The README's picture and badges."""
    return {"compare.svg": comparison.draw(compared()), **badges()}


def badges() -> Mapping[str, str]:
    """One for each of three facts."""
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    texts = {"tests": "on CPU, no GPU yet", "licence": "Apache-2.0", "version": version}
    return {f"{name}.svg": _badge(name, text) for name, text in texts.items()}


def _badge(name: str, text: str) -> str:
    left, right = 7 * len(name) + 12, 7 * len(text) + 12
    words = f'<text x="{left / 2}" y="14">{name}</text><text x="{left + right / 2}" y="14">{text}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20">\n'
        f'<rect width="{left}" height="20" fill="#555"/>'
        f'<rect x="{left}" width="{right}" height="20" fill="#4c72b0"/>\n'
        f'<g fill="#fff" text-anchor="middle" font-family="Verdana,sans-serif" font-size="11">{words}</g>\n'
        "</svg>\n"
    )


def optimizers() -> str:
    """The settings of LAMB and LARS, from their signatures and docstrings."""
    return table(["`type`", "param", "default", "meaning"], _setting_rows())


def _setting_rows() -> Iterator[Sequence[str]]:
    for name, kind in (("Lamb", Lamb), ("LARS", Lars)):
        described = (inspect.getdoc(kind) or "").partition("Args:")[2].partition("Raises:")[0]
        meanings = dict(re.findall(r"^ {4}([\w, ]+): (.*(?:\n {8}.*)*)", described, re.MULTILINE))
        for setting, parameter in inspect.signature(kind).parameters.items():
            if setting == "params":
                continue
            (meaning,) = [text for names, text in meanings.items() if setting in names.split(", ")]
            value = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
            yield [name, f"`{setting}`", f"`{json.dumps(value)}`", re.sub(r"\s+", " ", meaning).rstrip(".")]


PARTS: Mapping[str, Callable[[], str]] = {
    "versions": versions,
    "keys": config_keys,
    "rules": rules,
    "optimizers": optimizers,
    "support matrix": support_matrix.table,
    "scaling": scaling_table.table,
    "picture": picture,
    "troubles": troubles.markdown,
    **{f"evidence {name}": partial(summary.markdown, study) for name, study in STUDIES.items()},
}


def written(text: str) -> str:
    """A document with the generated parts of now."""
    return _PART.sub(lambda part: part[1] + PARTS[part[2]]() + part[4], text)


def main() -> None:
    texts = {document: written(document.read_text()) for document in documents()}
    texts |= {PICTURES / name: text for name, text in pictures().items()}
    for path, text in texts.items():
        if not path.exists() or path.read_text() != text:  # other tests may read what is up to date
            path.write_text(text)


if __name__ == "__main__":
    main()
