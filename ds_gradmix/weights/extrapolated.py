"""The extrapolated weights of one worker: its parameters hold theta + delta while it trains, else theta.

One buffer of the parameters' size and dtype is enough, because parameters and buffer swap their contents:
exactly, and without another rank. Only gradients that come in several reductions a step need a second one.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_gradmix.comm.groups import RankGroup
from ds_gradmix.comm.workers import WorkerLevels
from ds_gradmix.ops import multi_tensor
from ds_gradmix.ops.rounding import round_stochastically
from ds_gradmix.ops.segments import to_device
from ds_gradmix.rules import Extrapolation
from ds_gradmix.weights.gradient_window import GradientWindow, ParamLayout

_CHUNK_ON_CPU, _CHUNK = 2**17, 2**24  # elements moved at a time; on a CPU what stays in its cache


class Phase(enum.Enum):
    """Where a worker stands in an optimizer step; `ExtrapolatedWeights` says what is true in each phase."""

    NO_GRADIENT = enum.auto()
    READY = enum.auto()
    EXTRAPOLATED = enum.auto()
    SET_ASIDE = enum.auto()
    REDUCING = enum.auto()
    REDUCING_WITHOUT_OFFSET = enum.auto()
    REDUCED = enum.auto()


class ShardInfo(NamedTuple):
    """What is known of parameters that several ranks of a replica keep, or have parts of."""

    labels: list[str]  # equal labels are given equal random numbers: what several ranks keep stays equal
    counts: list[bool]  # whether this rank's part is added to the norm of the whole
    group: RankGroup | None  # the ranks with parts


class ExtrapolatedWeights:
    """Parameters at a worker's extrapolated point.

        phase                    parameters     buffer         calls that change the phase
        NO_GRADIENT              theta          unused         extrapolate, if the rule needs no gradient
        READY                    theta          last gradient  extrapolate
        EXTRAPOLATED             theta + delta  theta          set_aside, undo
        SET_ASIDE                theta          theta + delta  extrapolate, undo
        REDUCING                 theta + delta  theta          set_aside, recover, undo, end_backward
          where reduced          theta          gradient
        REDUCING_WITHOUT_OFFSET  theta          gradient       set_aside, recover, end_backward
        REDUCED                  theta          gradient       post_step

    In every phase keep_gradients(last=True) leads to REDUCING, or to REDUCING_WITHOUT_OFFSET if there is no
    offset; end_backward(last=True) to REDUCED, or to NO_GRADIENT if a part of the gradient was lost; drop,
    forget and post_step(keep=False) to NO_GRADIENT. The calls above show in the middle of a reduction that it
    broke off, and lead to NO_GRADIENT, as does post_step(keep=True) there and where there is an offset. All
    others leave the phase as it is. If the rule needs no gradient, the buffer has none, and READY does not
    occur; if gradients are added up in a second buffer, they are there until end_backward.

    Args:
        rule: the offset.
        layout: the parameters.
        key: seed and number of the worker, for what is drawn at random.
        accumulates: whether gradients of one step come in several reductions.
        shards: if several ranks of a replica keep a parameter, or have parts of it.
        levels: if a worker has several ranks.
    """

    def __init__(
        self,
        rule: Extrapolation,
        layout: ParamLayout,
        key: tuple[int, int],
        *,
        accumulates: bool,
        shards: ShardInfo | None = None,
        levels: WorkerLevels | None = None,
    ) -> None:
        self.rule = rule
        self.phase = Phase.NO_GRADIENT
        self._layout = layout
        self._key = key
        self._shards = shards
        self._levels = levels
        self._num_replicas = 1 if levels is None else levels.num_replicas  # whose mean the gradient is
        # Of each group, in the order of memory: where a parameter begins, its elements, and which it is.
        self._order: list[list[tuple[int, int, int]]] = [[] for _ in layout.flats]
        for i, (group, begin, size) in sorted(enumerate(layout.places), key=lambda place: place[1][1]):
            self._order[group].append((begin, size, i))
        on_cpu = all(flat.device.type == "cpu" for flat in layout.flats)
        self._chunk = _CHUNK_ON_CPU if on_cpu else _CHUNK
        self._buffer = layout.new_buffer()
        self._window = GradientWindow(layout, accumulates=accumulates) if rule.needs_gradient else None
        self._gradient_scale = 1.0
        self._reduced: set[int] = set()  # the reduced parameters in the two phases of a reduction, else none

    # --- training and everything else ---

    def extrapolate(self, step: int, learning_rates: Sequence[float]) -> None:
        """Training is about to use the parameters."""
        if self.phase is Phase.SET_ASIDE:
            self._swap(Phase.EXTRAPOLATED)
        elif self.phase is Phase.READY or (self.phase is Phase.NO_GRADIENT and self._window is None):
            self._add_offset(step, learning_rates)
            self.phase = Phase.EXTRAPOLATED

    def set_aside(self) -> None:
        """Something other than training is about to see the parameters."""
        self.recover()
        if self.phase is Phase.EXTRAPOLATED:
            self._swap(Phase.SET_ASIDE)

    def recover(self) -> None:
        """A forward begins, so a reduction that has not ended broke off with an exception."""
        if self.phase in (Phase.REDUCING, Phase.REDUCING_WITHOUT_OFFSET):
            self.drop()

    def undo(self) -> None:
        """Drop the offset if there is one; the gradient of a step that is reduced already stays."""
        if self.phase in (Phase.EXTRAPOLATED, Phase.SET_ASIDE, Phase.REDUCING):
            self.drop()

    def drop(self) -> None:
        """Forget the offset, and the gradient it would come from; the parameters hold theta afterwards."""
        self._return_theta(range(len(self._layout.places)))
        self.forget()

    def forget(self) -> None:
        """The same where somebody else has just written the parameters."""
        self.phase = Phase.NO_GRADIENT
        self._reduced.clear()
        if self._window is not None:
            self._window.clear(in_step=True)

    @torch.no_grad()
    def _swap(self, phase: Phase) -> None:
        for flat, kept in zip(self._layout.flats, self._buffer, strict=True):
            for ours, theirs in zip(flat.split(self._chunk), kept.split(self._chunk), strict=True):
                before = ours.clone()
                ours.copy_(theirs)
                theirs.copy_(before)
        self.phase = phase

    # --- gradients ---

    @torch.no_grad()
    def keep_gradients(self, indices: Sequence[int], parts: Sequence[Tensor], *, last: bool) -> None:
        """These parameters' gradients, flat and still this worker's own, are about to be reduced. `last` says
        that it is the gradient accumulation boundary, where nothing needs the parameters any more.
        """
        if not indices:
            return
        if last:
            self._return_theta(indices)
            has_offset = self.phase in (Phase.EXTRAPOLATED, Phase.REDUCING)
            self.phase = Phase.REDUCING if has_offset else Phase.REDUCING_WITHOUT_OFFSET
            self._reduced.update(indices)
        if self._window is not None:
            self._window.add(indices, parts, self._buffer, last=last)

    @torch.no_grad()
    def end_backward(self, *, last: bool, gradient_scale: float) -> None:
        """All gradients of a backward pass are reduced; `last` as in `keep_gradients`."""
        if not last:
            self.recover()
            return
        missing = self._return_theta(range(len(self._layout.places)))
        complete = True
        if self._window is not None:
            self._buffer, complete = self._window.finish(self._buffer, missing)
            if self._levels is not None:
                for flat in self._buffer:
                    self._levels.intra.all_reduce(flat.div_(self._num_replicas))
        self._gradient_scale = gradient_scale
        self._reduced.clear()
        self.phase = Phase.REDUCED if complete else Phase.NO_GRADIENT

    def post_step(self, *, keep: bool) -> None:
        """The optimizer has taken the step, or skipped it; without `keep` the next step has no offset."""
        if not keep:
            self.drop()
        elif self.phase is Phase.REDUCED:
            self.phase = Phase.NO_GRADIENT if self._window is None else Phase.READY
        elif self.phase not in (Phase.NO_GRADIENT, Phase.READY):
            self.forget()

    @torch.no_grad()
    def _return_theta(self, indices: Iterable[int]) -> list[int]:
        """Give theta back to those of the parameters that are not reduced; which these are."""
        rest = [i for i in indices if i not in self._reduced]
        if rest and self.phase in (Phase.EXTRAPOLATED, Phase.REDUCING):
            ours, kept = (self._layout.views(flats, rest) for flats in (self._layout.flats, self._buffer))
            torch._foreach_copy_(ours, kept)
        return rest

    # --- the offset ---

    @torch.no_grad()
    def _add_offset(self, step: int, learning_rates: Sequence[float]) -> None:
        norms = [None] * len(self._order) if self.rule.scale(0.0) is not None else self._norms()
        for group, (rate, norms_3P) in enumerate(zip(learning_rates, norms, strict=True)):
            self._add_to_group(group, step, rate, norms_3P)

    def _add_to_group(self, group: int, step: int, learning_rate: float, norms_3P: Tensor | None) -> None:
        flat, kept = self._layout.flats[group], self._buffer[group]
        random = torch.Generator(flat.device)
        random.manual_seed(self._seed(step, str(group)))
        for begin, size, scale, label in self._spans(group, learning_rate, norms_3P):
            if label is not None:
                random.manual_seed(self._seed(step, label))
            for first in range(begin, begin + size, self._chunk):
                length = min(self._chunk, begin + size - first)
                weights, past = flat.narrow(0, first, length), kept.narrow(0, first, length)
                # A product and a sum, each rounded by itself: equal elements stay equal wherever they lie.
                moved = self.rule.direction(past, random).float().mul(scale).add_(weights)
                if weights.dtype == torch.float16:  # where a sum of scaled gradients may have left the range
                    moved = torch.where(moved.isfinite(), moved, weights.float())
                past.copy_(weights)
                weights.copy_(round_stochastically(moved, weights.dtype, random))

    def _spans(
        self, group: int, learning_rate: float, norms_3P: Tensor | None
    ) -> Iterator[tuple[int, int, float | Tensor, str | None]]:
        """Stretches of the group's memory with one scale, and the label of what is random in them."""
        unit = self._gradient_scale if self.rule.needs_gradient else 1.0
        scale = self.rule.scale(learning_rate)
        places = self._order[group]
        if scale is not None and self._shards is None:
            yield 0, self._layout.flats[group].numel(), scale / unit, None
            return
        scales: Sequence[float | Tensor] = [scale / unit] * len(places) if scale is not None else []
        if norms_3P is not None and places:
            norms_P, past_norms_P, elements_P = norms_3P
            scales_P = self.rule.scales(norms_P, past_norms_P / unit, elements_P, learning_rate) / unit
            scales = scales_P.unbind()
        for (begin, size, i), part in zip(places, scales, strict=True):
            yield begin, size, part, None if self._shards is None else self._shards.labels[i]

    def _norms(self) -> list[Tensor]:
        """For each group `[3, P]`: every whole parameter's norm, that of its past gradient, its elements."""
        sums = []
        for places, *pair in zip(self._order, self._layout.flats, self._buffer, strict=True):
            rows = [torch.zeros(0, dtype=torch.float64, device=pair[0].device)] * 2
            for row, flat in enumerate(pair if places else ()):
                parts = [flat.narrow(0, begin, size) for begin, size, _ in places]
                rows[row] = multi_tensor.norms(parts).double().square()
            counts = [self._shards is None or self._shards.counts[i] for _, _, i in places]
            known_2P = torch.tensor([[size for _, size, _ in places], counts], dtype=torch.float64)
            elements_P, counts_P = to_device(known_2P, rows[0].device)
            sums.append(torch.stack([*rows, elements_P]).mul_(counts_P))
        total_3P = torch.cat(sums, dim=1)
        if self._shards is not None and self._shards.group is not None:
            self._shards.group.all_reduce_identical(total_3P)
        total_3P[:2].sqrt_()
        return list(total_3P.float().split([len(places) for places in self._order], dim=1))

    def _seed(self, step: int, label: str) -> int:
        words = ",".join(map(str, (*self._key, step, label)))
        return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little") >> 1

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs; the parameters hold theta afterwards."""
        self.set_aside()
        is_empty = self._window is None or self.phase is Phase.NO_GRADIENT
        return {
            "set_aside": self.phase is Phase.SET_ASIDE,
            "gradient_scale": self._gradient_scale,
            "replicas": self._num_replicas,
            "buffers": [] if is_empty else self._buffer,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> bool:
        """Take over a checkpoint's state; False, and no offset for one step, if it is of other sizes, or of
        workers of another size.
        """
        self.forget()
        if self._window is None:
            return True
        self._window.clear(in_step=False)
        if not saved["buffers"]:
            return True
        sizes, expected = ([flat.numel() for flat in flats] for flats in (saved["buffers"], self._buffer))
        if sizes != expected or saved["replicas"] != self._num_replicas:
            return False
        for flat, loaded in zip(self._buffer, saved["buffers"], strict=True):
            flat.copy_(loaded)
        self._gradient_scale = saved["gradient_scale"]
        self.phase = Phase.SET_ASIDE if saved["set_aside"] else Phase.READY
        return True
