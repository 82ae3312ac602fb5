"""The `gradmix` block of ds_config.json: what it may hold, and what is said about a mistake in it.

    "gradmix": {
      "mixing":  {"type": "GAF",  "params": {"threshold": 0.97}},
      "scaling": {"type": "VRGD", "params": {"gamma": 0.1, "momentum": 0.9}},
      "extrapolation": {"type": "PastGradient", "params": {"lr": 0.05}},
      "scope": "bucket", "seed": 1234, "nonfinite": "propagate", "tile_bytes": 33554432
    }

A slot names a rule by `type` (in any case) and gives its `params`; the rule's own class says what these may
be.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ds_gradmix import rules
from ds_gradmix.rules import Extrapolation, Mixing, Scaling

KEY = "gradmix"


class ConfigError(ValueError):
    """A mistake in the configuration, told so that its reader can mend it: path, value, what is allowed."""


class GradmixConfig(BaseModel):
    """A validated gradmix block; frozen, so one instance may serve every bucket."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    mixing: Mixing = Field(default_factory=rules.Mean, description="who counts")
    scaling: Scaling | None = Field(None, description="how much each coordinate counts; null for off")
    extrapolation: Extrapolation | None = Field(None, description="where each worker looks; null for off")
    scope: Literal["bucket", "parameter", "model"] = Field(
        "bucket", description="what one Gram matrix covers"
    )
    worker: Literal["rank", "node"] | Annotated[int, Field(ge=1)] = Field(
        "rank", description="what is averaged before the rules see it: a rank's, a node's, or n ranks'"
    )
    seed: int = Field(1234, ge=0, lt=2**63, description="keys every random draw, together with the step")
    nonfinite: Literal["propagate", "drop"] = Field("propagate", description="a worker with an Inf or NaN")
    tile_bytes: int = Field(
        32 * 2**20, ge=4096, description="the exchange takes at most 3 of these as extra memory"
    )

    @property
    def exchanges(self) -> bool:
        """Whether workers' gradients meet; if not, they are weighed and summed by DeepSpeed."""
        return self.mixing.needs_gram or self.scaling is not None

    @property
    def decides_for_model(self) -> bool:
        """Whether one decision needs all gradients of the step."""
        return self.mixing.needs_gram and self.scope == "model"

    def describe(self) -> str:
        """One line: the rules with their numbers, and the rest where it is not the default."""
        parts = [f"mixing {self.mixing!r}"]
        parts += [
            f"{slot} {rule!r}" for slot in ("scaling", "extrapolation") if (rule := getattr(self, slot))
        ]
        for name in ("scope", "worker", "seed", "nonfinite"):
            parts.append(f"{name} {getattr(self, name)}")
        return ", ".join(parts)


SLOTS: dict[str, Sequence[type[BaseModel]]] = {
    "mixing": rules.MIXING,
    "scaling": rules.SCALING,
    "extrapolation": rules.EXTRAPOLATION,
}


def parse_block(block: object, path: str = KEY) -> GradmixConfig:
    """Validate a block.

    Args:
        block: what ds_config.json has under `"gradmix"`.
        path: how mistakes name the place of the block.

    Raises:
        ConfigError: for all mistakes at once: unknown keys and rules, wrong types, values out of range.
    """
    if isinstance(block, GradmixConfig):
        return block
    if not isinstance(block, Mapping):
        raise ConfigError(_mistake(path, block, "an object", "see the README for its keys"))
    mistakes: list[str] = []
    values = {str(key): value for key, value in block.items()}
    for slot, known in SLOTS.items():
        if values.get(slot) is not None:
            values[slot] = _parse_slot(f"{path}.{slot}", values[slot], known, mistakes)
    if "mixing" in values and values["mixing"] is None:
        del values["mixing"]  # null is the default, in every slot
    try:
        parsed = GradmixConfig.model_validate(values)
    except ValidationError as error:
        mistakes += _told(error, path, GradmixConfig)
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return parsed


