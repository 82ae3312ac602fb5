"""A block of any keys and values is valid, or ends in a ConfigError of printable lines that have a path."""

from __future__ import annotations

import random
import sys
from types import MappingProxyType
from typing import Any

import pytest
import torch

from ds_gradmix.config import ConfigError, GradmixConfig, misspelt_key, parse_block
from ds_gradmix.exchange.exchange import columns_per_tile
from ds_gradmix.exchange.plan import plan_tiles, share_evenly
from tests.support.outside_rules import MODULE


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


class Verbose:
    def __repr__(self) -> str:
        return "first\nsecond\ud800"


def nested(depth: int) -> list[Any]:
    out: list[Any] = []
    for _ in range(depth):
        out = [out]
    return out


LONG = 10**5000
ODD_KEYS: dict[str, Any] = {"3": 3, "null": None, "true": True, "b'seed'": b"seed", "(1, 'a')": (1, "a")}
ODD_KEYS |= {"nan": float("nan"), "<int that cannot be printed>": LONG, "first\\nsecond\\ud800": Verbose()}
ODD_KEYS |= {"<Unprintable that cannot be printed>": Unprintable()}


@pytest.mark.parametrize("shown", ODD_KEYS)
def test_keys_must_be_strings(shown: str) -> None:
    """In the block, in a slot and in its params; a key 3 is not taken for "3"."""
    key = {ODD_KEYS[shown]: LONG}
    gaf = {"type": "GAF", "params": {}}
    for path, block in {
        "gradmix": key,
        "gradmix.mixing": {"mixing": {**gaf, **key}},
        "gradmix.mixing.params": {"mixing": {**gaf, "params": key}},
    }.items():
        with pytest.raises(ConfigError) as caught:
            parse_block(block)
        text = str(caught.value)
        assert text.startswith(f"{path}.{shown}: unknown key (value <int that cannot be printed>); allowed: ")
        assert text.endswith("; keys must be strings") and len(text.splitlines()) == 1
    assert misspelt_key({"bf16": {}, **key}) is None


# Everything that str.splitlines() splits at, and what a terminal or a file in UTF-8 cannot take.
BREAKS = ("\n", "\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029")
UNPRINTED = (*BREAKS, "\r\n", "\x00", "\x1b[2J", "\u202e", "\ud800", "\udfff")


@pytest.mark.parametrize("odd", UNPRINTED, ids=ascii)
def test_a_mistake_is_one_printable_line(odd: str) -> None:
    text = f"a{odd}b"
    for block, path in [
        (text, "gradmix"),
        ({text: 1}, "gradmix.a"),
        ({"scope": text}, "gradmix.scope"),
        ({"seed": [text, {text: text}]}, "gradmix.seed"),
        ({"mixing": {"type": text}}, "gradmix.mixing.type"),
        ({"mixing": {"type": "GAF", "params": {"merge": text}}}, "gradmix.mixing.params.merge"),
        ({"mixing": {"type": "GAF", "params": {text: text}}}, "gradmix.mixing.params.a"),
    ]:
        with pytest.raises(ConfigError) as caught:
            parse_block(block)
        line = str(caught.value)
        assert line.startswith(path) and line.isprintable() and line.encode("utf-8")


def test_misspelt_keys_are_printable() -> None:
    for odd in ("\n", "\u200b", "\u2028", "\ud800"):
        assert misspelt_key({LONG: 1, None: 2, f"gradmix{odd}": 3}) == f"gradmix{ascii(odd)[1:-1]}"
    assert misspelt_key({b"gradmix": {}}) == "b'gradmix'"


def test_a_long_value_or_key_is_cut() -> None:
    for block in ({"scope": "x" * 5000}, {"seed": [1] * 5000}, {"9" * 5000: 1}):
        with pytest.raises(ConfigError) as caught:
            parse_block(block)
        assert "..." in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("number", [2**63, -(2**63), 10**400, LONG, -LONG], ids=lambda n: f"{n.bit_length()}")
def test_integers_of_more_than_64_bits(number: int) -> None:
    """Also where a key has no upper bound, and where Python's own limit of 4,300 digits is reached."""
    mix = {"type": "GradientMix", "params": {"start_step": number, "end_step": 3}}
    noise = {"type": "Noise", "params": {"std": number}}
    block = {"seed": number, "worker": number, "tile_bytes": number, "mixing": mix, "extrapolation": noise}
    with pytest.raises(ConfigError) as caught:
        parse_block(block)
    lines = str(caught.value).splitlines()
    names = ["mixing.params.start_step", "extrapolation.params.std", "worker", "seed", "tile_bytes"]
    assert [line.split(": ")[0] for line in lines] == [f"gradmix.{name}" for name in names]
    assert all("an integer must fit into 64 bits" in line for line in lines)


