"""Weights that are decided before any gradient is sent: each worker multiplies what it sends."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ds_gradmix.comm.groups import RankGroup
from ds_gradmix.comm.workers import WorkerGroup
from ds_gradmix.config import GradmixConfig
from ds_gradmix.exchange.bucket import ParamInfo, ParamSpan, runs_of
from ds_gradmix.exchange.step_stats import StepStats
from ds_gradmix.ops.multi_tensor import squares
from ds_gradmix.ops.segments import Segments, to_device
from ds_gradmix.rules import GradientFreeMixing, MixingDecision, RngKey
from ds_gradmix.rules.apply import decide_without_gradients


@dataclass
class Weighting:
    """The weights of one group of workers, drawn where they do not depend on the gradients, and applied."""

    config: GradmixConfig
    workers: WorkerGroup
    infos: Sequence[ParamInfo]  # of the optimizer's parameters, by position
    stats: StepStats
    weight_sum: float  # of the workers
    averaged: bool = False  # by DeepSpeed afterwards
    _drawn: tuple[RngKey, npt.NDArray[np.float64]] | None = None

    def present(self, grads: Sequence[Tensor], group: RankGroup) -> Tensor:
        """Which workers count, `[W]`; this one's gradients are zeroed if it does not.
        Ranks of the group may hold parts of one worker's gradient: one bad part is enough to leave it out.
        """
        everyone_W = torch.ones(self.workers.size, dtype=torch.bool, device=self.stats.device)
        if self.config.nonfinite == "propagate":
            return everyone_W
        finite = everyone_W[0].double()
        for grad in grads:
            largest = torch.linalg.vector_norm(grad, float("inf")) if grad.numel() else grad.new_zeros(())
            finite = finite * largest.isfinite()
            grad.nan_to_num_(0.0, 0.0, 0.0)
        for grad in grads:  # all of a worker's that is left out
            grad.mul_(finite)
        bad_W = torch.zeros_like(everyone_W, dtype=torch.float64)
        bad_W[self.workers.number] = 1.0 - finite
        group.all_reduce(bad_W)  # integers: exact, so the same on every rank
        return bad_W == 0

    def draw(self, key: RngKey) -> npt.NDArray[np.float64]:
        """The step's weights, drawn once for all parameters, `[1, W]` or one row for each draw."""
        if self._drawn is None or self._drawn[0] != key:
            rule = self.config.mixing
            assert isinstance(rule, GradientFreeMixing)
            num_draws = 1 + max((info.draw for info in self.infos), default=0)
            self._drawn = (key, rule.weights(key, self.workers.size, num_draws))
        return self._drawn[1]

    def decide(self, spans: Sequence[ParamSpan], present_W: Tensor, key: RngKey) -> MixingDecision:
        """The weights of gradients, from what was drawn."""
        weights_RW = self.draw(key)
        if len(weights_RW) > 1:
            weights_RW = weights_RW[[self.infos[span.param].draw for span in spans]]
        return decide_without_gradients(torch.from_numpy(weights_RW), present_W)

    def num_elements(self, spans: Sequence[ParamSpan], num_segments: int) -> Tensor | float:
        """Of what is counted of gradients, elements in all, or `[S]` of each if each has a decision."""
        lengths = [span.length if self.infos[span.param].counted else 0 for span in spans]
        if num_segments == 1:
            return float(sum(lengths))
        return to_device(torch.tensor(lengths).double(), self.stats.device)

    def squares(self, flat_N: Tensor, spans: Sequence[ParamSpan]) -> Tensor:
        """This rank's share of the squared lengths `[S, W]`, float64, of what is decided on at once."""
        if self.config.scope == "parameter":
            return self.squares_of(
                [[span.of(flat_N)] if self.infos[span.param].counted else [] for span in spans]
            )
        counted = [span for span in spans if self.infos[span.param].counted]
        return self.squares_of([[flat_N.narrow(0, start, n) for start, n, _ in runs_of(counted)]])

    def squares_of(self, segments: Sequence[Sequence[Tensor]]) -> Tensor:
        """The same of segments that are given by their parts."""
        size, device = (len(segments), self.workers.size), self.stats.device
        found_SW = torch.zeros(size, dtype=torch.float64, device=device)
        rows = torch.tensor([row for row, parts in enumerate(segments) for _ in parts])
        if len(rows) > 0:
            squares_P = squares([part for parts in segments for part in parts])
            found_SW[:, self.workers.number].index_add_(0, to_device(rows, device), squares_P)
        return found_SW

    def weigh(self, flat_N: Tensor, spans: Sequence[ParamSpan], decision: MixingDecision) -> None:
        """Multiply gradients by their worker's weights, in one pass; by W times these with `averaged`, which
        is exactly 1 for a weight of 1/W.
        """
        share = self.weight_sum / self.workers.replicas_per_worker  # of a rank's gradient in its worker's
        if self.averaged:
            share = self.workers.size
        weights_S = (decision.weights_SW[:, self.workers.number] * share).float()
        _multiply(flat_N, spans, weights_S, self.config.tile_bytes)


def _multiply(flat_N: Tensor, spans: Sequence[ParamSpan], weights_S: Tensor, tile_bytes: int) -> None:
    """Multiply in place by one weight, or by one a span, with one rounding."""
    first = 0
    for begin, length, run in runs_of(spans):
        part = flat_N.narrow(0, begin, length)
        if len(weights_S) == 1:
            # On a CPU a number in a tensor of no dimension is not rounded to the other's dtype; on a GPU it
            # would be, but there a tensor of one dimension needs no copy in float32.
            part.mul_(weights_S.squeeze() if part.device.type == "cpu" else weights_S)
            continue
        own_S = weights_S[first : first + len(run)]
        first += len(run)
        edges, place = np.cumsum([0, *(span.length for span in run)]), 0
        for chunk in part.split(tile_bytes // 8):  # in float32
            lengths = np.diff(np.clip(edges, place, place + chunk.numel())).tolist()
            segments = Segments(range(len(own_S)), lengths, len(own_S), flat_N.device)
            chunk.copy_(chunk.float().mul_(segments.expand(own_S[None])[0]))
            place += chunk.numel()
