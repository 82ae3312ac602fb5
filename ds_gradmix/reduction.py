"""What happens to one bucket, whatever the engine: left to DeepSpeed, weighed and left to DeepSpeed, or
exchanged.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ds_gradmix.config import Block
from ds_gradmix.decision import Verdict, known_verdict
from ds_gradmix.exchange import Exchange, Plan
from ds_gradmix.layout import Piece
from ds_gradmix.log import logger
from ds_gradmix.mixing import KnownMixing, Mean, Moment
from ds_gradmix.record import Record
from ds_gradmix.segments import Segments, to_device
from ds_gradmix.smoothing import Smoothing
from ds_gradmix.transit import Wire
from ds_gradmix.workers import Workers, fingerprint_of

_PLANS_KEPT = 1024  # compositions of buckets; they recur from step to step

Gradients = tuple[tuple[int, int], ...]  # of each gradient in a bucket: position of its parameter, elements


class Reduction:
    """A block at work over a group of workers; one for each optimizer.

    Args:
        block: the rules.
        workers: who takes part.
        parameters: names of all the optimizer's parameters; gradients are known by their position here.
        owned: elements this rank owns in each of the optimizer's parameter groups.
        device: where gradients are.
    """

    def __init__(
        self,
        block: Block,
        workers: Workers,
        parameters: Sequence[str],
        owned: Sequence[int],
        device: torch.device,
    ) -> None:
        self.block = block
        self.workers = workers
        self.step = 0  # set by the engine's seam before each reduction
        self.smoothing: Smoothing | None = None
        scaling = block.scaling
        if scaling is not None and scaling.smoothing > 0 and workers.size > 1:
            self.smoothing = Smoothing(scaling.smoothing, scaling.idle_factor, owned, device)
        self.numbers: dict[str, float] = {}  # what was decided in the last step
        self._parameters = list(parameters)
        self._record = Record(device)
        self._exchange = Exchange(workers, block, self._record, self.smoothing)
        self._everyone_W = torch.ones(workers.size, dtype=torch.bool, device=device)
        self._plans: OrderedDict[tuple[Wire, Gradients], Plan] = OrderedDict()
        self._fingerprints: dict[tuple[str, Gradients], int] = {}
        self._drawn: tuple[int, npt.NDArray[np.float64]] | None = None
        self._for_model: tuple[Verdict, Tensor] | None = None

    @property
    def is_stock(self) -> bool:
        """Whether DeepSpeed's own reduction is all there is to do."""
        trivial = isinstance(self.block.mixing, Mean) and self.block.scaling is None
        return self.workers.size == 1 or (trivial and self.block.nonfinite == "propagate")

    @property
    def exchanges(self) -> bool:
        """Whether buckets are exchanged; if not, they are weighed and summed by DeepSpeed."""
        return not self.is_stock and (self.block.mixing.needs_gram or self.block.scaling is not None)

    @property
    def moment(self) -> Moment:
        """Key of this step's draws."""
        return Moment(self.block.seed, self.step)

    def agree(self, gradients: Gradients, occasion: str) -> None:
        """Raise `MismatchError` on every rank unless all are about to reduce these gradients."""
        if self.workers.size == 1:
            return

        def words() -> list[str]:
            return [f"{self._parameters[index]} ({elements} elements)" for index, elements in gradients]

        key = (occasion, gradients)
        if key not in self._fingerprints:
            if len(self._fingerprints) > _PLANS_KEPT:
                self._fingerprints.clear()
            self._fingerprints[key] = fingerprint_of([occasion, *words()])
        advice = (
            "every worker must have the same gradients, of the same shapes, in the same order; look for "
            "parameters that only some workers use, say behind a branch on the data"
        )
        self.workers.agree(self._fingerprints[key], words, occasion, advice)

    def weigh(self, flat_N: Tensor, gradients: Gradients) -> None:
        """Multiply this worker's gradients by its weights, in place, to be summed over the workers by
        DeepSpeed.

        One pass over the bucket; communicates only for `nonfinite: "drop"`, one number a worker.
        """
        present_W = self._present([flat_N])
        verdict = self._known(gradients, present_W)
        lengths = [elements for _, elements in gradients]
        one_row = len(verdict.weights_SW) == 1
        elements_S = (
            float(flat_N.numel()) if one_row else to_device(torch.tensor(lengths).double(), flat_N.device)
        )
        self._record.add_verdict(verdict, elements_S, present_W)
        if one_row and self.block.nonfinite == "propagate":
            flat_N.mul_(float(self._draw()[0, self.workers.rank]))
            return
        weights_S = verdict.weights_SW[:, self.workers.rank].float()
        begin = 0
        for chunk in flat_N.split(self.block.tile_bytes // 8):
            segments = Segments([0], [chunk.numel()], 1, flat_N.device)
            if not one_row:
                segments = _window(lengths, begin, chunk.numel(), flat_N.device)
            chunk.copy_(chunk.float().mul_(segments.expand(weights_S[None])[0]))
            begin += chunk.numel()

    def exchange(
        self,
        flat_N: Tensor,
        gradients: Gradients,
        pieces: Callable[[], Sequence[Piece]],
        wire: Wire,
        outputs: Sequence[Tensor] = (),
    ) -> None:
        """Replace the bucket's owned slices by the combination of all workers' gradients.

        `pieces` tells who owns what of it, and is asked once for every composition of a bucket. `outputs`, if
        there are any, are what the combined gradients of owned pieces are added to, in order.
        """
        known: Verdict | None = None
        if self._for_model is not None:
            known, present_W = self._for_model
        else:
            present_W = self._present([flat_N])
            if not self.block.mixing.needs_gram:
                known = self._known(gradients, present_W)
        key = (wire, gradients)
        plan = self._plans.pop(key, None) or self._exchange.plan(pieces(), wire, flat_N.device)
        self._plans[key] = plan
        if len(self._plans) > _PLANS_KEPT:
            self._plans.popitem(last=False)
        self._exchange.combine(flat_N, plan, wire, self.moment, present_W, known, outputs)

    @property
    def awaits_the_model(self) -> bool:
        """Whether the buckets to come need a decision for the whole model, which is not yet made."""
        whole = self.exchanges and self.block.mixing.needs_gram and self.block.scope == "model"
        return whole and self._for_model is None

    def decide_for_model(self, grads: Sequence[Tensor], wire: Wire) -> None:
        """Scope `"model"`: decide once, from all gradients of the step, for all buckets that follow."""
        present_W = self._present(grads)
        self._for_model = (self._exchange.decide_for_model(grads, wire, self.moment, present_W), present_W)

    def end_backward(self) -> None:
        """All gradients of a backward pass are reduced: the next one decides for the model anew."""
        self._for_model = None

    def finish(self) -> bool:
        """The step's gradients are reduced: read what was decided. Whether the step is to be skipped."""
        scaled = self.block.scaling is not None and not self.is_stock
        self.numbers = self._record.read(self.workers, scaled=scaled)
        drops = self.numbers.get("dropped_workers", 0.0)
        if drops > 0 and self.workers.rank == 0:
            logger.warning(
                f"ds_gradmix: step {self.step}: left a worker out of {drops:.0f} reduction(s), because its "
                "gradient was not finite"
            )
        return self.numbers.get("skipped", 0.0) > 0

    def settle(self, *, taken: bool) -> None:
        """The optimizer has taken the step, or left it out."""
        if self.smoothing is not None:
            if taken:
                self.smoothing.commit()
            else:
                self.smoothing.discard()
        if self.numbers:
            self.numbers["skipped"] = float(not taken)

    def _present(self, grads: Sequence[Tensor]) -> Tensor:
        """Which workers count, `[W]`; what is not finite in this one's gradients is zeroed if it does not."""
        if self.block.nonfinite == "propagate":
            return self._everyone_W
        finite = self._everyone_W[0].float()
        for grad in grads:
            largest = torch.linalg.vector_norm(grad, float("inf")) if grad.numel() else grad.new_zeros(())
            finite = finite * largest.isfinite()
            grad.nan_to_num_(0.0, 0.0, 0.0)
        return self.workers.gather(finite) > 0

    def _known(self, gradients: Gradients, present_W: Tensor) -> Verdict:
        weights_RW = self._draw()
        if len(weights_RW) > 1:
            weights_RW = weights_RW[[index for index, _ in gradients]]
        return known_verdict(torch.from_numpy(weights_RW), present_W)

    def _draw(self) -> npt.NDArray[np.float64]:
        """The step's weights, drawn once, for all parameters."""
        if self._drawn is None or self._drawn[0] != self.step:
            rule = self.block.mixing
            assert isinstance(rule, KnownMixing)
            self._drawn = (self.step, rule.weights(self.moment, self.workers.size, len(self._parameters)))
        return self._drawn[1]


def _window(lengths: Sequence[int], begin: int, length: int, device: torch.device) -> Segments:
    """Segments of the columns `[begin, begin + length)` of parameters of the given lengths."""
    runs: list[int] = []
    place = 0
    for size in lengths:
        runs.append(max(min(place + size, begin + length) - max(place, begin), 0))
        place += size
    return Segments(list(range(len(lengths))), runs, len(lengths), device)