def test_the_largest_tile_is_one() -> None:
    """What the exchange and the reducer make of `tile_bytes` stays an int64."""
    block = parse_block({"mixing": {"type": "GAF"}, "tile_bytes": 2**40})
    columns = columns_per_tile(block, 2, 2, 4)
    assert 10**9 < columns < 2**63
    assert len(plan_tiles(share_evenly([(0, 100)], 2, 0), [0, 1], 0, columns)) == 1
    assert len(torch.zeros(100).split(block.tile_bytes // 8)) == 1


VALUES: list[Any] = [None, True, 0, 1, 2, -1, 0.5, 1.0, -0.0, 1e300, 5e-324, float("nan"), float("inf"), LONG]
VALUES += [-LONG, 2**63, 2**66, 4096, 2**40, b"GAF", 1j, {1, 2}, object(), Unprintable(), Verbose(), ..., int]
VALUES += [nested(100_000), [], [LONG], {}, {"type": "GAF"}, {LONG: LONG}, MappingProxyType({"type": "Mean"})]
VALUES += ["", "ſcope", "\N{SNOWMAN}", "9" * 5000, *UNPRINTED, "mixing: x\ngradmix", torch.zeros(3, 3)]
VALUES += ["GAF", "gaf", "vrgd", "PASTGRADIENT", "Noise", "gradientmix", "mean", "AndMask"]
VALUES += ["bucket", "modle", "node", "drop", f"{MODULE}:Trust", f"{MODULE}:NoRule", "ds_gradmix.rules:GAF"]
# Modules that the standard library has and nobody has imported, and what must never be called.
NEVER_IMPORTED = ("antigravity", "turtledemo.clock", "idlelib.idle")
VALUES += [
    "os:system",
    "builtins:exec",
    *(f"{name}:Rule" for name in NEVER_IMPORTED),
    "no.such:Rule",
    ":",
    "a:",
]
KEYS: list[Any] = list(GradmixConfig.model_fields)
NUMBERS: list[Any] = [
    "threshold",
    "merge",
    "alpha",
    "start_step",
    "end_step",
    "gamma",
    "momentum",
    "lr",
    "std",
]


TYPES = ["GAF", "gradientmix", "VRGD", "Noise", "PastGradient", f"{MODULE}:Spread", "os:system"]


def random_object(rng: random.Random, keys: list[Any], depth: int) -> dict[Any, Any]:
    """A block, slot or params, mostly with the right keys, and `depth` more levels below."""
    below = [["type", "params"], NUMBERS, KEYS]
    out: dict[Any, Any] = {}
    for _ in range(rng.randint(0, 3)):
        hashable = [value for value in VALUES if value.__hash__ and not isinstance(value, MappingProxyType)]
        key = rng.choice(keys if rng.random() < 0.8 else [*KEYS, *NUMBERS, *ODD_KEYS.values(), *hashable])
        inner = depth and key not in NUMBERS and key != "type" and rng.random() < 0.6
        out[key] = random_object(rng, below[3 - depth], depth - 1) if inner else rng.choice(VALUES)
    if "params" in keys and rng.random() < 0.7:
        out["type"] = rng.choice(TYPES)
    return out


def check_random_blocks(seed: int, count: int) -> int:
    """How many of so many random blocks are valid, after the check of what is said of each."""
    rng, num_valid = random.Random(seed), 0
    for i in range(count):
        block = rng.choice(VALUES) if i % 50 == 0 else random_object(rng, KEYS, 3)
        try:
            parsed = parse_block(block)
        except ConfigError as error:
            lines = str(error).splitlines()
            assert lines and all(line.startswith("gradmix") and line.isprintable() for line in lines), lines
            assert str(error).encode("utf-8")
        else:
            num_valid += 1
            assert isinstance(parsed, GradmixConfig) and len(parsed.describe().splitlines()) == 1
        if isinstance(block, dict):
            misspelt_key(block)
    return num_valid


def test_random_blocks() -> None:
    assert 300 < check_random_blocks(seed=0, count=10_000) < 8000
    assert not set(NEVER_IMPORTED) & set(sys.modules)
