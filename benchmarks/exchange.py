"""Measures the gradient exchange against stock DeepSpeed in one run: bytes, step time and memory.

    python benchmarks/exchange.py [--quick] [--world 4] [--engine ZeRO-2] [--dtype fp32] [--json FILE]
    python benchmarks/exchange.py --ranks-per-host 2 [--only-bytes] [--rate 500mbit]

A host is a network namespace with one interface (`hosts.py`; it needs root and `ip`), by default one for each
rank. Without namespaces all ranks share the loopback interface, whose counter sums over them. `cases.py` has
the cases, rules, expected bytes and bounds; `exchange_worker.py` describes the measurements of a rank. The
exit status is 1 if a rule exceeds a bound.

The table has for each rule the bytes sent per host and reduction, the median step time over pairs of steps
and the peak memory in the backward, all three relative to stock (the model has next to nothing to compute,
which is the worst case); and the peak of what a bucket's reduction allocates, in MiB and in tiles.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from cases import (
    ENGINES,
    ENGINES_OF_ONE_KIND,
    MODEL_SCOPE,
    QUICK_RULES,
    RULES,
    RULES_WITH_LARGE_WORKERS,
    Case,
)
from hosts import loopback, network, run_ranks, why_no_namespaces

MIB = 1 << 20


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few rules in fp32, about a minute")
    parser.add_argument("--world", type=int, choices=(2, 4, 8), default=4)
    parser.add_argument("--engine", action="append", choices=list(ENGINES), help="default: all but ZeRO-1")
    parser.add_argument("--dtype", action="append", choices=("fp32", "bf16"), help="default: both")
    parser.add_argument("--rule", action="append", choices=list(RULES), help="default: all of them")
    parser.add_argument("--ranks-per-host", type=int, choices=(1, 2, 4), default=1)
    parser.add_argument(
        "--rate", help="the most a host sends or receives, as tc reads it (500mbit); default: no limit"
    )
    parser.add_argument("--only-bytes", action="store_true", help="measure neither time nor memory")
    parser.add_argument("--tile-mib", type=float, default=1.0, help="tile_bytes when measuring memory")
    parser.add_argument("--rounds", type=int, help="pairs of steps to time per rule")
    parser.add_argument("--loopback", action="store_true", help="no namespaces, even where they can be made")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds until the ranks are killed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the numbers")
    return parser.parse_args(arguments)


def make_cases(options: argparse.Namespace) -> list[Case]:
    """Each engine with each kind of ownership and dtype; scope model runs on ZeRO-1 instead of ZeRO-2."""
    dtypes = options.dtype or (["fp32"] if options.quick else ["fp32", "bf16"])
    default = QUICK_RULES if options.quick else [name for name in ENGINES if name != "ZeRO-1"]
    case = partial(_case, options)
    cases = []
    every_rule = (
        [*RULES]
        if options.ranks_per_host > 1
        else [rule for rule in RULES if rule not in RULES_WITH_LARGE_WORKERS]
    )
    for engine in options.engine or default:
        rules = tuple(options.rule or (QUICK_RULES.get(engine, ("GAF",)) if options.quick else every_rule))
        if engine in ENGINES_OF_ONE_KIND:
            owners, of_engine = ENGINES_OF_ONE_KIND[engine]
            names = tuple(rule for rule in rules if engine != "ZeRO-3" or MODEL_SCOPE not in rule)
            cases += [case(owners, dtype, engine, names) for dtype in of_engine if dtype in dtypes]
            continue
        for dtype, owners in itertools.product(dtypes, ("even", "one owner")):
            engines = {engine: rules}
            model_scope = tuple(rule for rule in rules if MODEL_SCOPE in rule)
            if engine == "ZeRO-2" and model_scope:
                engines = {engine: tuple(rule for rule in rules if rule not in model_scope)}
                engines |= {"ZeRO-1": model_scope} if dtype == "fp32" else {}
            cases += [case(owners, dtype, name, names) for name, names in engines.items()]
    return [case for case in cases if case.rules]


def _case(options: argparse.Namespace, owners: str, dtype: str, engine: str, rules: tuple[str, ...]) -> Case:
    tile_bytes = int(options.tile_mib * MIB)
    return Case(owners, dtype, engine, options.world, tile_bytes, rules, options.ranks_per_host)


def run(cases: list[Case], options: argparse.Namespace) -> list[list[dict[str, Any]]]:
    """Start the ranks, and return their measurements: [rank][case][rule]."""
    rounds = options.rounds or (2 if options.quick else 6)
    rounds = 0 if options.only_bytes else rounds
    repeats = 1 if options.only_bytes or options.quick else 2
    plan = {"cases": [asdict(case) for case in cases], "rounds": rounds, "repeats": repeats}
    missing = "--loopback was given" if options.loopback else why_no_namespaces()
    if missing is not None:
        print(
            f"No network namespaces ({missing}): counting on the loopback interface, for all ranks together."
        )
    num_hosts = options.world // options.ranks_per_host
    hosts = network(num_hosts, options.rate) if missing is None else nullcontext(loopback(num_hosts))
    with tempfile.TemporaryDirectory() as name, hosts as ranks:
        folder = Path(name)
        run_ranks(ranks, _worker(plan, folder), folder, options.timeout, options.ranks_per_host)
        measured = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(options.world)]
    if missing is not None:
        _share_counter(measured)
    return measured


def _worker(plan: dict[str, Any], folder: Path) -> Callable[[], None]:
    """The function that a rank runs; its module is imported here, once, before ranks are forked."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    import exchange_worker

    gc.freeze()  # the collector would copy the pages that forked ranks share
    return partial(exchange_worker.work, plan, folder)


