"""What every seam does, whichever optimizer DeepSpeed builds: the rules of an engine, and the course of a
step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_gradmix.comm.consistency import fingerprint_of
from ds_gradmix.comm.groups import ranks_of
from ds_gradmix.comm.workers import ParallelGroups
from ds_gradmix.config import GradmixConfig
from ds_gradmix.engines.parallel_groups import is_partitioned, params_of, reducers_of, shard_info
from ds_gradmix.exchange import state as checkpoint
from ds_gradmix.exchange.factor_momentum import FactorMomentum
from ds_gradmix.exchange.plan import Piece, even_sizes, share_evenly
from ds_gradmix.exchange.reducer import ParamSpan, Reduction, is_stock
from ds_gradmix.exchange.steps import Steps
from ds_gradmix.exchange.tiled_buffer import CommDtypes
from ds_gradmix.log import logger
from ds_gradmix.weights.extrapolated import ExtrapolatedWeights

_FINGERPRINTS_KEPT = 4096
_ADVICE = (
    "every worker must have the same gradients, of the same shapes, in the same order; look for "
    "parameters that only some workers use, say behind a branch on the data"
)
_UNEVEN = (
    "; or a tensor-parallel rank has larger parts than another, and fills buckets sooner: raise "
    "zero_optimization.reduce_bucket_size"
)

Named = Sequence[tuple[str, torch.nn.Parameter]]


class Seam:
    """A block at work in one engine.

    Args:
        block: the rules.
        place: this rank's.
        named: the optimizer's parameters, which are known by their position here.
        owned: elements this rank owns in each of the optimizer's parameter groups.
        device: where gradients are.
        step: tells the optimizer steps taken so far, skipped ones included.
        report: is told after each step what the rules decided in it.
    """

    def __init__(
        self,
        block: GradmixConfig,
        place: ParallelGroups,
        named: Named,
        owned: Sequence[int],
        device: torch.device,
        step: Callable[[], int],
        report: Callable[[Mapping[str, float]], None],
    ) -> None:
        self.block = block
        self.place = place
        self.named = list(named)
        self.lookahead: ExtrapolatedWeights | None = None
        self.loads = 0  # checkpoints loaded with optimizer states
        self.layout = 0  # a number for where parameters lie, which all state depends on
        self._device = device
        self._step = step
        self._report = report
        self._steps = Steps(
            block, place.workers, place.model, owned, device, alike=place.decisions_are_global
        )
        parameters = params_of(place, named)
        self._dense = Reduction(block, place.workers, self._steps, parameters, device)
        self._by_ranks = {
            ranks: Reduction(
                block, workers, self._steps, parameters, device, workers.size / place.workers.size
            )
            for ranks, workers in place.experts.items()
        }
        self._by_ranks[ranks_of(place.workers.group)] = self._dense
        self._shares = [reducers_of(place, p).size / place.workers.size for _, p in named]
        positions = {id(p): i for i, (_, p) in enumerate(named)}
        self._tied = [(positions[id(p)], copies) for p, copies in place.tied if id(p) in positions]
        # Of gradients that are combined as a whole: a number after those of the optimizer's parameter groups.
        self._wholes: dict[tuple[ParamSpan, ...], int] = {}
        self._num_groups = len(owned)
        self._reduced: set[int] = set()  # tied parameters whose gradient is combined in this backward
        self._fingerprints: dict[tuple[str, tuple[ParamSpan, ...]], int] = {}

    @property
    def is_stock(self) -> bool:
        """Whether DeepSpeed's own reduction is all there is to do."""
        return is_stock(self.block, self.place.workers.size) and not self.place.sum_sequence_ranks

    @property
    def exchanges(self) -> bool:
        """Whether buckets are exchanged; if not, they are weighed and summed by DeepSpeed."""
        return not self.is_stock and self._dense.exchanges

    @property
    def numbers(self) -> Mapping[str, float]:
        """What was decided in the last step."""
        return self._steps.numbers

    @property
    def smoothing(self) -> FactorMomentum | None:
        """State of a smoothed scaling rule."""
        return self._steps.smoothing

    def reduction_over(self, group: dist.ProcessGroup | None) -> Reduction:
        """The rules at work over a process group: the data-parallel one, or one of experts."""
        return self._by_ranks[ranks_of(group)]

    def agree(self, spans: tuple[ParamSpan, ...], occasion: str) -> None:
        """Raise `MismatchError` on every rank unless all are about to reduce these gradients."""

        def words() -> list[str]:
            return [f"{self.named[span.parameter][0]} ({self._size(span)})" for span in spans]

        key = (occasion, spans)
        if key not in self._fingerprints:
            if len(self._fingerprints) > _FINGERPRINTS_KEPT:
                self._fingerprints.clear()
            self._fingerprints[key] = fingerprint_of([occasion, *words()])
        advice = _ADVICE if self.place.tensor is None else _ADVICE + _UNEVEN
        self.place.consistency.check_equal(self._fingerprints[key], words, occasion, advice)

    def _size(self, span: ParamSpan) -> str:
        divided = self.place.tensor is not None and is_partitioned(self.named[span.parameter][1])
        return "a part of it" if divided else f"{span.length} elements"

    # --- one backward ---

    def begin(self) -> None:
        """A reduction is about to start."""
        self._steps.step = self._step()

    def add_up(self, grads: Sequence[Tensor]) -> None:
        """Sum gradients over the sequence ranks of a replica, in place, where DeepSpeed would not."""
        if not self.place.sum_sequence_ranks or self.place.sequence is None:
            return
        waiting: list[Tensor] = []
        for grad in [*grads, None]:
            size = sum(other.nbytes for other in waiting)
            if waiting and (grad is None or grad.dtype != waiting[0].dtype or size >= self.block.tile_bytes):
                flat_N = torch.cat([other.reshape(-1) for other in waiting])
                self.place.sequence.all_reduce(flat_N)
                parts = flat_N.split([other.numel() for other in waiting])
                for other, part in zip(waiting, parts, strict=True):
                    other.copy_(part.view_as(other))
                waiting = []
            if grad is not None:
                waiting.append(grad)

    def capture(self, spans: Sequence[ParamSpan], flat_N: Tensor, *, boundary: bool) -> None:
        """Before anything happens to a bucket: the worker's own gradient is what it looks ahead by."""
        if self.lookahead is not None:
            own = [span for span in spans if span.parameter not in self._reduced]
            parts = [span.of(flat_N) for span in own]
            # What data ranks with the same expert have in common is the mean of theirs.
            shares = [self._shares[span.parameter] for span in own]
            parts = [
                part if share == 1.0 else part * share for part, share in zip(parts, shares, strict=True)
            ]
            self.lookahead.capture([span.parameter for span in own], parts, boundary=boundary)

    @property
    def awaits_the_model(self) -> bool:
        """Whether the buckets to come need a decision for the whole model."""
        return self.exchanges and self._dense.awaits_the_model

    @property
    def ties(self) -> set[int]:
        """The parameters that `prepare` combines."""
        return set() if self.is_stock else {index for index, _ in self._tied}

    def prepare(
        self,
        grads: Sequence[tuple[int, Tensor]],
        wire: CommDtypes,
        gather: Callable[[], Sequence[Tensor]] | None = None,
    ) -> None:
        """Before the first of a step's buckets, where all gradients are known: what concerns all of them.

        Decides for the model, where that is the scope. Then combines tied parameters, on the first of the
        pipeline stages that keep them, and copies the result to the others: what stages keep in common must
        stay equal, but each reduces its own buckets, with other parameters in them.

        Args:
            grads: position and gradient of every parameter with one; tied ones are summed over their stages,
                and are replaced by their combination.
            wire: the dtypes in which numbers travel.
            gather: calls `gather_whole` for all buckets, without tied parameters, and tells what it
                returned, if they hold what they are to be reduced with already.
        """
        if self.is_stock:
            return
        if self.awaits_the_model:
            spans = tuple(ParamSpan(index, 0, grad.numel()) for index, grad in grads)
            self.agree(spans, "gradient reduction for the model")
            own = [(index, grad.detach()) for index, grad in grads]
            ties = self.ties
            alone = own if gather is None else [(index, grad) for index, grad in own if index in ties]
            self._dense.decide_for_model(own, alone, wire, self.place.model, self._device, gather)
        found = dict(grads)
        for index, copies in self._tied:
            if index not in found:
                continue
            grad = found[index].detach()
            flat_N = grad.reshape(-1)
            span = ParamSpan(index, 0, flat_N.numel())
            self.capture([span], flat_N, boundary=True)
            if copies.is_source:
                self._combine_whole(flat_N, (span,), wire)
            copies.copy(flat_N)
            if flat_N.data_ptr() != grad.data_ptr():
                grad.copy_(flat_N.view_as(grad))
            self._reduced.add(index)

    def remaining(self, spans: Sequence[ParamSpan]) -> tuple[ParamSpan, ...]:
        """Those whose gradient is not combined yet."""
        return tuple(span for span in spans if span.parameter not in self._reduced)

    def combined(self, spans: Sequence[ParamSpan]) -> tuple[ParamSpan, ...]:
        """Those whose gradient is."""
        return tuple(span for span in spans if span.parameter in self._reduced)

    def keep_once(self, spans: Sequence[ParamSpan], flat_N: Tensor) -> None:
        """What is combined already survives a sum over the workers: it is zero on all but one rank."""
        if self.place.workers.rank != 0:
            for span in self.combined(spans):
                span.of(flat_N).zero_()

    def _combine_whole(self, flat_N: Tensor, spans: tuple[ParamSpan, ...], wire: CommDtypes) -> None:
        """Combine gradients such that every worker has all of the result."""
        if self.exchanges:
            self.exchange_whole(self._dense, flat_N, spans, wire)
            return
        self._dense.weigh(flat_N, spans)
        self.place.workers.all_reduce(flat_N)

    def exchange_whole(
        self, reduction: Reduction, flat_N: Tensor, spans: tuple[ParamSpan, ...], wire: CommDtypes
    ) -> None:
        """Exchange a bucket that nobody owns; every rank ends with the same result."""
        group = self._group_of(spans)
        size, rank = reduction.workers.num_ranks, reduction.workers.rank
        if self.smoothing is not None:
            total = sum(span.length for span in spans)
            self.smoothing.reserve(group, even_sizes(total, size)[rank])
        reduction.exchange(flat_N, spans, lambda: _shares_of(spans, size, group), wire, whole=True)

    def gather_whole(self, flat_N: Tensor, spans: tuple[ParamSpan, ...], wire: CommDtypes) -> Tensor:
        """The first half of `exchange_whole`, from which a decision for the model is made."""
        group, size = self._group_of(spans), self._dense.workers.num_ranks
        return self._dense.gather_whole(flat_N, spans, lambda: _shares_of(spans, size, group), wire)

    def _group_of(self, spans: tuple[ParamSpan, ...]) -> int:
        """What state of a bucket is kept by: a bucket of another composition is another one."""
        return self._num_groups + self._wholes.setdefault(spans, len(self._wholes))

    def end_backward(self, *, boundary: bool, gradient_scale: float) -> None:
        """All gradients of a backward pass are reduced; all ranks must have come to it."""
        self.agree((), "end of the backward pass")
        self._dense.end_backward()
        self._reduced.clear()
        if self.lookahead is not None:
            self.lookahead.end_backward(boundary=boundary, gradient_scale=gradient_scale)

    # --- one step ---

    def finish(self) -> bool:
        """The optimizer is about to step: whether it has to skip, because no worker agreed."""
        self.agree((), "optimizer step")
        return not self.is_stock and self._steps.finish()

    def settle(self, *, taken: bool) -> None:
        """The optimizer has taken the step, or left it out."""
        self._steps.settle(taken=taken)
        if self.lookahead is not None:
            self.lookahead.end_step()
            if not taken or self.numbers.get("dropped_workers", 0.0) > 0:
                self.lookahead.drop()
        self._report(self.numbers)

    # --- the look-ahead point ---

    def look_ahead(
        self,
        flats: Sequence[Tensor],
        places: Sequence[tuple[int, int, int]],
        rates: Callable[[], Sequence[float]],
        *,
        accumulates: bool,
    ) -> None:
        """Set up offsets, if the block has any; `rates` tells the learning rates of the flat tensors."""
        if self.block.extrapolation is not None:
            self._rates = rates
            self.lookahead = ExtrapolatedWeights(
                self.block.extrapolation,
                flats,
                places,
                (self.block.seed, self.place.workers.number),
                accumulates=accumulates,
                division=shard_info(self.place, self.named),
                team=self.place.workers.levels,
            )

    def go_ahead(self) -> None:
        """Training is about to use the parameters."""
        if self.lookahead is not None:
            self.lookahead.go_ahead(self._step(), self._rates())

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of a checkpoint."""
        return checkpoint.save(self.block, self.smoothing, self.lookahead, self.layout)

    def load(self, saved: dict[str, Any] | None, why: str) -> None:
        """Take over our state from a checkpoint, or start afresh with one warning; `why` there is none."""
        self.loads += 1
        warning = checkpoint.load(self.block, self.smoothing, self.lookahead, saved, self.layout, why)
        if warning and self.place.model.is_first:
            logger.warning(f"ds_gradmix: {warning}")


def _shares_of(spans: Sequence[ParamSpan], num_ranks: int, group: int) -> list[Piece]:
    return share_evenly([(span.start, span.length) for span in spans], num_ranks, group)
