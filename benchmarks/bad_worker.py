"""Trains a small Llama on 8 workers by the mean and by GAF, with all workers good and with a bad one.

    python benchmarks/bad_worker.py
    python benchmarks/bad_worker.py --faults negative tokens --name other_faults
    python benchmarks/bad_worker.py --draw

The workers are processes on CPU over gloo, each with a DeepSpeed engine (ZeRO-2, fp32). From step 50 on, the
last worker has a fault: "noise", its gradients are noise, a hundred times as long as they should be, as from
broken hardware; "negative", they have the wrong sign; "tokens", it reads tokens drawn at random. The text is
the standard library of the Python that runs this. NAME.json gets the losses of every run; bad_worker.svg is
drawn from bad_worker.json, and `--draw` does no more.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import socket
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "launch"))

VOCAB, LENGTH, SEQUENCES = 512, 64, 4
MODEL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
}
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": SEQUENCES,
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 0.003, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True},
    },
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
}
FAULTS = ("none", "noise", "negative", "tokens")
RULES: dict[str, dict[str, Any]] = {
    "mean": {},
    "GAF": {"mixing": {"type": "GAF", "params": {"threshold": 0.97}}},
}
WARMUP_STEPS, NOISE, VALIDATE_EVERY, VALIDATION_WINDOWS = 20, 100.0, 10, 128


class Run(NamedTuple):
    """A training run."""

    rule: str
    fault: str  # of the last worker
    seed: int


def runs(num_seeds: int, faults: Sequence[str]) -> Iterator[Run]:
    """All rules with all faults, from the same seeds."""
    for seed in range(1, num_seeds + 1):
        for fault in faults:
            for rule in RULES:
                yield Run(rule, fault, seed)


def train(run: Run, options: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Train on this rank; the losses are those of all ranks."""
    import deepspeed
    import torch
    from gradmix_pretrain.schedule import cosine_with_warmup
    from gradmix_pretrain.tokens import TrainingWindows, open_tokens, validation_batches
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import AutoConfig, AutoModelForCausalLM

    import ds_gradmix

    torch.manual_seed(run.seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **MODEL))
    model.config.use_cache = False
    engine = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={**CONFIG, "gradmix": RULES[run.rule]},
        lr_scheduler=lambda optimizer: LambdaLR(
            optimizer, lambda step: cosine_with_warmup(step, WARMUP_STEPS, options.steps, 0.1)
        ),
    )[0]
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    tokens = open_tokens(data)
    windows = TrainingWindows(tokens.train_N, LENGTH, SEQUENCES, 1, rank, world, run.seed)
    held_out = validation_batches(tokens.validation_N, LENGTH, 16, VALIDATION_WINDOWS, rank, world)
    found: dict[str, Any] = {**run._asdict(), "val_loss": [], "kept_fraction": []}
    for step in range(options.steps):
        batch_BT = windows.batch(step, 0)
        if rank == world - 1 and step == options.bad_from:
            break_gradients(model, run)
        if rank == world - 1 and step >= options.bad_from and run.fault == "tokens":
            batch_BT = torch.randint(VOCAB, batch_BT.shape, generator=torch.Generator().manual_seed(step))
        engine.backward(engine(input_ids=batch_BT, labels=batch_BT).loss)
        engine.step()
        found["kept_fraction"].append(round(ds_gradmix.stats(engine).get("kept_fraction", 1.0), 4))
        if step == 0 or (step + 1) % VALIDATE_EVERY == 0:
            found["val_loss"].append([step + 1, round(validate(engine, held_out), 5)])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {**found, "skipped_steps": engine.skipped_steps, "parameters": parameters}


def break_gradients(model: Any, run: Run) -> None:
    """From now on this worker's gradients have the fault of the run."""
    import torch
    from gradmix_pretrain.faults import noise

    random = torch.Generator().manual_seed(run.seed)

    def broken(grad: torch.Tensor) -> torch.Tensor:
        return noise(grad, NOISE, random) if run.fault == "noise" else -grad

    for parameter in model.parameters() if run.fault in ("noise", "negative") else ():
        parameter.register_hook(broken)


def validate(engine: Any, batches: list[Any]) -> float:
    """The mean loss over the held-out windows of all ranks."""
    import torch

    with torch.no_grad():
        engine.eval()
        losses = [engine(input_ids=batch_BT, labels=batch_BT).loss for batch_BT in batches]
        engine.train()
    total = torch.stack(losses).mean()
    torch.distributed.all_reduce(total)
    return float(total) / torch.distributed.get_world_size()