def _parse_slot(
    path: str, slot: object, known: Sequence[type[BaseModel]], mistakes: list[str]
) -> BaseModel | None:
    """The slot's rule, or None with what is wrong appended to `mistakes`."""
    names = {rule.__name__.lower(): rule for rule in known}
    allowed = ", ".join(f'"{rule.__name__}"' for rule in known)
    if not isinstance(slot, Mapping):
        mistakes.append(
            _mistake(path, slot, 'an object {"type": ..., "params": {...}}', f"types are {allowed}")
        )
        return None
    for key in slot:
        if key not in ("type", "params"):
            hint = _nearest(key, ["type", "params"]) or f"a rule's own numbers go into {path}.params"
            mistakes.append(_mistake(f"{path}.{key}", slot[key], '"type" and "params"', hint, unknown=True))
    kind = slot.get("type")
    rule = names.get(kind.lower()) if isinstance(kind, str) else None
    if rule is None:
        hint = _nearest(str(kind), [rule.__name__ for rule in known]) or "name one of these"
        mistakes.append(_mistake(f"{path}.type", kind, allowed, hint, missing="type" not in slot))
        return None
    params = slot.get("params")
    if params is not None and not isinstance(params, Mapping):
        mistakes.append(_mistake(f"{path}.params", params, "an object", "leave it out for the defaults"))
        return None
    try:
        return rule.model_validate(dict(params or {}))
    except ValidationError as error:
        mistakes += _told(error, f"{path}.params", rule)
        return None


def _told(error: ValidationError, path: str, model: type[BaseModel]) -> Iterable[str]:
    """Pydantic's errors in our words, one a key: it has one for each type that a value might have been."""
    for item in {item["loc"][:1]: item for item in error.errors()}.values():
        place = ".".join([path, *(str(part) for part in item["loc"][:1])])
        if item["type"] == "extra_forbidden":
            known = list(model.model_fields)
            hint = _nearest(str(item["loc"][-1]), known) or "remove it"
            yield _mistake(place, item["input"], ", ".join(known) or "no keys", hint, unknown=True)
        elif item["loc"]:
            name = str(item["loc"][0])
            schema = model.model_json_schema()["properties"][name]
            options = schema.get("anyOf", [schema])
            choices = [str(choice) for option in options for choice in option.get("enum", ())]
            near = _nearest(item["input"], choices) if isinstance(item["input"], str) else None
            hint = near or "change it, or remove it for the default"
            yield _mistake(place, item["input"], allowed_values(model, name), hint)
        else:  # a rule of the model as a whole
            yield f"{place}: {item['msg'].removeprefix('Value error, ')}"


def allowed_values(model: type[BaseModel], name: str) -> str:
    """What a field may be, in words, from its JSON schema: `number, >= 0, <= 2 (default 1.0)`."""
    schema = model.model_json_schema()["properties"][name]
    options = schema.get("anyOf", [schema])
    return " or ".join(_option(option) for option in options) + f" (default {_json(schema.get('default'))})"


def _option(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return " or ".join(_json(value) for value in schema["enum"])
    words = [str(schema.get("type", "null"))]
    for key, sign in (
        ("exclusiveMinimum", ">"),
        ("minimum", ">="),
        ("maximum", "<="),
        ("exclusiveMaximum", "<"),
    ):
        if key in schema:
            words.append(
                f"{sign} {schema[key]:g}" if isinstance(schema[key], float) else f"{sign} {schema[key]}"
            )
    return ", ".join(words)


def _mistake(
    path: str, value: object, allowed: str, advice: str, *, unknown: bool = False, missing: bool = False
) -> str:
    what = (
        "is missing"
        if missing
        else f"unknown key (value {_json(value)})"
        if unknown
        else f"is {_json(value)}"
    )
    return f"{path}: {what}; allowed: {allowed}; {advice}"


def _nearest(name: str, known: Iterable[str]) -> str | None:
    by_lower = {key.lower(): key for key in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f'did you mean "{by_lower[found[0]]}"?' if found else None


def _json(value: object) -> str:
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    text = f'"{value}"' if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def misspelt_key(config: Mapping[str, Any]) -> str | None:
    """A top-level key that looks like a misspelt `gradmix`, which DeepSpeed would ignore without a word."""
    for key in config:
        plain = str(key).lower().replace("_", "").replace("-", "")
        if key != KEY and (plain.endswith(KEY) or difflib.SequenceMatcher(None, plain, KEY).ratio() >= 0.75):
            return str(key)
    return None
