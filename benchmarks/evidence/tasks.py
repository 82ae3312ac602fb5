"""What is learned: handwritten digits by a perceptron, and text by a small Llama.

A task gives the losses of all workers at once, each at weights of its own, so that one backward pass takes
all their gradients: by batched products for the perceptron, by `torch.func.vmap` for the Llama. Everything
random depends on the seed alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

os.environ["HF_HUB_OFFLINE"] = "1"  # transformers reads it when imported; nothing is downloaded

import numpy as np
import torch
from gradmix_pretrain.faults import Fault, with_faults
from gradmix_pretrain.tokens import Tokens, TrainingWindows, open_tokens, validation_batches
from torch import Tensor
from torch.func import functional_call, vmap

from benchmarks.evidence.text import KINDS, folder, prepare

Batch = tuple[Tensor, ...]  # each with the workers as first dimension


class Problem(Protocol):
    """A task with its seed: a model and data."""

    module: torch.nn.Module

    def batch(self, step: int) -> Batch:
        """The data of all workers in a step, counted from 0."""

    def losses(self, views: dict[str, Tensor], batch: Batch) -> Tensor:
        """The loss of every worker's data, `[W]`, at weights that have the workers as first dimension."""

    def evaluate(self, views: dict[str, Tensor]) -> float:
        """How good the weights are on held-out data."""

    def learned(self, views: dict[str, Tensor]) -> float | None:
        """Which share of the training labels the model gives back, wrong ones too; None if not measured."""


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1,797 digits of 8 x 8 pixels; 1,200 to train on, 597 to test. Error in per cent.

    Attributes:
        workers: how many.
        batch_size: images a worker and step. 0 shares all 1,200 among the workers.
        label_noise: share of training labels that are moved to another class.
        balance: "none" draws images freely; "true" and "noisy" draw as many of each class, by the label
            before and after the noise. No user knows the labels before.
        hidden: units of the perceptron.
    """

    workers: int
    batch_size: int
    label_noise: float = 0.0
    balance: str = "none"
    hidden: int = 64

    def problem(self, seed: int, faults: tuple[Fault, ...]) -> Problem:
        if faults:
            raise ValueError("faults of the data are those of text")
        return DigitsProblem(self, seed)


class DigitsProblem:
    def __init__(self, task: Digits, seed: int) -> None:
        self.task = task
        self.generator = np.random.default_rng((1, seed))
        x, y = digits()
        order = self.generator.permutation(len(x))
        x, y = x[order], y[order]
        self.test = x[1200:], y[1200:]
        self.x, self.true_y = x[:1200], y[:1200]
        moved = self.generator.random(1200) < task.label_noise
        offset = torch.from_numpy(self.generator.integers(1, 10, 1200))
        self.y = torch.where(torch.from_numpy(moved), (self.true_y + offset) % 10, self.true_y)
        labels = (self.true_y if task.balance == "true" else self.y).numpy()
        self.of_class = [np.flatnonzero(labels == digit) for digit in range(10)]
        torch.manual_seed(seed)
        self.module = torch.nn.Sequential(
            torch.nn.Linear(64, task.hidden), torch.nn.ReLU(), torch.nn.Linear(task.hidden, 10)
        )

    def batch(self, step: int) -> Batch:
        workers = self.task.workers
        if self.task.batch_size == 0:
            chosen = self.generator.permutation(1200)
        elif self.task.balance == "none":
            chosen = self.generator.permutation(1200)[: workers * self.task.batch_size]
        else:
            chosen = self._balanced(workers, self.task.batch_size // 10)
        index = torch.from_numpy(np.ascontiguousarray(chosen)).view(workers, -1)
        return self.x[index], self.y[index]

    def _balanced(self, workers: int, per_class: int) -> np.ndarray:
        """So many images of each class for each worker, all different in a step."""
        columns = [
            self.generator.permutation(images)[: workers * per_class].reshape(workers, -1)
            for images in self.of_class
        ]
        return np.concatenate(columns, axis=1)

    def losses(self, views: dict[str, Tensor], batch: Batch) -> Tensor:
        x, y = batch
        first, first_bias, second, second_bias = views.values()
        hidden = torch.baddbmm(first_bias[:, None], x, first.mT).relu()
        logits = torch.baddbmm(second_bias[:, None], hidden, second.mT)
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
        return losses.view(y.shape).mean(1)

    def evaluate(self, views: dict[str, Tensor]) -> float:
        return 100 * (1 - self._right(views, *self.test))

    def learned(self, views: dict[str, Tensor]) -> float | None:
        return self._right(views, self.x, self.y)

    def _right(self, views: dict[str, Tensor], x: Tensor, y: Tensor) -> float:
        found = functional_call(self.module, views, (x,)).argmax(1)
        return float((found == y).double().mean())


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Pixels `[1797, 64]` of mean 0 and variance 1, and classes `[1797]`."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = torch.from_numpy(x).float()
    return (x - x.mean()) / x.std(), torch.from_numpy(y).long()


LENGTH, SEQUENCES, VOCAB = 32, 8, 512  # 256 tokens a worker and step
HELD_OUT = 128  # windows
MODEL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
    "attn_implementation": "eager",  # the only one that vmap has a rule for
}


@dataclass(frozen=True)
class Text:
    """A Llama of 42 thousand parameters on text of this machine; 256 tokens a worker and step. Loss in nats.

    Attributes:
        workers: how many.
        kinds: which kind of text each worker reads, in order; one for all workers where it is one. The
            held-out text has the kinds in the same shares.
        one_file: a worker that reads the first 20,000 tokens only, again and again.
    """

    workers: int
    kinds: tuple[str, ...] = ("python",)
    one_file: int | None = None

    def problem(self, seed: int, faults: tuple[Fault, ...]) -> Problem:
        return TextProblem(self, seed, faults)


class TextProblem:
    def __init__(self, task: Text, seed: int, faults: tuple[Fault, ...]) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        kinds = task.kinds * (task.workers if len(task.kinds) == 1 else 1)
        own = {kind: [worker for worker in range(task.workers) if kinds[worker] == kind] for kind in kinds}
        self.windows: list[TrainingWindows] = [
            self._windows(task, seed, worker, own[kinds[worker]], kinds[worker], faults)
            for worker in range(task.workers)
        ]
        held_out = [validation_windows(kind, HELD_OUT * len(own[kind]) // task.workers) for kind in own]
        self.held_out = torch.cat(held_out)
        torch.manual_seed(seed)
        self.module = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **MODEL))
        self.module.config.use_cache = False

    @staticmethod
    def _windows(
        task: Text, seed: int, worker: int, readers: list[int], kind: str, faults: tuple[Fault, ...]
    ) -> TrainingWindows:
        """Those of a worker, which shares the text of its kind with others."""
        tokens_N, place, num_readers = tokens(kind).train_N, readers.index(worker), len(readers)
        if worker == task.one_file:
            tokens_N, place, num_readers = tokens_N[:20_000], 0, 1
        windows = TrainingWindows(tokens_N, LENGTH, SEQUENCES, 1, place, num_readers, seed)
        own = [fault for fault in faults if fault.replica == worker]
        if not own:
            return windows
        faulty = with_faults(TrainingWindows(**{**vars(windows), "rank": worker}), own, VOCAB)
        faulty.rank = place
        return faulty

    def batch(self, step: int) -> Batch:
        return (torch.stack([windows.batch(step, 0) for windows in self.windows]),)

    def losses(self, views: dict[str, Tensor], batch: Batch) -> Tensor:
        return vmap(self._loss)(views, *batch)

    def _loss(self, views: dict[str, Tensor], batch_BT: Tensor) -> Tensor:
        logits = functional_call(self.module, views, (), {"input_ids": batch_BT}).logits
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, VOCAB).float(), batch_BT[:, 1:].reshape(-1)
        )

    def evaluate(self, views: dict[str, Tensor]) -> float:
        return float(self._loss(views, self.held_out))

    def learned(self, views: dict[str, Tensor]) -> float | None:
        return None


@cache
def tokens(kind: str) -> Tokens:
    """The tokens of a kind of text, made when first asked for."""
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: allowed are {', '.join(KINDS)}")
    prepare(kind, VOCAB)
    return open_tokens(folder(kind))


@cache
def validation_windows(kind: str, number: int) -> Tensor:
    """Held-out windows `[number, LENGTH]`."""
    (windows_NT,) = validation_batches(tokens(kind).validation_N, LENGTH, number, number, 0, 1)
    return windows_NT
