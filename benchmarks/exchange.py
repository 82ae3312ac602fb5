"""Costs of the gradient exchange against stock DeepSpeed, measured in one run: bytes, step time, memory.

    python benchmarks/exchange.py [--quick] [--world 4] [--engine ZeRO-2] [--dtype fp32] [--json FILE]

Each rank runs on a host of its own, a network namespace with one interface (`hosts.py`; needs root and `ip`);
without, on the loopback interface, whose counter sums over ranks. `cases.py` has the cases, the rules, the
theory and the bounds; `exchange_worker.py` says how a rank measures. Exits with 1 if a rule breaks its bound,
after the table.

The table, per rule: bytes sent per rank and reduction, over stock's; the median over pairs of step times,
over stock's (a model with next to nothing to compute: the worst case); peak memory in the backward, over
stock's; and what a bucket's reduction itself allocates at its peak, in MiB and in tiles.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cases import ENGINES, EVERY_RANK, MODEL_SCOPE, QUICK_RULES, RULES, WITHOUT_OWNERS, Case
from hosts import loopback, network, run_ranks, why_no_namespaces

MIB = 1 << 20


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few rules in fp32, about a minute")
    parser.add_argument("--world", type=int, choices=(2, 4, 8), default=4)
    parser.add_argument("--engine", action="append", choices=list(ENGINES), help="default: all but ZeRO-1")
    parser.add_argument("--dtype", action="append", choices=("fp32", "bf16"), help="default: both")
    parser.add_argument("--rule", action="append", choices=list(RULES), help="default: all of them")
    parser.add_argument("--tile-mib", type=float, default=1.0, help="tile_bytes when measuring memory")
    parser.add_argument("--rounds", type=int, help="pairs of steps to time per rule")
    parser.add_argument("--loopback", action="store_true", help="no namespaces, even where they can be made")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds until the ranks are killed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the numbers")
    return parser.parse_args(arguments)


def make_cases(options: argparse.Namespace) -> list[Case]:
    """Every way of ownership that an engine has, in each dtype; model scope by ZeRO-1 for ZeRO-2."""
    dtypes = options.dtype or (["fp32"] if options.quick else ["fp32", "bf16"])
    default = QUICK_RULES if options.quick else [name for name in ENGINES if name != "ZeRO-1"]
    tile_bytes = int(options.tile_mib * MIB)
    cases = []
    for engine in options.engine or default:
        rules = tuple(options.rule or (QUICK_RULES.get(engine, ("GAF",)) if options.quick else RULES))
        if engine in WITHOUT_OWNERS:
            for dtype in [dtype for dtype in WITHOUT_OWNERS[engine] if dtype in dtypes]:
                cases.append(Case(EVERY_RANK, dtype, engine, options.world, tile_bytes, rules))
            continue
        for dtype, owners in itertools.product(dtypes, ("even", "one owner")):
            engines = {engine: rules}
            if engine == "ZeRO-2" and MODEL_SCOPE in rules:
                engines = {engine: tuple(rule for rule in rules if rule != MODEL_SCOPE)}
                engines |= {"ZeRO-1": (MODEL_SCOPE,)} if dtype == "fp32" else {}
            for name, names in engines.items():
                cases.append(Case(owners, dtype, name, options.world, tile_bytes, names))
    return [case for case in cases if case.rules]


def run(cases: list[Case], options: argparse.Namespace) -> list[list[dict[str, Any]]]:
    """Every rank's measurements of every case: [rank][case][rule]."""
    rounds = options.rounds or (2 if options.quick else 6)
    plan = {"cases": [asdict(case) for case in cases], "rounds": rounds, "repeats": 2}
    missing = "--loopback was given" if options.loopback else why_no_namespaces()
    if missing is not None:
        print(
            f"No network namespaces ({missing}): counting on the loopback interface, for all ranks together."
        )
    hosts = network(options.world) if missing is None else nullcontext(loopback(options.world))
    with tempfile.TemporaryDirectory() as name, hosts as ranks:
        folder = Path(name)
        (folder / "plan.json").write_text(json.dumps(plan))
        worker = Path(__file__).with_name("exchange_worker.py")
        argv = [sys.executable, str(worker), str(folder / "plan.json"), name]
        run_ranks(ranks, argv, folder, options.timeout)
        measured = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(options.world)]
    if missing is not None:
        _share_counter(measured)
    return measured