def _share_counter(measured: list[list[dict[str, Any]]]) -> None:
    """The loopback counter is the sum over ranks: divide it by their number."""
    for rank in measured:
        for case in rank:
            for row in case.values():
                row["sent_bytes"] = [num_bytes / len(measured) for num_bytes in row["sent_bytes"]]


def summarise(case: Case, ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per rule from the ranks' measurements of a case."""

    def sent(rule: str) -> float:
        return statistics.mean(statistics.median(rank[rule]["sent_bytes"]) for rank in ranks)

    def excess(rule: str) -> float:
        return case.gloo_bytes(rule) - case.theory_bytes(rule)

    def most(rule: str, key: str) -> float:
        return max(statistics.median(rank[rule][key]) for rank in ranks)

    def peak(rule: str) -> float:
        return statistics.median(value for rank in ranks for value in rank[rule]["backward_bytes"])

    rows = []
    for rule in case.rules:
        row = asdict(case) | {
            "rule": rule,
            "sent_bytes": sent(rule),
            "theory_bytes": case.theory_bytes(rule),
            "stock_sent_bytes": sent("reference"),
            "stock_theory_bytes": case.theory_bytes("stock"),
            "gloo_bytes": case.gloo_bytes(rule),
            "stock_gloo_bytes": case.gloo_bytes("stock"),
            "bytes_ratio": (sent(rule) - excess(rule)) / (sent("reference") - excess("stock")),
            "bytes_ratio_theory": case.theory_bytes(rule) / case.theory_bytes("stock"),
            "bytes_ratio_bound": case.bytes_bound(rule),
        }
        rows.append(row)
        pairs = [pair for rank in ranks for pair in rank[rule].get("seconds", ())]
        if pairs:
            row |= {
                "time_ratio": statistics.median(seconds / stock for stock, seconds in pairs),
                "stock_step_s": statistics.median(stock for stock, _ in pairs),
                "peak_ratio": peak(rule) / peak("reference"),
                "reduction_bytes": most(rule, "reduction_bytes"),
                "stock_reduction_bytes": most("reference", "reduction_bytes"),
                "reduction_bound_bytes": case.memory_bound(rule, most("reference", "reduction_bytes")),
            }
    return rows


def print_table(case: Case, rows: list[dict[str, Any]]) -> None:
    """Print the rows of a case."""
    first = rows[0]
    overhead = first["stock_sent_bytes"] / first["stock_gloo_bytes"] - 1
    print(
        f"\n{case.owners}, {case.dtype}, {case.engine}, {case.world} ranks, {case.ranks_per_host} on a host:"
        f" model {case.model_bytes / MIB:.0f} MiB, buckets {case.bucket_bytes / MIB:.0f} MiB,"
        f" tiles {case.tile_bytes / MIB:g} MiB\n"
        f"stock sends {first['stock_sent_bytes'] / MIB:.1f} MiB per host"
        f" (theory {first['stock_gloo_bytes'] / MIB:.1f}, {overhead:+.1%} for the protocols)"
    )
    if first["stock_gloo_bytes"] > first["stock_theory_bytes"]:
        print("over gloo, whose reduce-scatter sends twice what it has to; ratios are without that half")
    timed = "time_ratio" in first
    if timed:
        print(
            f"stock allocates {first['stock_reduction_bytes'] / MIB:.1f} MiB in a reduction,"
            f" {first['stock_step_s'] * 1e3:.0f} ms a step"
        )
    rest = f"{'time':>7}{'peak':>7}{'own MiB':>9}{'tiles':>7}" if timed else ""
    print(f"{'rule':<30}{'bytes':>7}{'theory':>8}{'bound':>7}{rest}")
    for row in rows:
        line = f"{row['rule']:<30}{row['bytes_ratio']:>7.3f}{row['bytes_ratio_theory']:>8.3f}"
        line += f"{row['bytes_ratio_bound']:>7.2f}"
        if timed:
            line += f"{row['time_ratio']:>7.2f}{row['peak_ratio']:>7.2f}{row['reduction_bytes'] / MIB:>9.2f}"
            line += f"{row['reduction_bytes'] / case.tile_bytes:>7.2f}"
        print(f"{line}  {broken(row)}".rstrip())


def broken(row: dict[str, Any]) -> str:
    """The bounds that a row exceeds; an empty string if there are none."""
    what = []
    if row["bytes_ratio"] > row["bytes_ratio_bound"]:
        what.append("BYTES")
    if "reduction_bytes" in row and row["reduction_bytes"] > row["reduction_bound_bytes"]:
        what.append(f"MEMORY > {row['reduction_bound_bytes'] / MIB:.1f} MiB")
    return ", ".join(what)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    # A terminated run must still remove its namespaces and end its ranks.
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
