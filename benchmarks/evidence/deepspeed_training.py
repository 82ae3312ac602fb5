"""The same training by the real thing: the `deepspeed` command, launch/pretrain.py, ZeRO-2, bf16, gloo."""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from gradmix_pretrain.metrics import read_lines
from quickstart import environment, free_port

from benchmarks.evidence import ROOT
from benchmarks.evidence.tasks import HELD_OUT, MODEL, SEQUENCES, Text, tokens
from benchmarks.evidence.text import folder
from benchmarks.evidence.training import OPTIMIZERS, Run


def train(run: Run, lr: float, seed: int) -> dict[str, Any]:
    """As `training.train`; only the last step is evaluated. RuntimeError if the command fails."""
    assert isinstance(run.task, Text)
    (kind,) = run.task.kinds
    tokens(kind)  # makes them
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "ds_config.json").write_text(json.dumps(ds_config(run, lr)))
        model = {key: value for key, value in MODEL.items() if key != "attn_implementation"}
        (work / "model.json").write_text(json.dumps({"model_type": "llama", **model}))
        command = (
            f"deepspeed --log_level warning --num_accelerators {run.task.workers} --master_port {free_port()}"
            f" --module ds_gradmix launch/pretrain.py --deepspeed_config {work}/ds_config.json"
            f" --model {work}/model.json --data {folder(kind)} --out {work}/run --steps {run.steps}"
            f" --warmup-steps {run.warmup_steps} --validate-every {run.steps} --checkpoint-every {run.steps}"
            f" --validation-windows {HELD_OUT} --seed {seed}"
        )
        faults = [word for fault in run.faults for word in ("--fault", fault)]
        done = subprocess.run(
            [*command.split(), *faults],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        lines = read_lines(work / "run" / "metrics.jsonl")
    loss = lines[-1]["val_loss"]
    found = round(loss, 5) if loss is not None and math.isfinite(loss) else None
    return {"curve": [found], "skipped": sum(line["skipped"] for line in lines)}


def ds_config(run: Run, lr: float) -> dict[str, Any]:
    """What DeepSpeed is given for a run with AdamW."""
    adam = {"lr": lr, **OPTIMIZERS["AdamW"].keywords, "torch_adam": True}
    return {
        "train_micro_batch_size_per_gpu": SEQUENCES,
        "optimizer": {"type": run.optimizer, "params": adam},
        "bf16": {"enabled": True},
        "gradient_clipping": run.clipping,
        "zero_optimization": {"stage": 2},
        "gradmix": dict(run.block),
    }
