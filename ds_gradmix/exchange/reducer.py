"""What happens to one bucket, whatever the engine: left to DeepSpeed, weighed and left to DeepSpeed, or
exchanged.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ds_gradmix.comm.groups import RankGroup
from ds_gradmix.comm.workers import WorkerGroup
from ds_gradmix.config import GradmixConfig
from ds_gradmix.exchange.exchange import Exchange, ExchangePlan
from ds_gradmix.exchange.plan import Piece
from ds_gradmix.exchange.steps import Steps
from ds_gradmix.exchange.tiled_buffer import CommDtypes
from ds_gradmix.ops.segments import Segments, to_device
from ds_gradmix.rules import GradientFreeMixing, Mean, MixingDecision, RngKey
from ds_gradmix.rules.apply import decide_without_gradients

_PLANS_KEPT = 1024  # compositions of buckets; they recur from step to step


class ParamSpan(NamedTuple):
    """A parameter's gradient in a bucket."""

    parameter: int  # position among the optimizer's parameters
    start: int
    length: int

    def of(self, flat_N: Tensor) -> Tensor:
        """The gradient, as a view."""
        return flat_N.narrow(0, self.start, self.length)


class ParamInfo(NamedTuple):
    """What the rules need to know of a parameter."""

    name: str
    draw: int  # which of the draws by parameter is its own: the same wherever in the model it lies
    counts: bool = True  # whether this rank adds it to inner products; of replicas exactly one does


def parameters_of(names: Sequence[str]) -> list[ParamInfo]:
    """Parameters of a model that is not divided."""
    order = {name: draw for draw, name in enumerate(sorted(set(names)))}
    return [ParamInfo(name, order[name]) for name in names]


def is_stock(block: GradmixConfig, num_workers: int) -> bool:
    """Whether DeepSpeed's own reduction is all there is to do."""
    trivial = isinstance(block.mixing, Mean) and block.scaling is None
    return num_workers == 1 or (trivial and block.nonfinite == "propagate")


