"""The `gradmix` block of ds_config.json: its keys and defaults, and how it is validated.

    "gradmix": {
      "mixing":  {"type": "GAF",  "params": {"threshold": 0.97}},
      "scaling": {"type": "VRGD", "params": {"gamma": 0.1, "momentum": 0.9}},
      "extrapolation": {"type": "PastGradient", "params": {"lr": 0.05}},
      "scope": "bucket", "gram": {"sketch": 1048576}, "transport": "deepspeed",
      "seed": 1234, "nonfinite": "propagate", "tile_bytes": 33554432
    }

A slot names a rule by `type`, one of ours in any case or `package.module:Class`, and gives its `params`,
which are the fields of the rule's class.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ds_gradmix import config_messages as messages
from ds_gradmix import rules
from ds_gradmix.rules import Extrapolation, Mixing, Rule, Scaling, WrongParam
from ds_gradmix.rules.lookup import NotARule, import_rule
from ds_gradmix.telemetry.settings import TelemetrySettings

KEY = "gradmix"
OBSERVED_SKETCH = 1 << 16  # numbers: cosines with a standard error of 0.004
Model = TypeVar("Model", bound=BaseModel)
Values = Mapping[Any, object]  # of a JSON object, whose keys should be strings


class ConfigError(ValueError):
    """A mistake in the configuration; the message has its JSON path, the value and what is allowed."""


class GramSketch(BaseModel):
    """Gram matrices from sketches of the gradients (ops/sketch.py)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sketch: int = Field(
        ge=8, le=2**28, description="float32 numbers that a worker's gradient is projected to"
    )


