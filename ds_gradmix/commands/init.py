"""`ds_gradmix init [CONFIG.json]`: writes a gradmix block into a ds_config, and leaves the rest as it is."""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ds_gradmix.commands import layout
from ds_gradmix.commands.config_file import (
    MISTAKES,
    block_of,
    described,
    parse_text,
    read_text,
    report_mistakes,
)
from ds_gradmix.commands.splice import edits
from ds_gradmix.config import KEY, SLOTS, ConfigError, GradmixConfig
from ds_gradmix.config_messages import printable, value_text

HELP = "write a gradmix block into a ds_config"
_DEFAULT = Path("ds_config.json")
# What is written where there is no file yet: it trains on any machine.
_STARTER = """{
  "train_micro_batch_size_per_gpu": 4,
  "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "torch_adam": true}},
  "bf16": {"enabled": true},
  "gradient_clipping": 1.0,
  "zero_optimization": {"stage": 2}
}
"""


class _Result(NamedTuple):
    out: Path
    text: str
    block: GradmixConfig
    lost_layout: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file, a rule for every slot, and where the result goes."""
    add = parser.add_argument
    words = "(default: ds_config.json, which is made if it is not there)"
    add("config", type=Path, nargs="?", metavar="CONFIG.json", help=f"the ds_config {words}")
    for slot, rules in SLOTS.items():
        names = ", ".join(rule.__name__ for rule in rules.known)
        usual = "; GAF, if no rule is named" if slot == "mixing" else ""
        add(f"--{slot}", metavar="RULE", help=f"{names} or package.module:Class{usual}")
    add("-o", "--out", type=Path, metavar="OUT", help="the file to write, if not CONFIG.json itself")
    add("--force", action="store_true", help="replace a block that is there, or a file OUT")
    parser.epilog = "A RULE may have params: GAF:threshold=0.97,order=rank"


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Write the block, and say what was written; the exit status."""
    path = options.config or _DEFAULT
    try:
        result = _result(options, path)
        _write(result.out, result.text)
    except MISTAKES as error:
        return report_mistakes(path, error)
    print("\n".join(_lines(result)))
    return 0


def _result(options: argparse.Namespace, path: Path) -> _Result:
    """What is to be written, and where; nothing is written if there is a mistake in it."""
    is_new = options.config is None and not path.exists()
    text = _STARTER if is_new else read_text(path)
    config = parse_text(text)
    out = options.out or path
    if KEY in config and not options.force:
        raise ConfigError(f'has a "{KEY}" block already; --force replaces it')
    if out.exists() and not options.force and not (path.exists() and out.samefile(path)):
        raise ConfigError(f"{out} is there already; --force replaces it")
    value = _value(options)
    wanted = {**config, KEY: value}
    block = block_of(wanted)
    for edited in edits(text, KEY, value):
        if _is(edited, wanted):
            return _Result(out, edited, block, lost_layout=False)
    if options.out is None:
        raise ConfigError(
            f'is written in a form of Hjson that "{KEY}" cannot be put into without losing comments: '
            "-o OUT writes it as JSON into another file"
        )
    return _Result(out, _plain(wanted), block, lost_layout=True)


def _value(options: argparse.Namespace) -> dict[str, Any]:
    """The block as the options give it."""
    given = {slot: getattr(options, slot) for slot in SLOTS if getattr(options, slot) is not None}
    return {slot: _rule(f"--{slot}", slot, text) for slot, text in (given or {"mixing": "GAF"}).items()}


def _rule(flag: str, slot: str, text: str) -> dict[str, Any]:
    """`GAF:threshold=0.97` as the block has it; a rule of ours by the name that its class has."""
    name, _, params = text.rpartition(":")
    if "=" not in params:
        name, params = text, ""
    known = {rule.__name__.lower(): rule.__name__ for rule in SLOTS[slot].known}
    rule: dict[str, Any] = {"type": known.get(name.lower(), name)}
    values = {}
    for param in params.split(",") if params else ():
        key, equals, value = param.partition("=")
        if not equals or not key:
            raise ConfigError(f"{flag}: is {value_text(text)}; allowed: RULE:key=value,key=value")
        if key in values:
            raise ConfigError(f"{flag}: is {value_text(text)}, with {value_text(key)} twice; give each once")
        values[key] = _json(value)
    return {**rule, "params": values} if values else rule


def _json(text: str) -> Any:
    """A value in JSON, or else a string."""
    try:
        return json.loads(text, parse_constant=str)
    except (ValueError, RecursionError):
        return text


def _is(text: str, wanted: Mapping[str, Any]) -> bool:
    """Whether a text is a config with these keys and values in this order."""
    try:
        return json.dumps(parse_text(text)) == json.dumps(wanted)
    except (ValueError, RecursionError):
        return False


def _plain(config: Mapping[str, Any]) -> str:
    try:
        return json.dumps(config, indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise ConfigError(f"has a number that JSON does not know: {error}") from error


def _write(out: Path, text: str) -> None:
    """All of the file or nothing: it is written beside, and takes the other's place and permissions."""
    target = Path(os.path.realpath(out))  # of a link, what it leads to
    beside = None
    try:
        with tempfile.NamedTemporaryFile("wb", dir=target.parent, delete=False) as file:
            beside = Path(file.name)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, beside)
        else:
            beside.chmod(0o666 & ~_umask())
        os.replace(beside, target)
        beside = None
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}") from error
    finally:
        if beside is not None:
            beside.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _lines(result: _Result) -> Iterator[str]:
    yield f"{printable(str(result.out))}: the {KEY} block was written"
    yield ""
    yield from layout.columns(described(result.block))
    if result.lost_layout:
        yield from layout.wrapped(["", "warning: comments and layout of the Hjson file are not in it"])
    yield ""
    yield from layout.next_command("ds_gradmix", "check", str(result.out))
