"""The formulas of docs/scaling.md against a count of every message and the kernel's counters, and its table
against the output of `ds_gradmix check`.
"""

from __future__ import annotations

import importlib
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ds_gradmix.cli import main
from ds_gradmix.costs.model import (
    Cluster,
    all_reduce,
    average_inside_workers,
    exchange_gradients,
    gather_on_every_rank,
    send_to_owners,
)
from tests.support import scaling_table
from tests.support.blocks import noise
from tests.support.documents import commands

ROOT = Path(__file__).parents[2]
Messages = Iterator[tuple[int, int, float]]  # from a rank, to a rank, elements


def ring(ranks: list[int], elements: float) -> Messages:
    """A collective in which each rank sends so many elements to the next."""
    for at, rank in enumerate(ranks):
        if len(ranks) > 1:
            yield rank, ranks[(at + 1) % len(ranks)], elements


def workers_of(d: int, n: int) -> list[list[int]]:
    return [list(range(first, first + n)) for first in range(0, d, n)]


def messages_of(what: str, d: int, n: int) -> Messages:
    """Every message of a bucket with one element."""
    across_workers = list(zip(*workers_of(d, n), strict=True))
    if what == "all_reduce":
        yield from ring(list(range(d)), 2 * (d - 1) / d)
    if what == "exchange_gradients":
        for ranks in workers_of(d, n):
            yield from ((a, b, 1 / n) for a, b in itertools.permutations(ranks, 2))
        for ranks in across_workers:
            yield from ((a, b, 1 / d) for a, b in itertools.permutations(ranks, 2))
    if what == "average_inside_workers":
        for ranks in workers_of(d, n):
            yield from ring(ranks, 2 * (n - 1) / n)
    if what == "send_to_owners":  # buckets of one owner each, each rank owning as many
        yield from ((a, b, 1 / d / d) for a, b in itertools.permutations(range(d), 2))
    if what == "gather_on_every_rank":
        for ranks in across_workers:
            yield from ring(list(ranks), (len(ranks) - 1) / d)
        for ranks in workers_of(d, n):
            yield from ring(ranks, (n - 1) / n)


FORMULAS: dict[str, Any] = {
    "all_reduce": lambda cluster: [all_reduce(1.0, cluster)],
    "exchange_gradients": lambda cluster: exchange_gradients(1.0, cluster),
    "average_inside_workers": lambda cluster: average_inside_workers(1.0, cluster),
    "send_to_owners": lambda cluster: [send_to_owners(1.0, cluster)],
    "gather_on_every_rank": lambda cluster: gather_on_every_rank(1.0, cluster),
}