class GradmixConfig(BaseModel):
    """A validated gradmix block; frozen, so one instance may serve every bucket."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    mixing: Mixing = Field(default_factory=rules.Mean, description="the rule that gives workers weights")
    scaling: Scaling | None = Field(None, description="the rule that gives every coordinate a factor")
    extrapolation: Extrapolation | None = Field(
        None, description="the rule that moves each worker's weights before it takes its gradient"
    )
    scope: Literal["bucket", "parameter", "model"] = Field(
        "bucket", description="what one Gram matrix covers; all of the model, as published, not with ZeRO-2"
    )
    gram: Literal["exact"] | GramSketch = Field(
        "exact",
        description="Gram matrices from the gradients, or from random projections of them to so many float32 "
        f"(default of what is only observed: {OBSERVED_SKETCH})",
    )
    transport: Literal["deepspeed", "exchange"] = Field(
        "deepspeed",
        description="who sums gradients that are weighted before: DeepSpeed, or an exchange in fewer bytes",
    )
    worker: Literal["rank", "node"] | Annotated[int, Field(ge=1)] = Field(
        "rank", description="so many consecutive ranks are averaged into one worker before any rule"
    )
    seed: int = Field(
        1234, ge=0, lt=2**63, description="keys every random draw, together with the step: the same on resume"
    )
    nonfinite: Literal["propagate", "drop"] = Field(
        "propagate",
        description="a worker with an Inf or NaN: as DeepSpeed does, or left out of the reduction",
    )
    telemetry: TelemetrySettings | None = Field(
        None, description="what is measured of the workers; true is {} with its defaults"
    )
    tile_bytes: int = Field(
        32 * 2**20, ge=4096, le=2**40, description="the exchange takes at most 3 of these as extra memory"
    )

    @property
    def sketch_size(self) -> int | None:
        """The numbers of a sketch, None for exact Gram matrices."""
        return self.gram.sketch if isinstance(self.gram, GramSketch) else None

    @property
    def uses_sketch(self) -> bool:
        """Whether a sketch would be used: where the gradients themselves meet it saves nothing."""
        return self.scaling is None or self.only_observes

    @property
    def only_observes(self) -> bool:
        """Whether a Gram matrix is gathered that no decision waits for."""
        return not self.mixing.needs_gram and (self.mixing.observes or self.telemetry is not None)

    @property
    def decides_for_model(self) -> bool:
        """Whether one decision needs all gradients of the step."""
        return self.mixing.depends_on_gradients and self.scope == "model"

    @property
    def weighs_by_parameter(self) -> bool:
        """Whether every parameter has weights of its own."""
        return self.mixing.by_parameter or (self.mixing.depends_on_gradients and self.scope == "parameter")

    def describe(self) -> str:
        """One line: the rules with their params, and the other settings that change results."""
        parts = [f"{slot} {rule!r}" for slot in SLOTS if (rule := getattr(self, slot)) is not None]
        gram = "exact" if self.sketch_size is None else f"sketch {self.sketch_size}"
        parts += [f"scope {self.scope}", f"gram {gram}"]
        settings = ("transport", "worker", "seed", "nonfinite")
        if self.telemetry is not None:
            parts.append(f"telemetry every {self.telemetry.every}")
        return ", ".join(parts + [f"{name} {getattr(self, name)}" for name in settings])


def for_stage(config: GradmixConfig, stage: object) -> GradmixConfig:
    """The block with the defaults of a ZeRO stage: at stage 3, which keeps nothing whole, a rule decides from
    Gram matrices of sketches unless `gram` is given.
    """
    if stage != 3 or "gram" in config.model_fields_set or not config.uses_sketch:
        return config
    sketch = GramSketch(sketch=OBSERVED_SKETCH)
    return config.model_copy(update={"gram": sketch}) if config.mixing.needs_gram else config


class Slot(NamedTuple):
    """A slot of the block: the base of its rules, and those that need no import."""

    base: type[Rule]
    known: Sequence[type[Rule]]


SLOTS = {
    "mixing": Slot(Mixing, rules.MIXING),
    "scaling": Slot(Scaling, rules.SCALING),
    "extrapolation": Slot(Extrapolation, rules.EXTRAPOLATION),
}


def parse_block(block: object, path: str = KEY) -> GradmixConfig:
    """Validate a block.

    Args:
        block: what ds_config.json has under `"gradmix"`.
        path: the JSON path of the block, with which every line of an error begins.

    Raises:
        ConfigError: for all mistakes at once: unknown keys and rules, wrong types, values out of range.
    """
    if isinstance(block, GradmixConfig):
        return block
    if not isinstance(block, Mapping):
        raise ConfigError(messages.wrong_value(path, block, "an object", "see docs/configuration.md"))
    mistakes: list[str] = []
    values = dict(block)
    for name, slot in SLOTS.items():
        value = values.pop(name, None)  # null is the default, in every slot
        if value is not None and (rule := _parse_slot(f"{path}.{name}", value, slot, mistakes)) is not None:
            values[name] = rule
    if isinstance(gram := values.get("gram", "exact"), Mapping):
        values["gram"] = _validated(f"{path}.gram", GramSketch, gram, mistakes) or "exact"
    elif gram != "exact":
        allowed = f'"exact" or {{"sketch": {messages.allowed_text(GramSketch, "sketch")}}} (default "exact")'
        hint = messages.nearest(gram, ["exact"]) or "change it, or remove it for the default"
        mistakes.append(messages.wrong_value(f"{path}.gram", values.pop("gram"), allowed, hint))
    _parse_telemetry(f"{path}.telemetry", values, mistakes)
    parsed = _validated(path, GradmixConfig, values, mistakes)
    if parsed is not None and parsed.only_observes and "gram" not in values:
        parsed = parsed.model_copy(update={"gram": GramSketch(sketch=OBSERVED_SKETCH)})
    if parsed is not None and parsed.sketch_size is not None and not parsed.uses_sketch:
        assert parsed.scaling is not None
        mistakes.append(
            f'{path}.gram: {{"sketch": {parsed.sketch_size}}} with {path}.scaling '
            f"{parsed.scaling.type_name()}, for which the gradients themselves meet, so that a sketch would "
            'save nothing; allowed is "exact": remove it'
        )
    if parsed is None or mistakes:
        raise ConfigError("\n".join(mistakes))
    return parsed


def _parse_telemetry(path: str, values: dict[Any, Any], mistakes: list[str]) -> None:
    """Put the settings of telemetry, true or an object, in their place; mistakes are appended."""
    given = values.get("telemetry")
    if given is None or given is False:
        values.pop("telemetry", None)
    elif given is True or isinstance(given, Mapping):
        values["telemetry"] = _validated(path, TelemetrySettings, {} if given is True else given, mistakes)
    else:
        allowed = f"true, false or an object with {', '.join(TelemetrySettings.model_fields)} (default false)"
        hint = "true measures with the defaults"
        mistakes.append(messages.wrong_value(path, values.pop("telemetry"), allowed, hint))


def _parse_slot(path: str, value: object, slot: Slot, mistakes: list[str]) -> Rule | None:
    """The slot's rule, or None with what is wrong appended to `mistakes`."""
    if not isinstance(value, Mapping):
        expected = 'an object {"type": ..., "params": {...}}'
        mistakes.append(messages.wrong_value(path, value, expected, f"types are {_types(slot)}"))
        return None
    numbers = f"a rule's own numbers go into {path}.params"
    values = _known(path, value, ["type", "params"], numbers, mistakes)
    rule, params = _rule_class(f"{path}.type", values, slot, mistakes), values.get("params")
    if rule is not None and (params is None or isinstance(params, Mapping)):
        try:
            return _validated(f"{path}.params", rule.params_class(params or {}), params or {}, mistakes)
        except WrongParam as wrong:
            mistakes.append(_wrong_param(f"{path}.params", wrong, params or {}))
            return None
    if rule is not None:
        hint = "remove it for the defaults"
        mistakes.append(messages.wrong_value(f"{path}.params", params, "an object", hint))
    return None


