"""The look-ahead point of one worker: parameters that hold theta + delta while it trains, and theta
otherwise.

One buffer of the parameters' size and dtype is enough, since it and the parameters exchange their contents:

    state       parameters      buffer
    EMPTY       theta           nothing
    GRADIENT    theta           the worker's gradient of the last step
    AHEAD       theta + delta   theta
    ASIDE       theta           theta + delta

The first training forward of a step moves GRADIENT to AHEAD. An evaluation or a save moves AHEAD to ASIDE and
the next training forward or backward moves back: exchanges, so both are exact, and local, so one rank may do
it alone. Where a step's gradients are reduced, each parameter gets theta back, and its place in the buffer
goes to the gradient. If reductions add up over several micro-steps (ZeRO-2), a second buffer collects the
gradient.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_gradmix.comm.groups import RankGroup
from ds_gradmix.comm.workers import WorkerLevels
from ds_gradmix.ops import multi_tensor
from ds_gradmix.ops.rounding import round_stochastically
from ds_gradmix.ops.segments import to_device
from ds_gradmix.rules import Extrapolation

_CHUNK_ON_CPU, _CHUNK = 2**17, 2**24  # elements moved at a time; on a CPU what stays in its cache


class State(enum.Enum):
    """What parameters and buffer hold; see the module."""

    EMPTY = "empty"
    GRADIENT = "gradient"
    AHEAD = "ahead"
    ASIDE = "aside"


class ShardInfo(NamedTuple):
    """What is known of parameters that several ranks of a replica keep, or have parts of."""

    labels: list[str]  # equal labels are given equal random numbers: what several ranks keep stays equal
    counts: list[bool]  # whether this rank's part is added to the norm of the whole
    circle: RankGroup | None  # the ranks with parts


class ExtrapolatedWeights:
    """Parameters at a worker's look-ahead point.

    Args:
        rule: the offset.
        flats: the parameters of each of the optimizer's groups, flat, in their own dtype.
        places: for every parameter its group, where it begins in the group's flat tensor, and its elements.
        key: seed and number of the worker, for what is drawn at random.
        accumulates: whether gradients of one step come in several reductions.
        division: of parameters over ranks, if they are.
        team: the ranks whose gradients make the worker's, if that is not this rank alone.
    """

    def __init__(
        self,
        rule: Extrapolation,
        flats: Sequence[Tensor],
        places: Sequence[tuple[int, int, int]],
        key: tuple[int, int],
        *,
        accumulates: bool,
        shards: ShardInfo | None = None,
        levels: WorkerLevels | None = None,
    ) -> None:
        self.rule = rule
        self.state = State.EMPTY
        self._flats = list(flats)
        self._places = list(places)
        self._division = shards
        self._team = levels
        # Of each group, in the order of memory: where a parameter begins, its elements, and which it is.
        self._order: list[list[tuple[int, int, int]]] = [[] for _ in flats]
        for i, (group, begin, size) in sorted(enumerate(places), key=lambda place: place[1][1]):
            self._order[group].append((begin, size, i))
        self._key = key
        on_cpu = all(flat.device.type == "cpu" for flat in flats)
        self._chunk = _CHUNK_ON_CPU if on_cpu else _CHUNK
        self._kept = [torch.zeros_like(flat) for flat in flats]
        self._sums = [torch.zeros_like(flat) for flat in flats] if accumulates and rule.needs_gradient else []
        self._gradient_scale = 1.0
        self._captured: set[int] = set()  # parameters whose gradient of the last reduction is in the buffer
        self._reduced = False  # the step's gradients are reduced, and the step is still to come
        self._collecting = False  # the second buffer holds a part of the window
        self._partial = False  # a part of the window was lost: its gradient is of no use

    # --- moving ---

    def extrapolate(self, step: int, learning_rates: Sequence[float]) -> None:
        """Training is about to use the parameters.

        Nothing happens once the step's gradients are reduced, or while they are: then parameters hold theta.
        """
        if self._captured or self._reduced:
            return
        if self.state is State.ASIDE:
            self._exchange(State.AHEAD)
        elif self.state is State.GRADIENT or (self.state is State.EMPTY and not self.rule.needs_gradient):
            with torch.no_grad():
                norms = [None] * len(self._flats) if self.rule.scale(0.0) is not None else self._norms()
                for group, rate in enumerate(learning_rates):
                    self._shift(group, step, rate, norms[group])
            self.state = State.AHEAD

    def set_aside(self) -> None:
        """Something other than training is about to see the parameters."""
        self.recover()
        if self.state is State.AHEAD:
            self._exchange(State.ASIDE)

    def recover(self) -> None:
        """For what cannot be in the middle of a backward pass. A step's last backward broke off between
        reductions: give the other parameters theta back.
        """
        if self._captured:
            self.drop()

    def drop(self) -> None:
        """Forget the offset, and the gradient it would come from; the parameters hold theta afterwards."""
        self._give_back()
        self.forget()

    def forget(self) -> None:
        """The same where somebody else has just written the parameters."""
        self._begin(State.EMPTY)
        self._partial, self._collecting = self._collecting, False
        for total in self._sums:
            total.zero_()

    def post_step(self, *, keep: bool) -> None:
        """The optimizer has taken the step: parameters are new, and may be moved."""
        self._reduced = False
        if not keep:
            self.drop()

    def undo(self) -> None:
        """Drop the offset."""
        if self.state in (State.AHEAD, State.ASIDE):
            self.drop()

    def _begin(self, state: State) -> None:
        self.state = state
        self._captured.clear()
        self._reduced = False

    def _exchange(self, state: State) -> None:
        with torch.no_grad():
            for flat, kept in zip(self._flats, self._kept, strict=True):
                for ours, theirs in zip(flat.split(self._chunk), kept.split(self._chunk), strict=True):
                    before = ours.clone()
                    ours.copy_(theirs)
                    theirs.copy_(before)
        self.state = state

    def _shift(self, group: int, step: int, learning_rate: float, norms_3P: Tensor | None) -> None:
        flat, kept = self._flats[group], self._kept[group]
        random = torch.Generator(flat.device)
        random.manual_seed(self._seed(step, str(group)))
        for begin, size, scale, label in self._spans(group, learning_rate, norms_3P):
            if label is not None:
                random.manual_seed(self._seed(step, label))
            for first in range(begin, begin + size, self._chunk):
                length = min(self._chunk, begin + size - first)
                weights, past = flat.narrow(0, first, length), kept.narrow(0, first, length)
                # A product and a sum, each rounded by itself: equal elements stay equal wherever they lie.
                ahead = self.rule.direction(past, random).float().mul(scale).add_(weights)
                if weights.dtype == torch.float16:  # where a sum of scaled gradients may have left the range
                    ahead = torch.where(ahead.isfinite(), ahead, weights.float())
                past.copy_(weights)
                weights.copy_(round_stochastically(ahead, weights.dtype, random))

    def _spans(
        self, group: int, learning_rate: float, norms_3P: Tensor | None
    ) -> Iterator[tuple[int, int, float | Tensor, str | None]]:
        """Stretches of the group's memory with one scale, and the label of what is random in them."""
        unit = self._gradient_scale if self.rule.needs_gradient else 1.0
        scale = self.rule.scale(learning_rate)
        places = self._order[group]
        if scale is not None and self._division is None:
            yield 0, self._flats[group].numel(), scale / unit, None
            return
        scales: Sequence[float | Tensor] = [scale / unit] * len(places) if scale is not None else []
        if norms_3P is not None and places:
            norms_P, past_norms_P, elements_P = norms_3P
            scales_P = self.rule.scales(norms_P, past_norms_P / unit, elements_P, learning_rate) / unit
            scales = scales_P.unbind()
        for (begin, size, i), part in zip(places, scales, strict=True):
            yield begin, size, part, None if self._division is None else self._division.labels[i]

    def _norms(self) -> list[Tensor]:
        """For each group `[3, P]`: every whole parameter's norm, that of its past gradient, its elements."""
        sums, counts = [], []
        for group, places in enumerate(self._order):
            rows = [torch.zeros(0, dtype=torch.float64, device=self._flats[group].device)] * 3
            for row, flat in enumerate((self._flats[group], self._kept[group]) if places else ()):
                parts = [flat.narrow(0, begin, size) for begin, size, _ in places]
                rows[row] = multi_tensor.norms(parts).double().square()
            elements_P = torch.tensor([float(size) for _, size, _ in places], dtype=torch.float64)
            sums.append(torch.stack([*rows[:2], to_device(elements_P, rows[0].device)]))
            if self._division is not None:
                counts += [float(self._division.counts[i]) for _, _, i in places]
        total_3P = torch.cat(sums, dim=1)
        if self._division is not None and self._division.circle is not None:
            total_3P *= to_device(torch.tensor(counts, dtype=torch.float64), total_3P.device)
            self._division.circle.all_reduce_identical(total_3P)
        total_3P[:2].sqrt_()
        return list(total_3P.float().split([len(places) for places in self._order], dim=1))

    def _seed(self, step: int, label: str) -> int:
        words = ",".join(map(str, (*self._key, step, label)))
        return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little") >> 1

    # --- gradients ---

    def keep_gradients(self, indices: Sequence[int], parts: Sequence[Tensor], *, last: bool) -> None:
        """These parameters' gradients are about to be reduced, and nothing of this step needs the parameters.

        Args:
            indices: which parameters.
            parts: their gradients, flat, still this worker's own.
            boundary: whether it is the last reduction of the step.
        """
        if not indices:
            return
        with torch.no_grad():
            if not last and self.rule.needs_gradient and not self._sums:  # boundaries set by hand
                self._sums = [torch.zeros_like(flat) for flat in self._flats]
            if self._sums:
                self._collecting = True
                multi_tensor.axpby_(1.0, parts, 1.0, self._views(self._sums, indices))
            if not last:
                return
            if self.state is State.AHEAD:
                torch._foreach_copy_(self._views(self._flats, indices), self._views(self._kept, indices))
            if self.rule.needs_gradient and not self._sums:
                torch._foreach_copy_(self._views(self._kept, indices), list(parts))
            self._captured.update(indices)

    def end_backward(self, *, last: bool, gradient_scale: float) -> None:
        """All gradients of a backward pass are reduced."""
        if not last:
            self._captured.clear()
            return
        self._give_back()
        if self._sums:
            self._kept, self._sums = self._sums, self._kept
            for total in self._sums:
                total.zero_()
        if self._team is not None and self.rule.needs_gradient:
            for kept in self._kept:
                self._team.intra.all_reduce(kept.div_(self._team.num_replicas))
        self._gradient_scale = gradient_scale
        self._begin(State.GRADIENT if self.rule.needs_gradient and not self._partial else State.EMPTY)
        self._reduced, self._partial, self._collecting = True, False, False

    def _give_back(self) -> None:
        """Parameters that were not captured get theta back, too, and count as having no gradient."""
        rest = [i for i in range(len(self._places)) if i not in self._captured]
        self._captured.clear()
        if not rest:
            return
        with torch.no_grad():
            if self.state is State.AHEAD:
                torch._foreach_copy_(self._views(self._flats, rest), self._views(self._kept, rest))
            torch._foreach_zero_(self._views(self._kept, rest))

    def _views(self, flats: Sequence[Tensor], indices: Sequence[int]) -> list[Tensor]:
        return [flats[g].narrow(0, begin, size) for g, begin, size in (self._places[i] for i in indices)]

    # --- checkpoints ---

    @property
    def _num_replicas(self) -> int:
        """Whose mean the gradient is."""
        return 1 if self._team is None else self._team.num_replicas

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs; the parameters hold theta afterwards."""
        self.set_aside()
        buffers = self._kept if self.rule.needs_gradient and self.state is not State.EMPTY else []
        return {
            "state": self.state.value,
            "gradient_scale": self._gradient_scale,
            "replicas": self._num_replicas,
            "buffers": buffers,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> bool:
        """Take over a checkpoint's state; False, and no offset for one step, if it is of other sizes, or of
        workers of another size.
        """
        self._begin(State.EMPTY)
        self._partial = self._collecting = False
        buffers = saved["buffers"]
        if not self.rule.needs_gradient or not buffers:
            return True
        if [kept.numel() for kept in self._kept] != [buffer.numel() for buffer in buffers]:
            return False
        if saved.get("replicas", 1) != self._num_replicas:
            return False
        for kept, buffer in zip(self._kept, buffers, strict=True):
            kept.copy_(buffer)
        self._gradient_scale = saved["gradient_scale"]
        self.state = State(saved["state"])
        return True