def _share_counter(measured: list[list[dict[str, Any]]]) -> None:
    """Every rank read the sum over ranks: a rank's own part is that by W."""
    for rank in measured:
        for case in rank:
            for row in case.values():
                row["sent_bytes"] = [num_bytes / len(measured) for num_bytes in row["sent_bytes"]]


def summarise(case: Case, ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per rule from the ranks' measurements of one case."""

    def sent(rule: str) -> float:
        return statistics.mean(statistics.median(rank[rule]["sent_bytes"]) for rank in ranks)

    def most(rule: str, key: str) -> float:
        return max(statistics.median(rank[rule][key]) for rank in ranks)

    def peak(rule: str) -> float:
        return statistics.median(value for rank in ranks for value in rank[rule]["backward_bytes"])

    rows = []
    for rule in case.rules:
        pairs = [pair for rank in ranks for pair in rank[rule]["seconds"]]
        rows.append(
            asdict(case)
            | {
                "rule": rule,
                "sent_bytes": sent(rule),
                "stock_sent_bytes": sent("reference"),
                "stock_theory_bytes": case.stock_bytes(),
                "bytes_ratio": sent(rule) / sent("reference"),
                "bytes_ratio_theory": case.theory(rule),
                "bytes_ratio_bound": case.bytes_bound(rule),
                "time_ratio": statistics.median(seconds / stock for stock, seconds in pairs),
                "stock_step_s": statistics.median(stock for stock, _ in pairs),
                "peak_ratio": peak(rule) / peak("reference"),
                "reduction_bytes": most(rule, "reduction_bytes"),
                "stock_reduction_bytes": most("reference", "reduction_bytes"),
                "reduction_bound_bytes": case.memory_bound(rule, most("reference", "reduction_bytes")),
            }
        )
    return rows


def print_table(case: Case, rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    overhead = first["stock_sent_bytes"] / first["stock_theory_bytes"] - 1
    print(
        f"\n{case.owners}, {case.dtype}, {case.engine}, {case.world} ranks:"
        f" model {case.model_bytes / MIB:.0f} MiB, buckets {case.bucket_bytes / MIB:.0f} MiB,"
        f" tiles {case.tile_bytes / MIB:g} MiB\n"
        f"stock sends {first['stock_sent_bytes'] / MIB:.1f} MiB per rank"
        f" (theory {first['stock_theory_bytes'] / MIB:.1f}, {overhead:+.1%} for the protocols),"
        f" allocates {first['stock_reduction_bytes'] / MIB:.1f} MiB in a reduction,"
        f" {first['stock_step_s'] * 1e3:.0f} ms a step"
    )
    print(
        f"{'rule':<20}{'bytes':>7}{'theory':>8}{'bound':>7}{'time':>7}{'peak':>7}{'own MiB':>9}{'tiles':>7}"
    )
    for row in rows:
        tiles = row["reduction_bytes"] / case.tile_bytes
        print(
            f"{row['rule']:<20}{row['bytes_ratio']:>7.3f}{row['bytes_ratio_theory']:>8.3f}"
            f"{row['bytes_ratio_bound']:>7.2f}{row['time_ratio']:>7.2f}{row['peak_ratio']:>7.2f}"
            f"{row['reduction_bytes'] / MIB:>9.2f}{tiles:>7.2f}{'  ' + broken(row) if broken(row) else ''}"
        )


def broken(row: dict[str, Any]) -> str:
    """Which bounds a row breaks, empty if none."""
    what = []
    if row["bytes_ratio"] > row["bytes_ratio_bound"]:
        what.append("BYTES")
    if row["reduction_bytes"] > row["reduction_bound_bytes"]:
        what.append(f"MEMORY > {row['reduction_bound_bytes'] / MIB:.1f} MiB")
    return ", ".join(what)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    # A terminated run must still take its namespaces and ranks with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    start, cases = time.monotonic(), make_cases(options)
    measured = run(cases, options)
    rows = []
    for index, case in enumerate(cases):
        table = summarise(case, [rank[index] for rank in measured])
        print_table(case, table)
        rows += table
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    failures = sum(bool(broken(row)) for row in rows)
    print(f"\n{failures or 'No'} bound(s) broken; {time.monotonic() - start:.0f} s.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