def check_workers(config: GradmixConfig, num_workers: int, path: str = KEY) -> None:
    """Raise ConfigError if a rule's params do not fit the number of workers, as it is now known."""
    wrong = config.mixing.refused(num_workers) if num_workers > 1 else None
    if wrong is not None:
        raise ConfigError(_wrong_param(f"{path}.mixing.params", wrong, config.mixing.model_dump()))


def _wrong_param(path: str, wrong: WrongParam, params: Values) -> str:
    value, is_missing = params.get(wrong.name), wrong.name not in params
    return messages.wrong_value(f"{path}.{wrong.name}", value, wrong.allowed, wrong.advice, is_missing)


def _types(slot: Slot) -> str:
    names = [f'"{rule.__name__}"' for rule in slot.known]
    return ", ".join([*names, 'or a rule of your own as "package.module:Class"'])


def _rule_class(path: str, values: Values, slot: Slot, mistakes: list[str]) -> type[Rule] | None:
    kind = values.get("type")
    lower = kind.lower() if isinstance(kind, str) else None
    rule = next((rule for rule in slot.known if rule.__name__.lower() == lower), None)
    if rule is not None:
        return rule
    names = [rule.__name__ for rule in slot.known]
    hint = messages.nearest(kind, names) or "name one of these"
    if isinstance(kind, str) and ":" in kind:
        try:
            return import_rule(kind, slot.base)
        except NotARule as reason:
            hint = messages.printable(str(reason))
    mistakes.append(messages.wrong_value(path, kind, _types(slot), hint, "type" not in values))
    return None


def _known(path: str, values: Values, known: Sequence[str], advice: str, mistakes: list[str]) -> Values:
    """The entries whose keys are known; for every other a line is appended to `mistakes`."""
    found = {name: values[name] for name in known if name in values}
    unknown = [(key, value) for key, value in values.items() if key not in found]
    mistakes += [messages.unknown_key(path, key, value, known, advice) for key, value in unknown]
    return found


def _validated(path: str, model: type[Model], values: Values, mistakes: list[str]) -> Model | None:
    """The model with these values, or None with what is wrong appended to `mistakes`."""
    known = _known(path, values, list(model.model_fields), "remove it", mistakes)
    oversized = [name for name, value in known.items() if messages.is_oversized(value)]
    try:
        return model.model_validate({**known, **dict.fromkeys(oversized, ...)})  # no field takes `...`
    except ValidationError as error:
        if len(known) == len(values) or error.errors()[0]["loc"]:  # else what is missing may be misspelt
            mistakes += messages.validation_mistakes(error, path, model, known)
    except Exception as error:  # from the validators of a rule that is not ours
        mistakes.append(f"{path}: {messages.printable(f'{type(error).__name__}: {error}')}")
    return None


def misspelt_key(config: Values) -> str | None:
    """A top-level key that looks like a misspelt `gradmix`, which DeepSpeed would ignore without a word."""
    for key in config:
        text = key if isinstance(key, str) else messages.key_text(key)
        plain = text.lower().replace("_", "").replace("-", "")
        if key != KEY and (plain.endswith(KEY) or difflib.SequenceMatcher(None, plain, KEY).ratio() >= 0.75):
            return messages.key_text(key)
    return None
