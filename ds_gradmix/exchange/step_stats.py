"""What the rules decided in a step, summed on the device and read by the host once, at the step."""

import math

import torch
from torch import Tensor

from ds_gradmix.comm.workers import ParallelGroups
from ds_gradmix.rules import MixingDecision

_DECISION_SUMS = ["elements", "kept", "effective", "cosine", "agreed", "decisions", "empty", "dropped"]
_SUMS = [*_DECISION_SUMS, "close", "factor", "floor", "scaled"]
_CLOSE = _SUMS.index("close")


class StepStats:
    """Sums over one optimizer step; `read` turns them into means and starts the next.

    Sums of decisions are weighted by elements, so that a bucket of one small parameter does not count as much
    as a full one. They are the same on every worker, because decisions are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
        self._used = False

    def add_decision(self, decision: MixingDecision, elements_S: Tensor | float, present_W: Tensor) -> None:
        """Note a decision on S segments of `elements_S` elements each."""
        self._used = True
        # NaN stands for gradients that are not finite, which all workers take part in.
        weights_SW = decision.weights_SW.nan_to_num(nan=1.0 / len(present_W))
        kept_S = (weights_SW != 0).double().mean(1)
        effective_S = weights_SW.sum(1).square() / weights_SW.square().sum(1).clamp(min=1e-12)
        ones_S = torch.ones_like(kept_S)
        assert decision.mean_cosine_S is not None
        weighted = [(v * elements_S).sum() for v in (ones_S, kept_S, effective_S, decision.mean_cosine_S)]
        empty, dropped = (~present_W.any()).double(), (~present_W).sum().double()
        parts = [*weighted, decision.agreed_S.double().sum(), ones_S.sum(), empty, dropped]
        self._sums[: len(parts)] += torch.stack(parts)

    def add_close_calls(self, close_S: Tensor, num_ranks: int) -> None:
        """Note which of S decisions the error of a sketch might have turned, on each of so many ranks."""
        self._sums[_CLOSE] += close_S.sum() / num_ranks

    def add_factors(self, factors_C: Tensor, least: float | None, counted_C: Tensor | None = None) -> None:
        """Note factors of C coordinates, on the rank that combined them; those with a 0 do not count, and
        `least` is the smallest that there can be.
        """
        self._sums[-3] += (factors_C if counted_C is None else factors_C * counted_C).sum(dtype=torch.float64)
        if least is not None:
            floor_C = factors_C <= least * (1 + 1e-6)
            self._sums[-2] += (floor_C if counted_C is None else floor_C * counted_C).sum()
        # One parameter's segments are not expanded.
        self._sums[-1] += factors_C.numel() if counted_C is None else counted_C.expand_as(factors_C).sum()

    def read(self, parallel: ParallelGroups, *, scaled: bool, sketched: bool) -> dict[str, float]:
        """The step's statistics, the same on every rank; only here does the host wait for the device."""
        if not parallel.decisions_are_global:
            parallel.model.all_reduce_identical(self._sums)
        elif not self._used:
            return {}
        elif scaled:
            parallel.workers.all_reduce(self._sums[-3:])
        sums = dict(zip(_SUMS, self._sums.tolist(), strict=True))
        self._sums.zero_()
        self._used = False
        if sums["decisions"] == 0:
            return {}
        elements = max(sums["elements"], 1.0)
        counted = 1 if parallel.decisions_are_global else parallel.workers.decision_group.num_ranks
        stats = {
            "kept_fraction": sums["kept"] / elements,
            "effective_workers": sums["effective"] / elements,
            "agreed_fraction": sums["agreed"] / sums["decisions"],
            "skipped_buckets": (sums["decisions"] - sums["agreed"]) / counted,
            "dropped_workers": sums["dropped"] / counted,
            "skipped": float(sums["agreed"] == 0 or sums["empty"] > 0),
        }
        # NaN where no Gram matrix was taken, and with gradients that are not finite.
        if math.isfinite(sums["cosine"]):
            stats["mean_cosine"] = sums["cosine"] / elements
        if sketched:
            known = parallel.workers.num_ranks if parallel.decisions_are_global else 1
            stats["close_calls"] = float(round(sums["close"] * known))
        if scaled and math.isfinite(sums["factor"]):
            stats["mean_factor"] = sums["factor"] / max(sums["scaled"], 1.0)
            stats["floor_fraction"] = sums["floor"] / max(sums["scaled"], 1.0)
        return stats