@pytest.mark.parametrize("what", FORMULAS)
@pytest.mark.parametrize(
    "d, k, n", [(2, 1, 1), (4, 2, 2), (8, 8, 2), (8, 4, 1), (16, 4, 2), (16, 2, 8), (8, 4, 8)]
)
def test_formulas_count_every_message(what: str, d: int, k: int, n: int) -> None:
    collectives = FORMULAS[what](Cluster(d, k, n))
    messages = list(messages_of(what, d, n))
    assert sum(cost.sent for cost in collectives) == pytest.approx(sum(e for *_, e in messages) / d)
    leaving = sum(elements for a, b, elements in messages if a // k != b // k)
    assert sum(cost.leaving for cost in collectives) == pytest.approx(leaving * k / d)


MEASURED = {  # the benchmark's options, and the rules that it measures
    "2 ranks": ("--world 2 --engine ZeRO-3", ["VRGD momentum 0.9", "GAF scope parameter", "GAF by sketch"]),
    "4 ranks on 2 hosts": (
        "--world 4 --ranks-per-host 2 --engine ZeRO-0",
        ["GAF", "GAF, worker node", "GAF by sketch and exchange", "Mean by exchange"],
    ),
    "8 ranks on 4 hosts": ("--world 8 --ranks-per-host 2", ["GAF by sketch and exchange", "GAF, worker 4"]),
}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", MEASURED)
def test_formulas_agree_with_the_kernel_counters(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    missing = importlib.import_module("benchmarks.hosts").why_no_namespaces()
    if missing is not None:
        pytest.skip(f"network namespaces: {missing}")
    options, rules = MEASURED[name]
    argv = [sys.executable, str(ROOT / "benchmarks" / "exchange.py"), *options.split(), "--engine", "ZeRO-2"]
    argv += ["--dtype", "fp32", "--only-bytes", "--json", str(tmp_path / "numbers.json")]
    argv += [word for rule in rules for word in ("--rule", rule)]
    run = subprocess.run(argv, capture_output=True, text=True, timeout=190)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads((tmp_path / "numbers.json").read_text())
    assert {row["rule"] for row in rows} == set(rules)
    for row in rows:
        assert row["stock_sent_bytes"] == pytest.approx(row["stock_gloo_bytes"], rel=0.05), run.stdout
        assert row["sent_bytes"] == pytest.approx(row["gloo_bytes"], rel=0.05), run.stdout
        # What stock's reduce-scatter sends over NCCL.
        if row["engine"] == "ZeRO-3" and "scope" not in row["rule"]:
            assert row["bytes_ratio"] == pytest.approx(1.0, rel=0.05), run.stdout
        if "worker node" in row["rule"] and row["engine"] == "ZeRO-2":
            assert row["bytes_ratio"] <= 0.6, run.stdout


@pytest.mark.parametrize("ranks", [512, 4096])
def test_deciding_by_sketches_costs_little_on_paper(ranks: int) -> None:
    """Where there is one decision; and 512 workers may take one for every bucket."""
    rows = {
        row.rule: row.costs for row in map(partial(scaling_table.row_of, "70B", ranks), scaling_table.BLOCKS)
    }
    seconds = {rule: costs.seconds / rows["stock"].seconds for rule, costs in rows.items()}
    scopes = [", scope model, ZeRO-1"] + [""] * (ranks == 512)
    for scope in scopes:
        assert seconds[f"GAF by sketch{scope}"] <= 1.10
        assert seconds[f"GAF by sketch and exchange{scope}"] <= 0.65
        assert seconds["GAF by sketch"] < seconds["GAF"] / 4


def test_check_names_the_fastest_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, words = tmp_path / "config.json", {}
    for name, block in {"GAF": scaling_table.GAF, "Mean": {}, "VRGD": scaling_table.VRGD}.items():
        config.write_text(json.dumps({**scaling_table.CONFIG, "gradmix": block}))
        options = ["--params", "70e9", "--dp", "512", "--ranks-per-node", "8", "--json"]
        assert main(["check", str(config), *options]) == 0
        (step,) = json.loads(capsys.readouterr().out)["costs"]["steps"]
        lines = [note for note in step["notes"] if "fastest" in note]
        words[name] = lines[0].split("on paper: ")[1] if lines else None
    assert words["VRGD"] is None  # there is no choice
    assert words["Mean"] is not None and words["Mean"].startswith('"transport": "exchange", ')
    assert words["GAF"] is not None
    chosen, seconds, _ = words["GAF"].rsplit(maxsplit=2)
    assert json.loads("{" + chosen.rstrip(",") + "}") == {"gram": {"sketch": 2**20}, "transport": "exchange"}
    row = scaling_table.row_of("70B", 512, "GAF by sketch and exchange")
    assert float(seconds) == pytest.approx(row.costs.seconds, rel=1e-3)


@pytest.mark.parametrize("ranks", scaling_table.RANKS)
def test_check_prints_the_table(ranks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for row in scaling_table.rows():
        if row.ranks != ranks:
            continue
        path = tmp_path / "ds_config.json"
        path.write_text(json.dumps(scaling_table.config_of(row.rule)))
        parameters = str(scaling_table.SIZES[row.size])
        assert (
            main(["check", str(path), "--params", parameters, "--dp", str(ranks), "--ranks-per-node", "8"])
            == 0
        )
        out = capsys.readouterr().out
        lines = {line[:26].strip(): line[26:].split() for line in out.splitlines() if line.startswith("  ")}
        printed = [lines[name][1] for name in LINES]
        assert str(row).strip("| ").split(" | ")[3:] == printed


LINES = ("GB sent per rank", "GB leaving a node", "GB of memory per rank", "seconds, estimated")


def test_the_command_of_the_document_runs() -> None:
    (command,) = commands("docs/scaling.md")
    program, *arguments = command.split()
    run = subprocess.run(
        [Path(sys.executable).parent / program, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    printed = [
        line.split()[-2]
        for line in run.stdout.splitlines()
        if line.startswith(tuple("  " + x for x in LINES))
    ]
    detail = scaling_table.row_of(*scaling_table.IN_DETAIL, "GAF, VRGD")
    assert str(detail).strip("| ").split(" | ")[3:] == printed, "the row of configs/gaf_vrgd_zero2.json"


def test_extrapolation_and_micro_steps(checked: Checked) -> None:
    """2 reductions of 1e9 elements in bf16 on 8 ranks of a node, then one average of the past gradient."""
    rule = {"type": "PastGradient", "params": {"lr": 0.1}}
    block = {**scaling_table.GAF, "extrapolation": rule, "worker": 4}
    lines = checked(block, "--params", "1e9", "--dp", "8", gradient_accumulation_steps=2)
    exchanged = 7 / 8 * 2 * (1 + 1 / 8)  # buckets of half the model go to owners
    assert numbers_of(lines, "GB sent per rank") == pytest.approx(
        [2 * 2 * 7 / 8 * 2, 2 * exchanged + 2 * 3 / 4 * 2], rel=1e-3
    )
    out = words_of(lines)
    assert "with ZeRO-2 in 2 reductions" in out and "two copies of the parameters" in out


Checked = Callable[..., list[str]]


@pytest.fixture
def checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Checked:
    """A function that returns the lines of `ds_gradmix check` for a block, its options and ds_config keys."""

    def check(block: dict[str, Any], *options: str, **config: Any) -> list[str]:
        (tmp_path / "c.json").write_text(json.dumps({"gradmix": block, **scaling_table.CONFIG, **config}))
        assert main(["check", str(tmp_path / "c.json"), *options]) == 0
        return capsys.readouterr().out.splitlines()

    return check


def numbers_of(lines: list[str], name: str) -> list[float]:
    """The numbers of stock and of the block in a line."""
    (line,) = (line for line in lines if name in line)
    return [float(number) for number in line.split()[-3:-1]]


def words_of(lines: list[str]) -> str:
    """In one line, since a long one goes on in the next."""
    return " ".join("\n".join(lines).split())


def test_check_at_any_size(checked: Checked) -> None:
    for options, sizes in {
        ("--dp", "6", "12", "100"): [6, 12, 100],
        ("--dp", "12", "--ranks-per-node", "4"): [12],
        (): [32, 64, 512, 4096],
    }.items():
        lines = checked({**scaling_table.GAF, **({} if options else {"worker": 8})}, *options)
        at = lines.index(next(line for line in lines if line.split()[:1] == ["ranks"]))
        assert [int(line.split()[0]) for line in lines[at + 1 : at + 1 + len(sizes)]] == sizes
    lines = checked({**scaling_table.GAF, "worker": 8}, "--dp", "8")
    assert ["8", "1.000", "1.000"] in [line.split() for line in lines], "one worker is stock"


def test_check_where_buckets_have_no_owner(checked: Checked) -> None:
    """BF16_Optimizer copies all gradients in bf16, and scope model keeps 1.5 tiles for every bucket."""
    config = {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}
    options = ("--params", "7e9", "--dp", "64")
    assert numbers_of(checked(scaling_table.GAF, *options, **config), "GB of memory") == [
        14,
        0.1008,
    ]
    model = {**scaling_table.GAF, "scope": "model"}
    tiles = (3 + 1.5 * 14) * 2**25 + 5 * 8 * 64**2
    assert numbers_of(checked(model, *options, **config), "GB of memory")[1] == pytest.approx(
        tiles / 1e9, rel=1e-3
    )
    zero = {"zero_optimization": {"stage": 0}}
    assert numbers_of(checked(scaling_table.GAF, *options, **zero), "GB of memory") == [1, 1.101]


def test_check_at_stage_3(checked: Checked) -> None:
    """Stock's reduce-scatter sends (D-1)/D B, as much as an exchange does, in every micro-step."""
    options = ("--params", "7e9", "--dp", "64")
    config = {"zero_optimization": {"stage": 3}, "gradient_accumulation_steps": 2}
    once = 63 / 64 * 7e9 * 2 / 1e9
    exact = {**scaling_table.GAF, "gram": "exact"}
    for block in ({}, scaling_table.GAF, exact):
        stock, ours = numbers_of(checked(block, *options, **config), "GB sent")
        assert stock == pytest.approx(2 * once, rel=1e-3)
        assert ours == pytest.approx(stock, rel=2e-3), block
    lines = checked(noise(std=0.1), *options, **config)
    assert "for Noise: a copy of persistent parameters alone" in words_of(lines)
    assert numbers_of(lines, "GB of memory")[1] == numbers_of(lines, "GB of memory")[0]


def test_check_of_wider_communication(checked: Checked) -> None:
    """DeepSpeed converts gradients to a wider communication dtype, and the exchange does not."""
    options = ("--params", "7e9", "--dp", "64")
    narrow = numbers_of(checked(scaling_table.GAF, *options), "GB sent")
    wide = numbers_of(checked(scaling_table.GAF, *options, communication_data_type="fp32"), "GB sent")
    assert wide == [pytest.approx(2 * narrow[0], rel=1e-3), narrow[1]]


def test_advice_for_small_messages(checked: Checked) -> None:
    options = ("--params", "70e9", "--dp", "4096")
    assert "tile_bytes 513 MiB for 64 KiB" in words_of(checked(scaling_table.GAF, *options))
    small = {"stage": 2, "reduce_bucket_size": 50_000_000}
    block = {**scaling_table.GAF, "tile_bytes": 2**30}
    lines = checked(block, *options, zero_optimization=small)
    assert f"reduce_bucket_size {2**15 * 4096} for 64 KiB" in words_of(lines)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"worker": 3}, "4 data-parallel ranks are no whole number of workers of 3"),
        ({"worker": 2, "ranks": 6, "k": 4}, "allowed are whole nodes"),
    ],
)
def test_check_refuses_workers_that_do_not_fit(
    given: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"zero_optimization": {"stage": 2}, "gradmix": {"worker": given["worker"]}}
    (tmp_path / "c.json").write_text(json.dumps(config))
    options = [
        "--params",
        "1e9",
        "--dp",
        str(given.get("ranks", 4)),
        "--ranks-per-node",
        str(given.get("k", 8)),
    ]
    assert main(["check", str(tmp_path / "c.json"), *options]) == 2
    assert words in capsys.readouterr().err
