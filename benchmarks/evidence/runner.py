"""Trains what a study's table asks for and is not there yet: `make evidence [STUDY=name] [SEEDS=20]`.

    python -m benchmarks.evidence.runner [STUDY ...] [--seeds N] [--minutes 60] [--processes 2]

Interrupted, it goes on where it was: every run is a line in benchmarks/evidence/results/. Without names it
takes the studies that fit into an hour on 2 cores. docs/evidence.md is written at the end.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from typing import Any

from tqdm import tqdm

from benchmarks.evidence.results import Results, Trial
from benchmarks.evidence.studies import STUDIES
from benchmarks.evidence.study import Arm


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the runs of studies.")
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)}")
    parser.add_argument("--seeds", type=int, help="pairs in every cell (default: the study's)")
    parser.add_argument("--minutes", type=float, default=60, help="begin no run after so long (default: 60)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="runs at a time")
    args = parser.parse_args()
    if unknown := [name for name in args.studies if name not in STUDIES]:
        parser.error(f"no study {', '.join(unknown)}; there are {', '.join(STUDIES)}")
    if (args.seeds is not None and args.seeds < 2) or args.processes < 1:
        parser.error("--seeds is 2 or more, --processes 1 or more")
    names = args.studies or [name for name, study in STUDIES.items() if study.in_an_hour]
    end = time.monotonic() + 60 * args.minutes
    with multiprocessing.get_context("spawn").Pool(args.processes, _one_thread) as pool:
        complete = all([_complete(name, args.seeds, end, pool) for name in names])
    if not complete:
        sys.exit("time is up; the same command goes on")


def _complete(name: str, num_seeds: int | None, end: float, pool: Any) -> bool:
    """Train what is missing of a study; whether nothing is any more."""
    results = Results(STUDIES[name])
    seeds = range(num_seeds or results.study.seeds)
    while (missing := results.missing(seeds)) and time.monotonic() < end:
        arms = results.study.arms
        jobs = ((trial, arms[trial.arm], results.skip_share(trial), end) for trial in missing)
        bar = tqdm(
            pool.imap_unordered(_train, jobs), total=len(missing), desc=name, unit="run", smoothing=0.05
        )
        for trial, found in bar:
            if found is not None:
                results.add(trial, found)
    results.tidy()
    return not missing


def _train(job: tuple[Trial, Arm, float, float]) -> tuple[Trial, dict[str, Any] | None]:
    from benchmarks.evidence import deepspeed_training
    from benchmarks.evidence.training import train

    trial, arm, skip_share, end = job
    if time.monotonic() > end:
        return trial, None
    if arm.run.by_deepspeed:
        return trial, deepspeed_training.train(arm.run, trial.lr, trial.seed)
    return trial, train(arm.run, trial.lr, trial.seed, skip_share)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
