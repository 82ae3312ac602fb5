"""What the rules decided in a step, summed on the device and read by the host once, at the step."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_gradmix.comm.groups import RankGroup
from ds_gradmix.comm.workers import WorkerGroup
from ds_gradmix.rules import MixingDecision

_NAMES = (
    "elements",
    "kept",
    "effective",
    "cosine",
    "agreed",
    "reductions",
    "empty",
    "dropped",
    "factor",
    "scaled",
)


class StepStats:
    """Sums over one optimizer step; `read` turns them into means and starts the next.

    Sums of decisions are weighted by elements, so that a bucket of one small parameter does not count as much
    as a full one. They are the same on every worker, because verdicts are.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(_NAMES), dtype=torch.float64, device=device)
        self._used = False

    def add_verdict(self, verdict: MixingDecision, elements_S: Tensor | float, present_W: Tensor) -> None:
        """Note a decision on S segments of `elements_S` elements each."""
        self._used = True
        weights_SW = verdict.weights_SW
        kept_S = (weights_SW != 0).to(torch.float64).mean(1)
        effective_S = 1.0 / weights_SW.square().sum(1).clamp(min=1e-12) * (weights_SW != 0).any(1)
        assert verdict.mean_cosine_S is not None
        ones_S = torch.ones_like(kept_S)
        empty = (~present_W.any()).to(torch.float64)
        dropped = (~present_W).sum().to(torch.float64)
        weighted = [(v * elements_S).sum() for v in (ones_S, kept_S, effective_S, verdict.mean_cosine_S)]
        parts = [*weighted, verdict.agreed_S.to(torch.float64).sum(), ones_S.sum(), empty, dropped]
        self._sums[: len(parts)] += torch.stack(parts)

    def add_factors(self, factors_C: Tensor, counted_C: Tensor | None = None) -> None:
        """Note scaling factors of C coordinates, on the rank that combined them; 0 or 1 tells which count."""
        self._sums[-2] += (factors_C if counted_C is None else factors_C * counted_C).sum(dtype=torch.float64)
        # One parameter's segments are not expanded.
        self._sums[-1] += factors_C.numel() if counted_C is None else counted_C.expand_as(factors_C).sum()

    def read(self, workers: WorkerGroup, model: RankGroup, *, alike: bool, scaled: bool) -> dict[str, float]:
        """The step's numbers, which are the same on every rank; the only place where the host waits for the
        device.

        Args:
            workers: those of one group, who make the same decisions.
            model: all ranks that make decisions on the model.
            alike: whether these are the same decisions.
            scaled: whether there are factors.
        """
        if alike and not self._used:
            return {}
        if not alike:
            model.all_reduce_identical(self._sums)
        elif scaled:
            workers.all_reduce(self._sums[-2:])
        sums = dict(zip(_NAMES, self._sums.tolist(), strict=True))
        self._sums.zero_()
        self._used = False
        if sums["reductions"] == 0:
            return {}
        elements = max(sums["elements"], 1.0)
        numbers = {
            "kept_fraction": sums["kept"] / elements,
            "effective_workers": sums["effective"] / elements,
            "agreed_fraction": sums["agreed"] / sums["reductions"],
            "dropped_workers": sums["dropped"] / (1 if alike else workers.decision_group.num_ranks),
            "skipped": float(sums["agreed"] == 0 or sums["empty"] > 0),
        }
        if sums["cosine"] == sums["cosine"]:  # NaN where no Gram matrix was taken
            numbers["mean_cosine"] = sums["cosine"] / elements
        if scaled:
            numbers["mean_factor"] = sums["factor"] / max(sums["scaled"], 1.0)
        return numbers
