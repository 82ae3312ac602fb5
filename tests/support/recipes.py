"""The recipes of docs/ for other libraries: starting a page's script by its command, and the same training in
one process, worker by worker, without DeepSpeed.
"""

from __future__ import annotations

import csv
import json
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ds_gradmix import combine
from tests.support.documents import ROOT, blocks, commands
from tests.support.ranks import free_port

ON_CPU = ROOT / "tests" / "support" / "on_cpu"
_WORDS = [f"w{i}" for i in range(29)]
_NO_DOWNLOADS = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
Batch = Any


class Training(NamedTuple):
    """What a page trains, besides the rules."""

    model: Callable[[], nn.Module]  # makes it as it is before the first step
    steps: Sequence[Sequence[Batch]]  # each has a batch for every worker
    losses: Callable[[nn.Module, Sequence[Batch]], list[torch.Tensor]]  # of the workers
    clip: float
    weight_decay: float


def write_recipe(document: str, folder: Path) -> dict[str, Any]:
    """The files of a page, train.py and ds_config.json, in a folder; the config."""
    (script,) = blocks(document, "python")
    (config,) = blocks(document, "json")
    (folder / "train.py").write_text(script.text)
    (folder / "ds_config.json").write_text(config.text)
    assert "ds_gradmix" not in script.text
    found: dict[str, Any] = json.loads(config.text)
    return found


def start(document: str, folder: Path, on_cpu: str, *options: str) -> str:
    """Run the page's command on 2 ranks, and these options after it; what was printed.

    `on_cpu` is a folder of tests/support/on_cpu, with what the library needs where there are no GPUs.
    """
    (line,) = commands(document)
    program, *arguments = shlex.split(line)
    port = {"deepspeed": "--master_port", "accelerate": "--main_process_port"}[program]
    launcher = {"deepspeed": ["--num_accelerators", "2"], "accelerate": ["launch"]}[program]
    arguments = [word for word in arguments if word != "launch"]
    if "--num_gpus" in arguments:  # the same option, and DeepSpeed's launcher takes one of them
        launcher = []
    paths = [str(ROOT), *([] if torch.cuda.is_available() else [str(ON_CPU / on_cpu)])]
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **_NO_DOWNLOADS, "PATH": binaries, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [program, *launcher, port, str(free_port()), *arguments, *options],
        cwd=folder,
        env={**environment, "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def monitored(folder: Path, name: str) -> list[float]:
    """What DeepSpeed's monitor wrote of a number, step by step."""
    with (folder / "metrics" / "run" / f"Train_GradMix_{name}.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def write_language_model(folder: Path) -> None:
    """A small Llama, whose tokens are words, in the folder `my-model`."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *_WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "my-model")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **sizes, **ids)).save_pretrained(
        folder / "my-model"
    )


def sentences(count: int, fewest: int, most: int, seed: int = 0) -> list[str]:
    """Words drawn at random."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(_WORDS, k=draw.randint(fewest, most))) for _ in range(count)]


def token_losses(model: nn.Module, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """The loss of each worker as the Trainer has it: its sum over the tokens of all, times the workers."""
    targets = [batch["labels"][:, 1:].flatten() for batch in batches]
    total = sum(int((target != -100).sum()) for target in targets)
    losses = []
    for batch, target in zip(batches, targets, strict=True):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        summed = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), target, reduction="sum")
        losses.append(len(batches) * summed / total)
    return losses


def class_losses(model: nn.Module, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """The loss of each worker, by its own mean."""
    return [nn.functional.cross_entropy(model(inputs), targets) for inputs, targets in batches]


def replay(training: Training, block: Mapping[str, Any]) -> torch.Tensor:
    """Train with AdamW, lr 0.01, as the pages do: all weights at the end.

    `PastGradient` moves weights before a worker's gradient is taken; the rest of a block is for `combine`.
    """
    model = training.model()
    parameters = list(model.parameters())
    sizes = [parameter.numel() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=training.weight_decay)
    rules = {key: value for key, value in block.items() if key != "extrapolation"}
    offset = -block["extrapolation"]["params"]["lr"] if "extrapolation" in block else 0.0
    grads = [torch.zeros(1)] * len(training.steps[0])
    for step, batches in enumerate(training.steps):
        home = parameters_to_vector(parameters).detach()
        for worker in range(len(batches)):
            vector_to_parameters(home + offset * grads[worker], parameters)
            taken = torch.autograd.grad(training.losses(model, batches)[worker], parameters)
            grads[worker] = parameters_to_vector(taken)
        vector_to_parameters(home, parameters)
        mixed, info = combine(torch.stack(grads), rules, step, sizes)
        for parameter, grad in zip(parameters, mixed.split(sizes), strict=True):
            parameter.grad = grad.view_as(parameter).clone()
        if training.clip:
            clip_grad_norm_(parameters, training.clip)
        assert not info["skipped"]
        optimizer.step()
    return parameters_to_vector(parameters).detach()


def check_weights(trained: Mapping[str, torch.Tensor], training: Training, block: Mapping[str, Any]) -> None:
    """They are those that the block leads to, and not those that the mean does.

    Adam divides a gradient by its own size, so that the rounding of very small ones can be seen.
    """
    start = training.model()
    found = torch.cat([trained[name].float().flatten() for name, _ in start.named_parameters()])
    way = (found - parameters_to_vector(start.parameters()).detach()).norm()
    from_rule, from_mean = (float((found - replay(training, rules)).norm() / way) for rules in (block, {}))
    assert from_mean > 0.02, "the rule makes no difference"
    assert from_rule < 0.02 * from_mean, (from_rule, from_mean)
