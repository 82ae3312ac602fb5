"""For `make compare`: the quickstart by the mean and by Guard, with good workers and with a bad one.

These are four runs by the `deepspeed` command, on all GPUs if there are 3 or more, else on 4 CPU processes.
RUN/compare gets a folder of each, compare.json with the numbers, and compare.svg. Interrupted, the same
command resumes. Arguments that are not known here are appended to those of pretrain.py.

For README.md, copy compare.json to docs/pictures, and run `python -m tests.support.documents`.
"""

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gradmix_pretrain import comparison
from gradmix_pretrain.checkpoint import latest_step, write_text
from gradmix_pretrain.metrics import read_lines, validation_losses
from gradmix_pretrain.tokens import open_tokens
from quickstart import CPU_WORKERS, ROOT, command, environment, on_gpus, run_folder, train

RUNS = [(rule, faulty) for faulty in (False, True) for rule in comparison.RULES]
CONFIGS = {rule: f"configs/{rule.lower()}_zero2.json" for rule in comparison.RULES}
FEWEST_GPUS = 3  # of two workers, neither can be told from the other


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    num_gpus = torch.cuda.device_count()
    add = parser.add_argument
    add("--steps", type=int, default=200, help="of each run")
    add("--good-steps", type=int, default=50, help="after which the last worker is bad")
    add("--workers", type=int, default=num_gpus if num_gpus >= FEWEST_GPUS else CPU_WORKERS)
    add("--model", type=Path, default=Path("configs/models/llama-tiny.json"), help="of a Llama")
    return parser.parse_known_args()


def settings_of(args: argparse.Namespace, more: list[str], data: Path) -> dict[str, Any]:
    """What the four runs have in common."""
    config = json.loads((ROOT / CONFIGS["Mean"]).read_text())
    del config["gradmix"]
    if not on_gpus(args.workers):
        del config["bf16"]
    return {
        "workers": args.workers,
        "steps": args.steps,
        "good_steps": args.good_steps,
        "model": json.loads((ROOT / args.model).read_text()),
        "config": config,
        "options": more,
        "tokens": open_tokens(data).sha256,
        "device": torch.cuda.get_device_name() if on_gpus(args.workers) else "a CPU",
    }


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Note them in the folder; ValueError if runs with others are in it."""
    path = folder / "settings.json"
    if path.exists() and (before := json.loads(path.read_text())) != settings:
        names = ", ".join(name for name in settings if settings[name] != before.get(name))
        raise ValueError(f"{folder} holds a comparison with other {names}; remove it, or give another RUN")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(settings, indent=2))


def folder_of(rule: str, faulty: bool) -> str:
    return rule.lower() + "_bad_worker" * faulty


def compare(settings: dict[str, Any], args: argparse.Namespace, folder: Path) -> int:
    """Train what is not complete yet; returns the exit status of a run that was not ended well, or 0."""
    variables = environment() | ({} if on_gpus(args.workers) else {"DS_ACCELERATOR": "cpu"})
    fault = f"noise:scale={comparison.NOISE_SCALE}:rank={args.workers - 1}:from={args.good_steps + 1}"
    for number, (rule, faulty) in enumerate(RUNS, 1):
        run = folder / folder_of(rule, faulty)
        case = "one bad worker" if faulty else "all workers good"
        print(f"run {number} of {len(RUNS)}: {rule}, {case}", flush=True)
        if latest_step(ROOT / run / "checkpoint") >= args.steps:
            print(f"{run}: complete")
            continue
        arguments = command(CONFIGS[rule], run, folder.parent / "data", args.workers)
        arguments += ["--steps", str(args.steps), "--validate-every", "10", "--model", str(args.model)]
        status = train([*arguments, *["--fault", fault] * faulty, *settings["options"]], variables)
        if status:
            return status
    return 0


def outcome(rule: str, faulty: bool, run: Path) -> dict[str, Any]:
    """The losses of a run, and when which rank was left out or warned of for the first time."""
    losses = validation_losses(read_lines(run / "metrics.jsonl"))
    found: dict[str, Any] = {"rule": rule, "faulty": faulty}
    found["val_loss"] = [[step, round(loss, 4)] for step, loss in losses]
    for name, kind in (("left_out", "left out"), ("alarms", "alarm")):
        first: dict[int, int] = {}
        for line in read_lines(run / "gradmix.jsonl"):
            if line.get("event") == kind:
                first.setdefault(line["ranks"][0], line["step"])
        found[name] = sorted(map(list, first.items()))
    return found


def results_of(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The numbers of the four runs, and what is said of them."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings["model"]))
    shown = ("workers", "steps", "good_steps", "config", "device")
    return {
        **{name: settings[name] for name in shown},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sequence_length": settings["model"]["max_position_embeddings"],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "deepspeed")},
        },
        "runs": [outcome(rule, faulty, folder / folder_of(rule, faulty)) for rule, faulty in RUNS],
    }


def main() -> None:
    args, more = parse_args()
    begin, folder = time.monotonic(), run_folder() / "compare"
    try:
        settings = settings_of(args, more, ROOT / run_folder() / "data")
        check_settings(ROOT / folder, settings)
    except (OSError, ValueError) as error:
        sys.exit(f"compare.py: error: {error}")
    if status := compare(settings, args, folder):
        sys.exit(status)
    results = results_of(settings, ROOT / folder)
    write_text(ROOT / folder / "compare.json", json.dumps(results) + "\n")
    write_text(ROOT / folder / "compare.svg", comparison.draw(results))
    print(f"\n{comparison.fault(results)}.\n\n{comparison.aligned(results)}\n")
    print(f"{comparison.findings(results)}\n{comparison.conditions(results)}")
    print(f"{(time.monotonic() - begin) / 60:.1f} minutes; picture: {folder / 'compare.svg'}; reports:")
    for rule, faulty in RUNS:
        print(folder / folder_of(rule, faulty) / "report.html")


if __name__ == "__main__":
    main()
