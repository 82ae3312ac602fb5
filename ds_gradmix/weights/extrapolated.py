"""The extrapolated weights of one worker: its parameters hold theta + delta while it trains, else theta.

One buffer of the parameters' size and dtype is enough, because parameters and buffer swap their contents:
exactly, and without another rank. Only gradients that come in several reductions a step need a second one.
"""

import enum
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_gradmix.comm.groups import RankGroup
from ds_gradmix.comm.workers import WorkerLevels
from ds_gradmix.ops import multi_tensor
from ds_gradmix.ops.segments import to_device
from ds_gradmix.rules import Extrapolation
from ds_gradmix.weights.gradient_window import GradientWindow, ParamLayout
from ds_gradmix.weights.offset import moved, seed_of

_CHUNK_ON_CPU, _CHUNK = 2**17, 2**24  # elements moved at a time; on a CPU what stays in its cache

# Where a worker stands in an optimizer step; `ExtrapolatedWeights` says what is true in each phase.
Phase = enum.Enum(
    "Phase", "NO_GRADIENT READY EXTRAPOLATED SET_ASIDE REDUCING REDUCING_WITHOUT_OFFSET REDUCED"
)


class ShardInfo(NamedTuple):
    """What is known of parameters that several ranks of a replica keep, or have parts of."""

    labels: list[str]  # equal labels are given equal random numbers: what several ranks keep stays equal
    counts: list[bool]  # whether this rank's part is added to the norm of the parameter
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
        self.measure_every = 0  # steps between those whose offset is measured; 0 is never
        self._offset_ratio: Tensor | None = None
        self._layout = layout
        self._key = key
        self._shards = shards
        self._levels = levels
        self._num_replicas = 1 if levels is None else levels.num_replicas  # whose mean the gradient is
        self._order: list[list[int]] = [[] for _ in layout.flats]  # each group's parameters, as in memory
        for i, (group, _, _) in sorted(enumerate(layout.places), key=lambda place: place[1][1]):
            self._order[group].append(i)
        self._chunk = _CHUNK_ON_CPU if all(flat.is_cpu for flat in layout.flats) else _CHUNK
        self._buffer = layout.new_buffer()
        self._window = GradientWindow(layout, accumulates=accumulates) if rule.needs_gradient else None
        self._gradient_scale = 1.0
        self._reduced: set[int] = set()  # the reduced parameters in the two phases of a reduction, else none

    def extrapolate(self, step: int, learning_rates: Sequence[float]) -> None:
        """Training is about to use the parameters."""
        if self.phase is Phase.SET_ASIDE:
            self._swap(Phase.EXTRAPOLATED)
        elif self.phase is Phase.READY or (self.phase is Phase.NO_GRADIENT and self._window is None):
            self._add_offset(step, learning_rates)
            self.phase = Phase.EXTRAPOLATED
            if self._layout.flats and self.measure_every and (step + 1) % self.measure_every == 0:
                self._measure_offset()

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

    @torch.no_grad()
    def keep_gradients(self, indices: Sequence[int], parts: Sequence[Tensor], *, last: bool) -> None:
        """This worker's own flat gradients are about to be reduced; `last` at the accumulation boundary."""
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

    @torch.no_grad()
    def _add_offset(self, step: int, learning_rates: Sequence[float]) -> None:
        unit = self._gradient_scale if self.rule.needs_gradient else 1.0
        norms = self._norms() if self.rule.scale(0.0) is None and self._layout.places else []
        for group, (indices, learning_rate) in enumerate(zip(self._order, learning_rates, strict=True)):
            flat, kept = self._layout.flats[group], self._buffer[group]
            random = torch.Generator(flat.device)
            random.manual_seed(seed_of(self._key, step, str(group)))
            scale = self.rule.scale(learning_rate)
            if scale is not None and self._shards is None:
                self._add_to(flat, kept, scale / unit, random)
                continue
            scales: Sequence[float | Tensor] = [] if scale is None else [scale / unit] * len(indices)
            if norms:
                norms_P, past_norms_P, elements_P = norms[group]
                scales_P = self.rule.scales(norms_P, past_norms_P / unit, elements_P, learning_rate) / unit
                scales = scales_P.unbind()
            for i, part in zip(indices, scales, strict=True):
                if self._shards is not None:
                    random.manual_seed(seed_of(self._key, step, self._shards.labels[i]))
                _, begin, size = self._layout.places[i]
                self._add_to(flat.narrow(0, begin, size), kept.narrow(0, begin, size), part, random)

    @torch.no_grad()
    def _measure_offset(self) -> None:
        """The length of the offset by that of the weights, of what this rank has."""
        squares_2 = torch.zeros(2, dtype=torch.float64, device=self._layout.flats[0].device)
        for flat, kept in zip(self._layout.flats, self._buffer, strict=True):
            for ours, theirs in zip(flat.split(self._chunk), kept.split(self._chunk), strict=True):
                parts = (ours.float() - theirs.float(), theirs)
                squares_2 += torch.stack([torch.linalg.vector_norm(part).double() for part in parts]).square()
        self._offset_ratio = (squares_2[0] / squares_2[1]).sqrt()

    @property
    def offset_ratio(self) -> float | None:
        """The last that was measured; the host waits for the device here."""
        return None if self._offset_ratio is None else float(self._offset_ratio)

    def _add_to(self, weights: Tensor, past: Tensor, scale: float | Tensor, random: torch.Generator) -> None:
        """Move a stretch of memory with one scale, by its past gradients, which the weights replace."""
        for ours, kept in zip(weights.split(self._chunk), past.split(self._chunk), strict=True):
            ahead = moved(self.rule, ours, kept, scale, random)
            kept.copy_(ours)
            ours.copy_(ahead)

    def _norms(self) -> list[Tensor]:
        """For each group `[3, P]`: every parameter's norm, that of its past gradient, and its elements."""
        order = [i for indices in self._order for i in indices]
        pair = (self._layout.views(flats, order) for flats in (self._layout.flats, self._buffer))
        rows = [multi_tensor.norms(tensors).double().square() for tensors in pair]
        sizes = [self._layout.places[i][2] for i in order]
        counts = [self._shards is None or self._shards.counts[i] for i in order]
        elements_P, counts_P = to_device(torch.tensor([sizes, counts], dtype=torch.float64), rows[0].device)
        total_3P = torch.stack([*rows, elements_P]).mul_(counts_P)
        if self._shards is not None and self._shards.group is not None:
            self._shards.group.all_reduce_identical(total_3P)
        total_3P[:2].sqrt_()
        return list(total_3P.float().split([len(indices) for indices in self._order], dim=1))

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
        """Load a checkpoint's state; False, and no offset for a step, if it is of other sizes."""
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