class Reduction:
    """A block at work over a group of workers.

    Args:
        block: the rules.
        workers: who takes part.
        steps: the optimizer's steps; shared by all reductions of an optimizer.
        parameters: of the optimizer; gradients are known by their position here.
        device: where gradients are.
        share: what weights sum to. Experts are spread over several data-parallel ranks, and their gradient is
            the sum over a smaller group of workers, divided by the number of all.
    """

    def __init__(
        self,
        block: GradmixConfig,
        workers: WorkerGroup,
        steps: Steps,
        parameters: Sequence[ParamInfo],
        device: torch.device,
        share: float = 1.0,
    ) -> None:
        self.block = block
        self.workers = workers
        self._steps = steps
        self._parameters = list(parameters)
        self._num_draws = 1 + max((parameter.draw for parameter in parameters), default=0)
        self._share = share
        self._own_share = share / workers.replicas_per_worker  # of this rank's gradient in its worker's
        self._exchange = Exchange(workers, block, steps.record, steps.smoothing, share)
        self._everyone_W = torch.ones(workers.size, dtype=torch.bool, device=device)
        self._plans: OrderedDict[tuple[CommDtypes, bool, tuple[ParamSpan, ...]], ExchangePlan] = OrderedDict()
        self._drawn: tuple[int, npt.NDArray[np.float64]] | None = None
        self._for_model: tuple[MixingDecision, Tensor] | None = None
        self._last_tiles: dict[tuple[ParamSpan, ...], Tensor] = {}  # of gathered buckets

    @property
    def exchanges(self) -> bool:
        """Whether buckets are exchanged; if not, they are weighed and summed by DeepSpeed."""
        return self.block.exchanges

    @property
    def moment(self) -> RngKey:
        """Key of this step's draws."""
        return RngKey(self.block.seed, self._steps.step)

    def weigh(self, flat_N: Tensor, spans: Sequence[ParamSpan]) -> None:
        """Multiply this worker's gradients by its weights, in place, to be summed over the workers.

        One pass over the bucket; communicates only for `nonfinite: "drop"`, one number a worker.
        """
        present_W = self._present([span.of(flat_N) for span in spans], self.workers.decision_group)
        verdict = self._known(spans, present_W)
        counted = [self._parameters[span.parameter].counts for span in spans]
        lengths = [span.length if counts else 0 for span, counts in zip(spans, counted, strict=True)]
        one_row = len(verdict.weights_SW) == 1
        elements_S = (
            float(sum(lengths)) if one_row else to_device(torch.tensor(lengths).double(), flat_N.device)
        )
        self._steps.record.add_verdict(verdict, elements_S, present_W)
        if one_row and self.block.nonfinite == "propagate":
            weight = float(self._draw()[0, self.workers.number]) * self._own_share
            for begin, run in _runs(spans):
                flat_N.narrow(0, begin, sum(span.length for span in run)).mul_(weight)
            return
        weights_S = verdict.weights_SW[:, self.workers.number].float() * self._own_share
        first = 0
        for begin, run in _runs(spans):
            own_S = weights_S if one_row else weights_S[first : first + len(run)]
            self._weigh_run(flat_N.narrow(0, begin, sum(span.length for span in run)), run, own_S)
            first += len(run)

    def _weigh_run(self, flat_N: Tensor, run: Sequence[ParamSpan], weights_S: Tensor) -> None:
        begin = 0
        for chunk in flat_N.split(self.block.tile_bytes // 8):
            segments = Segments([0], [chunk.numel()], 1, flat_N.device)
            if len(weights_S) > 1:
                segments = _window([span.length for span in run], begin, chunk.numel(), flat_N.device)
            chunk.copy_(chunk.float().mul_(segments.expand(weights_S[None])[0]))
            begin += chunk.numel()

    def exchange(
        self,
        flat_N: Tensor,
        spans: tuple[ParamSpan, ...],
        pieces: Callable[[], Sequence[Piece]],
        wire: CommDtypes,
        outputs: Sequence[Tensor] = (),
        *,
        whole: bool = False,
    ) -> None:
        """Replace the bucket's owned slices by the combination of all workers' gradients.

        Args:
            flat_N: the bucket.
            spans: the gradients in it that these workers reduce.
            pieces: tells who owns what of them; asked once for every composition of a bucket.
            wire: the dtypes in which numbers travel.
            outputs: if there are any, what the combined gradients of owned pieces are added to, in order.
            whole: bring the combination of all pieces to every rank, not only to their owners.
        """
        known: MixingDecision | None = None
        if self._for_model is not None:
            known, present_W = self._for_model
        else:
            present_W = self._present([span.of(flat_N) for span in spans], self.workers.decision_group)
            if not self.block.mixing.needs_gram:
                known = self._known(spans, present_W)
        plan = self._plan(spans, pieces, wire, flat_N.device, whole)
        last_tile = self._last_tiles.pop(spans, None)
        self._exchange.combine(flat_N, plan, wire, self.moment, present_W, known, outputs, last_tile)

    def gather_whole(
        self,
        flat_N: Tensor,
        spans: tuple[ParamSpan, ...],
        pieces: Callable[[], Sequence[Piece]],
        wire: CommDtypes,
    ) -> Tensor:
        """Send a bucket's gradients, for a decision for the model: Gram matrix of this rank's share.

        An `exchange` of this bucket, whole and as it is then, has to follow.
        """
        plan = self._plan(spans, pieces, wire, flat_N.device, True)
        gram_SWW, self._last_tiles[spans] = self._exchange.gather(flat_N, plan, wire)
        return gram_SWW

    def _plan(
        self,
        spans: tuple[ParamSpan, ...],
        pieces: Callable[[], Sequence[Piece]],
        wire: CommDtypes,
        device: torch.device,
        whole: bool,
    ) -> ExchangePlan:
        key = (wire, whole, spans)
        plan = self._plans.pop(key, None)
        if plan is None:
            counted = [self._parameters[span.parameter].counts for span in spans]
            plan = self._exchange.plan(pieces(), wire, device, counted=counted, whole=whole)
        self._plans[key] = plan
        if len(self._plans) > _PLANS_KEPT:
            self._plans.popitem(last=False)
        return plan

    @property
    def awaits_the_model(self) -> bool:
        """Whether the buckets to come need a decision for the whole model, which is not yet made."""
        return self.block.decides_for_model and self._for_model is None

    def decide_for_model(
        self,
        grads: Sequence[tuple[int, Tensor]],
        alone: Sequence[tuple[int, Tensor]],
        wire: CommDtypes,
        model: RankGroup,
        device: torch.device,
        gather: Callable[[], Sequence[Tensor]] | None = None,
    ) -> None:
        """Scope `"model"`: decide once, from all gradients of the step, for all buckets that follow.

        Args:
            grads: of every parameter with one, its position and gradient.
            alone: those that are sent for the decision, and once more to be combined.
            wire: the dtypes in which numbers travel.
            model: all ranks with a part of the model, which must decide alike.
            device: where gradients are.
            gather: calls `gather_whole` for the others, and tells what it returned.
        """
        present_W = self._present([grad for _, grad in grads], model)
        counted = [grad for index, grad in alone if self._parameters[index].counts]
        gram_SWW = self._exchange.gram(counted, wire, device)
        for bucket_SWW in gather() if gather is not None else ():
            gram_SWW += bucket_SWW
        self._for_model = (self._exchange.decide(gram_SWW, self.moment, present_W, model), present_W)

    def end_backward(self) -> None:
        """All gradients of a backward pass are reduced: the next one decides for the model anew."""
        self._for_model = None

    def _present(self, grads: Sequence[Tensor], circle: RankGroup) -> Tensor:
        """Which workers count, `[W]`; what is not finite in this one's gradients is zeroed if it does not.

        Gradients that ranks of the circle hold of one worker are parts of it: one bad part is enough.
        """
        if self.block.nonfinite == "propagate":
            return self._everyone_W
        finite = self._everyone_W[0].double()
        for grad in grads:
            largest = torch.linalg.vector_norm(grad, float("inf")) if grad.numel() else grad.new_zeros(())
            finite = finite * largest.isfinite()
            grad.nan_to_num_(0.0, 0.0, 0.0)
        bad_W = torch.zeros_like(self._everyone_W, dtype=torch.float64)
        bad_W[self.workers.number] = 1.0 - finite
        circle.all_reduce(bad_W)  # whole numbers: exact, so the same on every rank
        return bad_W == 0

    def _known(self, spans: Sequence[ParamSpan], present_W: Tensor) -> MixingDecision:
        weights_RW = self._draw()
        if len(weights_RW) > 1:
            weights_RW = weights_RW[[self._parameters[span.parameter].draw for span in spans]]
        return decide_without_gradients(torch.from_numpy(weights_RW), present_W)

    def _draw(self) -> npt.NDArray[np.float64]:
        """The step's weights, drawn once, for all parameters."""
        if self._drawn is None or self._drawn[0] != self._steps.step:
            rule = self.block.mixing
            assert isinstance(rule, GradientFreeMixing)
            drawn = rule.weights(self.moment, self.workers.size, self._num_draws)
            self._drawn = (self._steps.step, drawn)
        return self._drawn[1]


def _runs(spans: Sequence[ParamSpan]) -> Iterator[tuple[int, list[ParamSpan]]]:
    """Spans without a gap between them: where they begin, and which they are."""
    run: list[ParamSpan] = []
    for span in spans:
        if run and run[-1].start + run[-1].length != span.start:
            yield run[0].start, run
            run = []
        run.append(span)
    if run:
        yield run[0].start, run


def _window(lengths: Sequence[int], begin: int, length: int, device: torch.device) -> Segments:
    """Segments of the columns `[begin, begin + length)` of parameters of the given lengths."""
    runs: list[int] = []
    place = 0
    for size in lengths:
        runs.append(max(min(place + size, begin + length) - max(place, begin), 0))
        place += size
    return Segments(list(range(len(lengths))), runs, len(lengths), device)
