"""Token files, and the windows of them that each rank reads at each step."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True)
class Tokens:
    """A folder made by prepare.py; `train_N` and `validation_N` are memory maps of token ids."""

    vocab_size: int
    sha256: str
    train_N: np.ndarray
    validation_N: np.ndarray


def open_tokens(folder: Path) -> Tokens:
    """Open a folder made by prepare.py; ValueError if it is not one."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        train_N, validation_N = (
            np.memmap(folder / f"{name}.bin", dtype=meta["dtype"], mode="r")
            for name in ("train", "validation")
        )
        return Tokens(meta["vocab_size"], meta["train_sha256"], train_N, validation_N)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--data {folder} is no folder made by prepare.py: {error}") from error


def window(tokens_N: np.ndarray, index: int, length: int) -> torch.Tensor:
    """Window `index` of the consecutive windows, as int64."""
    return torch.from_numpy(tokens_N[index * length : (index + 1) * length].astype(np.int64))


@dataclass
class TrainingWindows:
    """Every window once per epoch, in an order drawn for that epoch, as a function of the step.

    There is no state between calls (the permutation is only a cache), so a resumed run continues exactly
    where the interrupted one stopped. No two ranks read the same window in an epoch, and with the same global
    batch the order does not depend on the number of ranks.
    """

    tokens_N: np.ndarray
    length: int
    batch_size: int
    accumulation_steps: int
    rank: int
    world_size: int
    seed: int
    _cached: tuple[int, np.ndarray] | None = field(default=None, repr=False)

    def batch(self, step: int, micro_step: int) -> torch.Tensor:
        """The windows of a micro-step of a step, both counted from 0: [batch_size, length] int64."""
        batch = (step * self.accumulation_steps + micro_step) * self.world_size + self.rank
        first = batch * self.batch_size
        return torch.stack([self._read(first + i) for i in range(self.batch_size)])

    def _read(self, position: int) -> torch.Tensor:
        epoch, index = divmod(position, len(self.tokens_N) // self.length)
        return window(self.tokens_N, int(self._order(epoch)[index]), self.length)

    def _order(self, epoch: int) -> np.ndarray:
        if self._cached is None or self._cached[0] != epoch:
            generator = np.random.default_rng((self.seed, epoch))
            self._cached = epoch, generator.permutation(len(self.tokens_N) // self.length)
        return self._cached[1]


def validation_batches(
    tokens_N: np.ndarray, length: int, batch_size: int, num_windows: int, rank: int, world_size: int
) -> list[torch.Tensor]:
    """This rank's part of `num_windows` windows that are spread evenly over the held-out tokens.

    The number is rounded so that every rank has equally many full batches, since under ZeRO-3 each forward
    pass communicates.
    """
    available = len(tokens_N) // length
    num_batches = max(1, min(num_windows, available) // (batch_size * world_size))
    total = num_batches * batch_size * world_size
    chosen = [i * available // total for i in range(total)][rank::world_size]
    windows_NT = torch.stack([window(tokens_N, index, length) for index in chosen])
    return list(windows_NT.split(batch_size))
