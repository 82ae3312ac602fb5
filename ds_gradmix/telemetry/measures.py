"""What is measured of W workers at every step, on the device of the rank that has their Gram matrices.

    mean_cosine, min_cosine     of pairs of different workers' gradients
    worker_norm                 each worker's |g_i|
    worker_agreement            cos(g_i, sum_{j != i} h_j), h_j = g_j min(1, median |g| / |g_j|)
    noise scale                 noise_scale.py

and what looks like a fault of one worker, as the number of consecutive steps in which it did (`KINDS`).
Lengths and agreement are compared as running means over about 2.5 `alarm_steps`. A worker is far from the
others if it is `alarm_deviations` deviations from their median (1.4826 MAD, but no less than these means'
standard errors), and the difference matters: twice or half the median length, or less than half of the median
agreement.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ds_gradmix.ops.cosines import agreement, cosines, median, norms
from ds_gradmix.telemetry.noise_scale import NoiseScale, estimates
from ds_gradmix.telemetry.settings import TelemetrySettings

# What a worker's gradients may look like: NaN or Inf; too long; too short; agreeing too little; as long as in
# the step before to 6 digits; in the direction of another worker's.
KINDS = ("nonfinite", "long", "short", "disagreeing", "stuck", "same")
_SCALARS = 6  # of a packed reading
_AWAY = -0.5  # of the median agreement: below it a worker points away, above it does not agree
_MIN_STEPS = 5  # before running means are compared
_SAME = 0.1  # of the median distance 1 - cos between workers
_STUCK = 1e-6
_TWICE = 0.6931  # log 2


class Reading(NamedTuple):
    """A period's numbers on the host; lists by worker."""

    steps: float  # whose gradients were finite
    mean_cosine: float
    min_cosine: float
    trace_covariance: float
    squared_gradient: float
    noise_scale: float  # NaN where there is none
    norm: list[float]
    agreement: list[float]
    points_away: list[bool]  # of a worker that disagrees, whether it does so
    nearest: list[int]  # the worker that each is most alike
    runs: dict[str, list[int]]  # by kind: consecutive steps up to now
    since: dict[str, list[int]]  # and the first of them


class _Step(NamedTuple):
    """What a step's Gram matrix says, and whether it is finite; where it is not, of zeros."""

    norms_W: Tensor
    cosines_WW: Tensor
    agreement_W: Tensor
    ok: Tensor


