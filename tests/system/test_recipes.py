"""docs/huggingface.md, accelerate.md, trl.md and lightning.md: each page's script, started by its command on
2 ranks, ends at the weights that its rule leads to in one process, and not at those of the mean.

On a CPU Accelerate and Lightning have to be told that it will do: tests/support/on_cpu.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.support import recipes
from tests.support.recipes import Training, check_weights, class_losses, token_losses

pytestmark = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="2 ranks want 2 GPUs, or none")

# What a test can replay: all rows once, in their order, at one learning rate.
IN_ORDER = ["--num_train_epochs", "1", "--train_sampling_strategy", "sequential"]
IN_ORDER += ["--lr_scheduler_type", "constant", "--save_strategy", "no", "--report_to", "none"]


def active(output: str, stage: int = 2) -> str:
    """The line that says which rules are at work."""
    (line,) = re.findall(rf"ds_gradmix: (active over 2 workers, ZeRO-{stage}: .*)", output)
    return str(line)


def language_training(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Training:
    """Two workers take turns at batches of 4; padding has no labels."""
    batches = []
    for at in range(0, len(rows), 4):
        four = rows[at : at + 4]
        width = max(len(row["input_ids"]) for row in four)
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        batches.append(
            {
                name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in four])
                for name, value in fill.items()
            }
        )
    steps = [batches[i : i + 2] for i in range(0, len(batches), 2)]
    model = partial(LlamaForCausalLM.from_pretrained, folder / "my-model")
    return Training(model, steps, token_losses, clip=1.0, weight_decay=0.0)


@pytest.mark.parametrize("stage", [2, 3])
def test_huggingface(tmp_path: Path, stage: int) -> None:
    """At stage 3 with "auto" for its settings, too, and by sketch, which is its default."""
    document = "docs/huggingface.md"
    config = recipes.write_recipe(document, tmp_path)
    if stage == 3:
        names = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
        zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True, **dict.fromkeys(names, "auto")}
        config["zero_optimization"] = zero
        (tmp_path / "ds_config.json").write_text(json.dumps(config))
    recipes.write_language_model(tmp_path)
    texts = recipes.sentences(24, 8, 16)
    (tmp_path / "train.txt").write_text("\n".join(texts) + "\n")
    output = recipes.start(document, tmp_path, "for_accelerate", *IN_ORDER)
    line = active(output, stage)
    assert "mixing GAF(threshold=0.97" in line and ("gram sketch 65536" in line) == (stage == 3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "my-model")
    rows = [dict(tokenizer(text)) for text in texts]
    training = language_training(tmp_path, [{**row, "labels": row["input_ids"]} for row in rows])
    check_weights(load_file(tmp_path / "out" / "model.safetensors"), training, config["gradmix"])
    kept = recipes.monitored(tmp_path, "kept_fraction")
    assert len(kept) == 3 and min(kept) < 1, "some parameters had no agreement"


def test_trl(tmp_path: Path) -> None:
    document = "docs/trl.md"
    config = recipes.write_recipe(document, tmp_path)
    recipes.write_language_model(tmp_path)
    pairs = list(zip(recipes.sentences(24, 3, 6), recipes.sentences(24, 3, 9, seed=1), strict=True))
    lines = [json.dumps({"prompt": prompt, "completion": f" {completion}"}) for prompt, completion in pairs]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    output = recipes.start(document, tmp_path, "for_accelerate", *IN_ORDER, "--bf16", "false")
    line = active(output)
    assert "scaling VRGD(gamma=0.1" in line and "VRGD wants at least 8 workers" in line
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "my-model")
    rows = []
    for prompt, completion in pairs:
        before, after = tokenizer(prompt)["input_ids"], [*tokenizer(completion)["input_ids"], 1]
        ids = [*before, *after]
        labels = [-100] * len(before) + after
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    training = language_training(tmp_path, rows)
    check_weights(load_file(tmp_path / "out" / "model.safetensors"), training, config["gradmix"])
    assert all(0 < factor < 1 for factor in recipes.monitored(tmp_path, "mean_factor"))


def classifier() -> nn.Module:
    """The model of two pages, before any other number is drawn."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))


def examples() -> TensorDataset:
    """Their data, drawn after the model."""
    classifier()
    inputs = torch.randn(48, 16)
    return TensorDataset(inputs, inputs[:, :4].argmax(1))


def test_accelerate(tmp_path: Path) -> None:
    document = "docs/accelerate.md"
    config = recipes.write_recipe(document, tmp_path)
    output = recipes.start(document, tmp_path, "for_accelerate")
    assert "mixing GradientMix(alpha=1.0" in active(output)
    batches = list(DataLoader(examples(), batch_size=8))
    steps = [batches[i : i + 2] for i in range(0, len(batches), 2)]
    training = Training(classifier, steps, class_losses, clip=1.0, weight_decay=0.01)
    check_weights(load_file(tmp_path / "out" / "model.safetensors"), training, config["gradmix"])
    assert all(1 < workers < 2 for workers in recipes.monitored(tmp_path, "effective_workers"))


def test_lightning(tmp_path: Path) -> None:
    document = "docs/lightning.md"
    config = recipes.write_recipe(document, tmp_path)
    output = recipes.start(document, tmp_path, "for_lightning")
    assert "extrapolation PastGradient(" in active(output)
    parts = [DistributedSampler(examples(), 2, rank, shuffle=True, seed=0) for rank in range(2)]
    loaders = [DataLoader(examples(), batch_size=8, sampler=part) for part in parts]
    saved = torch.load(tmp_path / "out/checkpoint/mp_rank_00_model_states.pt", weights_only=False)["module"]
    trained = {name.removeprefix("net."): value for name, value in saved.items()}
    steps = list(zip(*loaders, strict=True))
    check_weights(trained, Training(classifier, steps, class_losses, 0.0, 0.01), config["gradmix"])