def rank_main(rank: int, options: argparse.Namespace, port: int, data: Path, results: Path) -> None:
    """All runs on one rank; rank 0 writes their losses."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(options.workers))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    import deepspeed
    import torch

    import ds_gradmix

    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs a compiler; gloo serves
    deepspeed.init_distributed("gloo", verbose=False)
    ds_gradmix.enable()
    found = []
    for run in runs(options.seeds, options.faults):
        found.append(train(run, options, data))
        if rank == 0:
            print(f"{run}: {found[-1]['val_loss'][-1][1]:.4f}", flush=True)
    seconds = torch.tensor(time.process_time())
    torch.distributed.all_reduce(seconds)
    if rank == 0:
        results.write_text(json.dumps({"cpu_minutes": round(float(seconds) / 60, 1), "runs": found}))
    torch.distributed.destroy_process_group()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Prepare the text, start the workers, and wait for their losses."""
    import deepspeed
    import prepare
    import torch

    with tempfile.TemporaryDirectory() as folder:
        data, results = Path(folder, "data"), Path(folder, "results.json")
        prepare.main(["--out", str(data), "--max-mb", "4", "--vocab-size", str(VOCAB)])
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "deepspeed", "transformers.models.llama"])
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        ranks = [
            context.Process(target=rank_main, args=(rank, options, port, data, results))
            for rank in range(options.workers)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            sys.exit("bad_worker.py: error: a worker failed")
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        return {
            "workers": options.workers,
            "steps": options.steps,
            "bad_from": options.bad_from,
            "seeds": options.seeds,
            "versions": versions | {"deepspeed": deepspeed.__version__},
            **json.loads(results.read_text()),
        }


def chosen(results: dict[str, Any], rule: str, fault: str) -> list[dict[str, Any]]:
    """The runs of all seeds."""
    return [run for run in results["runs"] if (run["rule"], run["fault"]) == (rule, fault)]


def ends(results: dict[str, Any], rule: str, fault: str) -> str:
    """The last validation losses: their mean, and the least and the most."""
    losses = [run["val_loss"][-1][1] for run in chosen(results, rule, fault)]
    return f"{mean(losses):.2f} ({min(losses):.2f} to {max(losses):.2f})"


def conditions(results: dict[str, Any]) -> str:
    """What was trained and what came out, for the text under the picture."""
    skipped = mean(run["skipped_steps"] for run in chosen(results, "GAF", "noise"))
    parameters = results["runs"][0]["parameters"] / 1e3
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    text = (
        f"One of {results['workers']} workers breaks after {results['bad_from']} steps: its gradients become "
        f"noise, {NOISE:g} times as long. Validation loss after {results['steps']} steps, mean of "
        f"{results['seeds']} seeds (least to most): plain mean: {ends(results, 'mean', 'noise')}, GAF with "
        f"threshold 0.97: {ends(results, 'GAF', 'noise')}; it skipped {skipped:.0f} steps, in which it found "
        f"no agreement. If no worker breaks: plain mean {ends(results, 'mean', 'none')}, GAF "
        f"{ends(results, 'GAF', 'none')}. A Llama of {parameters:.0f}k parameters, {SEQUENCES * LENGTH} "
        "tokens a worker and step of Python's standard library, AdamW, clipping 1.0, one learning rate for "
        f"all, not tuned; fp32, ZeRO-2, on a CPU over gloo ({versions})."
    )
    return textwrap.fill(text, 118, break_on_hyphens=False) + "\n"


def draw(results: dict[str, Any], path: Path) -> None:
    """Validation losses over steps: a line for the mean over seeds, and a band from the least to the most."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "bad_worker", "svg.fonttype": "none", "font.size": 10}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 3.8), layout="constrained")
    for fault in ("noise", "none"):
        for rule, color in zip(RULES, ("#4c72b0", "#dd8452"), strict=True):
            losses = [run["val_loss"][1:] for run in chosen(results, rule, fault)]
            steps = [step for step, _ in losses[0]]
            values = [[loss for _, loss in at_step] for at_step in zip(*losses, strict=True)]
            label = f"{rule}, {'one bad worker' if fault == 'noise' else 'all workers good'}"
            lowest, middle, highest = (list(map(of, values)) for of in (min, mean, max))
            axes.fill_between(steps, lowest, highest, color=color, alpha=0.2, lw=0)
            line = "-" if fault == "noise" else ":"
            axes.plot(steps, middle, line, color=color, lw=1.8, label=label)
    axes.axvline(results["bad_from"], color="gray", lw=0.8)
    axes.text(results["bad_from"], 1, " one worker breaks", transform=axes.get_xaxis_transform(), va="top")
    axes.set(xlabel="step", ylabel="validation loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "docs" / "pictures", help="folder for the results and the picture")
    add("--seeds", type=int, default=3, help="how many")
    add("--steps", type=int, default=150)
    add("--workers", type=int, default=8)
    add("--bad-from", type=int, default=50, help="steps after which the last worker is bad")
    add("--faults", nargs="+", choices=FAULTS, default=["none", "noise"])
    add("--name", default="bad_worker", help="of the results")
    add("--draw", action="store_true", help="draw what is there, without training")
    options = parser.parse_args()
    file = options.out / f"{options.name}.json"
    if not options.draw:
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(measure(options))
        file.write_text(text + "\n")
    if options.name == "bad_worker":
        draw(json.loads(file.read_text()), options.out / "bad_worker.svg")


if __name__ == "__main__":
    main()
