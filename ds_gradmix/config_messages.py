"""Messages for mistakes in the block: a line has the JSON path, the value, what is allowed, and advice."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ValidationError

_WIDTH = 80  # of a value or a key in a message
_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "maximum": "<=", "exclusiveMaximum": "<"}


def wrong_value(path: str, value: object, allowed: str, advice: str, missing: bool = False) -> str:
    """The line for a value that is not allowed, or that is missing."""
    return f"{path}: is {'missing' if missing else value_text(value)}; allowed: {allowed}; {advice}"


def unknown_key(path: str, key: object, value: object, known: Sequence[str], advice: str) -> str:
    """The line for a key that is not one of those known, or is not a string."""
    hint = nearest(key, known) or (advice if isinstance(key, str) else "keys must be strings")
    allowed = ", ".join(known) or "no keys"
    return f"{path}.{key_text(key)}: unknown key (value {value_text(value)}); allowed: {allowed}; {hint}"


def validation_mistakes(
    error: ValidationError, path: str, model: type[BaseModel], values: Mapping[str, object]
) -> Iterator[str]:
    """A line for each key with errors, since pydantic has one for each type that a value might have."""
    properties = _properties(model)
    for item in {item["loc"][:1]: item for item in error.errors()}.values():
        if not item["loc"]:  # from a validator of the whole model
            yield f"{path}: {printable(item['msg'].removeprefix('Value error, '))}"
            continue
        name = str(item["loc"][0])
        value, schema = values.get(name), properties.get(name, {})
        options = schema.get("anyOf", [schema])
        allowed = " or ".join(map(_option_text, options)) if schema else printable(item["msg"])
        allowed += f" (default {value_text(schema['default'])})" if "default" in schema else ""
        choices = [str(choice) for option in options for choice in option.get("enum", ())]
        usual = "add it" if item["type"] == "missing" else "change it, or remove it for the default"
        hint = nearest(value, choices) or usual
        if is_oversized(value) and any(option.get("type") in ("integer", "number") for option in options):
            hint = "an integer must fit into 64 bits"
        if item["type"] == "value_error":  # from a validator of this field
            hint = printable(item["msg"].removeprefix("Value error, "))
        yield wrong_value(f"{path}.{name}", value, allowed, hint, item["type"] == "missing")


@lru_cache(maxsize=64)
def _properties(model: type[BaseModel]) -> Mapping[str, Any]:
    """The JSON schema of each field; nothing for a rule with a field that JSON does not know."""
    try:
        return model.model_json_schema()["properties"]  # type: ignore[no-any-return]
    except Exception:
        return {}


def allowed_text(model: type[BaseModel], name: str) -> str:
    """What a field may be."""
    return _option_text(_properties(model)[name])


def is_oversized(value: object) -> bool:
    """Whether this is an integer that int64 cannot hold; Python does not even print one of 5,000 digits."""
    return isinstance(value, int) and abs(value) >= 2**63


def _option_text(schema: Mapping[str, Any]) -> str:
    """What a field may be, from its JSON schema: `number, >= 0, <= 2`."""
    if "enum" in schema:
        return " or ".join(value_text(value) for value in schema["enum"])
    if schema.get("type") == "array" and "items" in schema:
        return f"list of {_option_text(schema['items'])}"
    bounds = [(sign, schema[key]) for key, sign in _BOUNDS.items() if key in schema]
    words = [f"{sign} {bound:g}" if isinstance(bound, float) else f"{sign} {bound}" for sign, bound in bounds]
    return ", ".join([schema.get("type", "null"), *words])


def nearest(name: object, known: Sequence[str]) -> str | None:
    """A question whether the known name nearest to this one was meant, or None if none is near."""
    by_lower = {key.lower(): key for key in known}
    lower = name.lower() if isinstance(name, str) else ""
    found = difflib.get_close_matches(lower, by_lower, n=1, cutoff=0.5)
    return f'did you mean "{by_lower[found[0]]}"?' if found else None


def value_text(value: object) -> str:
    """A value as JSON writes it, or else as Python does, on one line and cut if it is long."""
    try:
        is_json = value is None or isinstance(value, (bool, str))
        text = json.dumps(value, ensure_ascii=False) if is_json else repr(value)
    except Exception:  # an integer of over 4,300 digits, a list nested too deeply, a class whose repr fails
        text = f"<{type(value).__name__} that cannot be printed>"
    return key_text(text)


def key_text(key: object) -> str:
    """A key without quotes, on one line and cut if it is long; one that is not a string like a value."""
    if not isinstance(key, str):
        return value_text(key)
    return printable(key if len(key) <= _WIDTH else key[: _WIDTH - 3] + "...")


def printable(text: str) -> str:
    """The text with escapes for line breaks, lone surrogates and everything else that cannot be printed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