class WorkerMeasures:
    """The numbers of one group of workers, summed up since the last reading, and running means."""

    def __init__(self, num_workers: int, settings: TelemetrySettings, device: torch.device) -> None:
        self._settings = settings
        self._decay = 1 - 1 / (2.5 * settings.alarm_steps)
        self._others_WW = ~torch.eye(num_workers, dtype=torch.bool, device=device)
        self._begin()

    def _begin(self) -> None:
        """Know nothing yet."""
        zeros_W = torch.zeros(len(self._others_WW), dtype=torch.float64, device=self._others_WW.device)
        self.noise = NoiseScale((), zeros_W.device)
        self._means_22W = zeros_W.expand(2, 2, -1).clone()  # of agreement and log length, and squares
        self._num_steps = zeros_W[:1].clone()  # in these means
        self._squares_W = zeros_W - 1  # of the step before
        self._runs_KW = zeros_W.expand(len(KINDS), -1).clone()
        self._since_KW = self._runs_KW.clone()
        self._nearest_W = zeros_W.clone()
        self._disagreed_W = zeros_W.clone()  # sums of agreement while a worker disagrees
        self._away_W = zeros_W.clone()
        self.begin_period()

    def begin_period(self) -> None:
        """A reading is taken: what is summed up starts anew."""
        self._sums_4 = torch.zeros_like(self._num_steps).repeat(4)  # steps, and sums of what is told of each
        self._least = self._sums_4[0] + float("inf")
        self._norms_W = torch.zeros_like(self._squares_W)
        self._agreements_W = torch.zeros_like(self._squares_W)

    def add(self, gram_WW: Tensor, squares_W: Tensor, samples: float, step: int) -> None:
        """Take in a step, counted from 1.

        Args:
            gram_WW: the Gram matrix of gradients of a worker's mean loss, float64.
            squares_W: their squared lengths, or numbers that stand for them, which may not be finite where
                the Gram matrix is, since such gradients were left out.
            samples: which that mean is over.
        """
        ok = gram_WW.isfinite().all()
        seen_WW = torch.where(ok, gram_WW, 0.0)
        seen = _Step(norms(seen_WW), cosines(seen_WW), agreement(seen_WW), ok)
        if len(gram_WW) > 1:
            found_2 = estimates(seen_WW.trace(), seen_WW.sum(), len(gram_WW), samples)
            self.noise.add(torch.where(ok, found_2, float("nan")))
            self._add_scalars(seen, found_2)
        self._norms_W = self._norms_W + seen.norms_W
        self._agreements_W = self._agreements_W + seen.agreement_W
        if len(gram_WW) > 2:
            finite_W = squares_W.isfinite() & gram_WW.diagonal().isfinite()
            self._look_for_faults(seen, squares_W, finite_W, step)

    def _add_scalars(self, step: _Step, found_2: Tensor) -> None:
        others_WW = self._others_WW.double()
        pairs_WW = step.cosines_WW * others_WW
        least = torch.where(self._others_WW, step.cosines_WW, float("inf")).min()
        least = torch.minimum(self._least, torch.where(step.ok, least, float("inf")))
        added_4 = torch.cat([torch.stack([step.ok.double(), pairs_WW.sum() / others_WW.sum()]), found_2])
        self._sums_4 = self._sums_4 + torch.where(step.ok, added_4, 0.0)
        self._least = least

    def _look_for_faults(self, step: _Step, squares_W: Tensor, finite_W: Tensor, number: int) -> None:
        far_2W, means_2W, middle_21 = self._compared(step)
        s_W, (e_W, l_W), (e, l_middle) = step.agreement_W, means_2W, middle_21
        enough = self._num_steps >= _MIN_STEPS
        bad_W = ~finite_W
        stuck_W = (squares_W - self._squares_W).abs() <= _STUCK * squares_W
        stuck_W = stuck_W & (squares_W > 0)
        distances_WW = 1 - step.cosines_WW
        middle = median(distances_WW.flatten(), self._others_WW.flatten())
        least_W, nearest_W = torch.where(self._others_WW, distances_WW, float("inf")).min(1)
        looks_KW = torch.stack(
            [
                bad_W & (2 * bad_W.sum() <= len(bad_W)),
                (far_2W[1] > 1) & (l_W - l_middle > _TWICE) & enough,
                (far_2W[1] < -1) & (l_W - l_middle < -_TWICE) & enough,
                (far_2W[0] < -1) & (e_W < 0.5 * e) & (e > 0) & enough,
                stuck_W & (2 * stuck_W.sum() < len(stuck_W)),
                (least_W < _SAME * middle) & (step.norms_W > 0),
            ]
        )
        counts_KW = (self._runs_KW + 1) * looks_KW
        since_KW = torch.where(counts_KW == 1, float(number), self._since_KW)
        known_K1 = torch.stack([finite_W.any(), *[step.ok] * (len(KINDS) - 1)])[:, None]
        self._runs_KW = torch.where(known_K1, counts_KW, self._runs_KW)
        self._since_KW = torch.where(known_K1, since_KW, self._since_KW)
        self._squares_W = squares_W.clone()
        self._nearest_W = nearest_W.double()
        run_W = self._runs_KW[KINDS.index("disagreeing")]
        self._disagreed_W = torch.where(step.ok, (self._disagreed_W + s_W) * (run_W > 0), self._disagreed_W)
        self._away_W = (self._disagreed_W < _AWAY * e * run_W).double()

    def _compared(self, step: _Step) -> tuple[Tensor, Tensor, Tensor]:
        """Of agreement and log length, in the first dimension: how far each worker is from the median, in
        deviations that are too many; the running means; and their medians.
        """
        values_2W = torch.stack([step.agreement_W, step.norms_W.clamp(min=1e-100).log()])
        moments_22W = torch.stack([values_2W, values_2W.square()])
        self._means_22W = torch.where(
            step.ok, moments_22W.lerp(self._means_22W, self._decay), self._means_22W
        )
        self._num_steps = self._num_steps + step.ok
        means_2W, squares_2W = self._means_22W / (1 - self._decay**self._num_steps).clamp(min=1e-300)
        middle_21 = median(means_2W)[:, None]
        # Steps whose plain mean has as small an error as the running mean.
        counted = self._num_steps.clamp(max=(1 + self._decay) / (1 - self._decay))
        errors_2W = ((squares_2W - means_2W.square()).clamp(min=0) / counted).sqrt()
        deviations_22W = torch.stack([1.4826 * (means_2W - middle_21).abs(), errors_2W])
        spread_2 = median(deviations_22W).amax(0).clamp(min=1e-12)
        far_2W = (means_2W - middle_21) / (self._settings.alarm_deviations * spread_2[:, None])
        return far_2W, means_2W, middle_21

    def packed(self) -> Tensor:
        """All numbers of a reading in one tensor, float64."""
        scalars = torch.cat([self._sums_4, torch.stack([self._least, self.noise.value])])
        parts = [self._norms_W, self._agreements_W, self._away_W, self._nearest_W]
        return torch.cat([scalars, *parts, self._runs_KW.flatten(), self._since_KW.flatten()])

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint holds: nothing of what looked faulty, which may be mended before a resume."""
        return {"noise": self.noise.sums}

    def load_state_dict(self, saved: dict[str, Tensor] | None) -> None:
        """Take over a checkpoint's; the rest starts afresh."""
        self._begin()
        if saved is not None:
            self.noise.sums = saved["noise"].to(self.noise.sums)


def packed_size(num_workers: int) -> int:
    """The numbers that `WorkerMeasures.packed` has."""
    return _SCALARS + (4 + 2 * len(KINDS)) * num_workers


def unpack(values: list[float], num_workers: int) -> Reading:
    """A reading from the numbers of `WorkerMeasures.packed`."""
    steps, mean, trace, square, least, noise = values[:_SCALARS]
    rows = [values[at : at + num_workers] for at in range(_SCALARS, len(values), num_workers)]
    counted = max(steps, 1.0)
    lengths, agreements = ([value / counted for value in row] for row in rows[:2])
    runs, since = ([list(map(int, row)) for row in part] for part in (rows[4:10], rows[10:]))
    return Reading(
        steps,
        mean / counted,
        least,
        trace / counted,
        square / counted,
        noise,
        lengths,
        agreements,
        list(map(bool, rows[2])),
        list(map(int, rows[3])),
        dict(zip(KINDS, runs, strict=True)),
        dict(zip(KINDS, since, strict=True)),
    )
