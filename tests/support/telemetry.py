"""Runs as telemetry and launch/pretrain.py record them, drawn at random: for tests of the report.

python -m tests.support.telemetry FOLDER --steps 100000 --workers 8
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

BAD_WORKER = 3
BAD_FROM = 3000  # gradients of BAD_WORKER have the wrong sign from this step on
LAYERS = 12
PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def write_run(
    folder: Path, steps: int, workers: int = 8, every: int = 10, per_parameter: bool = True, seed: int = 0
) -> None:
    """`metrics.jsonl` with a line a step and `gradmix.jsonl` with one in `every`, in a new folder."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    normal = draw.normal(size=(steps + 1, 3))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps(metrics_line(step, steps, normal[step])) + "\n")
    with (folder / "gradmix.jsonl").open("w") as file:
        lines = [header(workers, every)]
        for step in range(every, steps + 1, every):
            lines += [*events(step, every, workers), telemetry_line(step, workers, draw, per_parameter)]
        file.writelines(json.dumps(line) + "\n" for line in lines)


def rate(step: int, steps: int) -> float:
    """Warm-up, then a cosine down to a tenth."""
    warm = max(1, steps // 50)
    if step < warm:
        return 3e-4 * step / warm
    return 3e-4 * (0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def metrics_line(step: int, steps: int, normal: Any) -> dict[str, Any]:
    loss = 2.1 + 7.5 / (1 + step / 60) ** 0.45
    line: dict[str, Any] = {"step": step, "lr": rate(step, steps), "loss": loss + 0.07 * normal[0]}
    if step == 1 or step % max(1, steps // 50) == 0:
        line["val_loss"] = loss + 0.04 + 0.004 * normal[1]
    if step == int(steps * 0.62):
        line["loss"] += 3.0  # one step stands out, and must be seen
    norm = 0.4 + 1.5 / (1 + step / 300)
    return {**line, "grad_norm": norm * math.exp(0.15 * normal[2]), "skipped": step in (1, 2)}


def host(worker: int) -> str:
    return f"node-{worker // 4 + 1:02d}"


def header(workers: int, every: int) -> dict[str, Any]:
    about = [{"worker": worker, "ranks": [worker], "hosts": [host(worker)]} for worker in range(workers)]
    rules = "mixing Guard(aggregator=GAF(threshold=0.97)), scaling VRGD(floor=0.1), scope bucket"
    return {
        "kind": "run",
        "rules": rules,
        "workers": about,
        "samples_per_worker": 8,
        "tokens_per_sample": 1024,
        "every": every,
    }


def events(step: int, every: int, workers: int) -> list[dict[str, Any]]:
    """The alarm about BAD_WORKER and its exclusion, and of another worker, both and its return."""
    told = [
        (BAD_FROM + 100, "alarm", BAD_FROM + 1, BAD_WORKER, "pointing away"),
        (BAD_FROM + 150, "left out", BAD_FROM + 1, BAD_WORKER, "pointing away"),
        (BAD_FROM - 800, "alarm", BAD_FROM - 810, workers - 1, "exploding"),
        (BAD_FROM - 790, "left out", BAD_FROM - 810, workers - 1, "exploding"),
        (BAD_FROM - 300, "returned", BAD_FROM - 300, workers - 1, ""),
    ]
    return [
        {
            "kind": "event",
            "event": event,
            "step": at,
            "since": since,
            "worker": worker,
            "ranks": [worker],
            "host": host(worker),
            "what": what,
        }
        for at, event, since, worker, what in sorted(told)
        if step - every < at <= step
    ]


def telemetry_line(step: int, workers: int, draw: np.random.Generator, per_parameter: bool) -> dict[str, Any]:
    normal = draw.normal(size=(3, workers))
    norms = (0.8 + 2.5 / (1 + step / 300)) * np.exp(0.06 * normal[0])
    agreement = 0.12 + 0.3 / (1 + step / 2000) + 0.02 * normal[1]
    kept = np.clip(0.995 + 0.01 * normal[2], 0, 1)
    if BAD_FROM - 810 < step <= BAD_FROM - 300:
        norms[workers - 1] *= 6.0
        kept[workers - 1] *= step <= BAD_FROM - 790
    if step > BAD_FROM:
        agreement[BAD_WORKER] *= -1
        kept[BAD_WORKER] *= 0.3 * (step <= BAD_FROM + 150)
    cosine = float(agreement.mean()) ** 2 * 2
    noise = 300.0 * (1 + step / 400) ** 0.7 * math.exp(0.25 * draw.normal())
    line: dict[str, Any] = {
        "kind": "step", "step": step, "samples": step * 8 * workers, "lr": 3e-4,
        "kept_fraction": float(kept.mean()),
        "effective_workers": float(kept.sum() ** 2 / (kept**2).sum()), "mean_cosine": cosine,
        "min_cosine": float(agreement.min()) * 0.6, "skipped": 0.0, "close_calls": 0.0,
        "mean_factor": 0.6 + 0.02 * draw.normal(), "floor_fraction": 0.3 + 0.01 * draw.normal(),
        "seconds": 0.004 * math.exp(0.1 * draw.normal()), "bytes_sent": 262144, "noise_scale": noise,
        "noise_scale_tokens": noise * 1024, "worker_norm": norms.round(5).tolist(),
        "worker_agreement": agreement.round(5).tolist(), "worker_kept": kept.round(5).tolist(),
    }  # fmt: skip
    if per_parameter:
        line["parameters"] = parameters(step, draw)
    return line


def parameters(step: int, draw: np.random.Generator) -> dict[str, dict[str, float]]:
    """Deep layers agree less, and the last one's norm grows in the middle of the run."""
    names = [f"model.layers.{layer}.{part}.weight" for layer in range(LAYERS) for part in PARTS]
    names = ["model.embed_tokens.weight", *names, "model.norm.weight", "lm_head.weight"]
    found = {}
    for place, (name, normal) in enumerate(zip(names, draw.normal(size=(len(names), 3)), strict=True)):
        depth = place / len(names)
        norm = (
            0.3
            / (1 + step / 300)
            * math.exp(0.1 * normal[0])
            * (1 + 5 * (".11." in name and 4000 < step < 4500))
        )
        cosine = 0.05 + 0.2 * (1 - depth) / (1 + step / 3000) + 0.01 * normal[1]
        noise = 400 * (1 + 5 * depth) * (1 + step / 400) ** 0.7 * math.exp(0.2 * normal[2])
        found[name] = {
            "norm": round(norm, 6),
            "agreement": round(cosine, 5),
            "noise_scale": round(noise, 2),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_run(args.folder, args.steps, args.workers, args.every, seed=args.seed)


if __name__ == "__main__":
    main()
