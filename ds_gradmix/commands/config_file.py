"""Reading a ds_config from a file, and its gradmix block, with every mistake as a line of text."""

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hjson  # what DeepSpeed reads configurations with

from ds_gradmix.config import KEY, SLOTS, ConfigError, GradmixConfig, for_stage, misspelt_key, parse_block
from ds_gradmix.config_messages import key_text, printable, value_text
from ds_gradmix.engines.compatibility import lookup, refused_settings
from ds_gradmix.engines.optimizer_section import optimizer_of
from ds_gradmix.rules import Rule

# What a file or a number of it may lead to, each with a message for the user.
MISTAKES = (ValueError, ArithmeticError, RecursionError, OSError)
_MAX_BYTES = 16 * 2**20  # of a file; a ds_config has a few thousand


def read_text(path: Path) -> str:
    """The text of a file as it is, line ends included."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ConfigError(f"is larger than {_MAX_BYTES // 2**20} MiB; is it a ds_config?")
        return content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not text: {error}") from error


def parse_text(text: str) -> dict[str, Any]:
    """A ds_config as DeepSpeed reads it, JSON or Hjson; a key that is given twice is a mistake.

    Raises:
        ConfigError: with one line that says why the text is none.
    """
    if not text.strip():
        raise ConfigError("is empty; a ds_config is a JSON object")
    try:
        config = hjson.loads(text.replace("\r\n", "\n"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ConfigError("is nested too deeply") from error
    except OverflowError as error:  # of hjson itself, which DeepSpeed would stop at, too
        raise ConfigError("has a number beyond the largest, 1.8e308") from error
    except ConfigError:
        raise
    except Exception as error:  # HjsonDecodeError, Python's for 4,300 digits, an IndexError of hjson's
        raise ConfigError(f"is not JSON: {printable(str(error))}") from error
    if not isinstance(config, dict):
        raise ConfigError("is not a JSON object; a ds_config is one")
    return config


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
    if twice:
        raise ConfigError(f"duplicate keys: {', '.join(map(key_text, twice))}; give each once")
    return dict(pairs)


def block_of(config: Mapping[str, Any]) -> GradmixConfig:
    """The block of a config in which nothing is refused, neither beside the block nor for the optimizer.

    Raises:
        ConfigError: with a line for every mistake.
    """
    if (folder := os.getcwd()) not in sys.path:
        sys.path.insert(0, folder)  # where a user's own rules are found, as by `python -m ds_gradmix check`
    wrong = misspelt_key(config)
    if KEY not in config:
        hint = f'did you mean "{KEY}" by "{wrong}"?' if wrong else "without it gradients are averaged as ever"
        raise ConfigError(f'has no "{KEY}" block; {hint}')
    if wrong:
        raise ConfigError(f'"{wrong}" beside "{KEY}" would be ignored; is it misspelt? remove one of them')
    block = for_stage(parse_block(config[KEY]), lookup(config, "zero_optimization.stage", 0))
    if refused := list(refused_settings(config, block)):
        raise ConfigError("\n".join(refused))
    optimizer_of(config)
    return block


def resolved(block: GradmixConfig) -> dict[str, Any]:
    """The block as ds_config.json would have it, with every default written out."""
    out = {slot: getattr(block, slot) for slot in SLOTS} | block.model_dump(exclude=set(SLOTS))
    for slot in SLOTS:
        if (rule := out[slot]) is not None:
            out[slot] = {"type": rule.type_name(), "params": rule.model_dump()}
    return out


def described(block: GradmixConfig) -> list[tuple[str, str]]:
    """Every slot and what is in it, and the other settings in one row."""
    rows = [(slot, _rule_text(getattr(block, slot))) for slot in SLOTS]
    settings = [f"{key} {_text(value)}" for key, value in block.model_dump(exclude=set(SLOTS)).items()]
    return [*rows, ("settings", ", ".join(settings))]


def _rule_text(rule: Rule | None) -> str:
    if rule is None:
        return "none"
    params = [f"{key} {_text(value)}" for key, value in rule.model_dump().items() if value is not None]
    return printable(rule.type_name()) + (": " if params else "") + ", ".join(params)


def _text(value: object) -> str:
    """A value without the quotes of a string."""
    return json.dumps(value) if isinstance(value, dict) else value_text(value).strip('"')


def report_mistakes(path: Path, error: Exception) -> int:
    """Print a line for each mistake in a file; the exit status."""
    text = str(error)
    if isinstance(error, ArithmeticError):
        text = f"has a number that is too large: {error}"
    elif isinstance(error, RecursionError):
        text = "is nested too deeply"
    elif isinstance(error, OSError):
        text = f"cannot be read: {error.strerror}"
    for line in text.splitlines():
        print(printable(f"{path}: {line}"), file=sys.stderr)
    return 2
