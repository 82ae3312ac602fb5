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

from ds_gradmix.ops.cosines import agreement, cosines, mean_cosine, median, norms
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


class WorkerMeasures:
    """The numbers of one group of workers, summed up since the last reading, and running means."""

    def __init__(self, num_workers: int, settings: TelemetrySettings, device: torch.device) -> None:
        self._settings = settings
        self._decay = 1 - 1 / (2.5 * settings.alarm_steps)
        zeros_W = torch.zeros(num_workers, dtype=torch.float64, device=device)
        self.noise = NoiseScale((), device)
        # Rows: agreement and its square, log length and its square.
        self._means_RW = zeros_W.expand(4, -1).clone()
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
        self._sums = torch.zeros_like(self._means_RW[0, :1].expand(_SCALARS)).clone()
        self._sums[2] = float("inf")
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
        bad_W = ~(squares_W.isfinite() & gram_WW.diagonal().isfinite())
        seen_WW = torch.where(ok, gram_WW, 0.0)
        lengths_W, agreements_W = norms(seen_WW), agreement(seen_WW)
        if len(gram_WW) > 1:
            found = estimates(seen_WW.trace(), seen_WW.sum(), len(gram_WW), samples)
            self.noise.add(torch.where(ok, found, float("nan")))
            self._add_scalars(seen_WW, found, ok)
        self._norms_W = self._norms_W + lengths_W
        self._agreements_W = self._agreements_W + agreements_W
        if len(gram_WW) > 2:
            self._look_for_faults(seen_WW, squares_W, bad_W, ok, step)

    def _add_scalars(self, gram_WW: Tensor, found: Tensor, ok: Tensor) -> None:
        cosines_WW, diagonal_WW = cosines(gram_WW), torch.eye(len(gram_WW), device=gram_WW.device)
        least = torch.where(diagonal_WW > 0, float("inf"), cosines_WW).min()
        least = torch.minimum(self._sums[2], torch.where(ok, least, float("inf")))
        added = torch.stack([ok.double(), mean_cosine(gram_WW), ok.double(), *found, ok.double()])
        self._sums = self._sums + torch.where(ok, added, 0.0)
        self._sums[2] = least

    def _look_for_faults(
        self, gram_WW: Tensor, squares_W: Tensor, bad_W: Tensor, ok: Tensor, step: int
    ) -> None:
        s_W, x_W = agreement(gram_WW), norms(gram_WW).clamp(min=1e-100).log()
        rows_RW = torch.stack([s_W, s_W.square(), x_W, x_W.square()])
        moved_RW = self._decay * self._means_RW + (1 - self._decay) * rows_RW
        self._means_RW = torch.where(ok, moved_RW, self._means_RW)
        self._num_steps = self._num_steps + ok
        means_RW = self._means_RW / (1 - self._decay**self._num_steps).clamp(min=1e-300)
        counted = torch.minimum(self._num_steps, torch.full_like(self._num_steps, self._num_equal_steps))
        wanted = self._settings.alarm_deviations
        far_2W = []
        for mean_W, square_W in (means_RW[:2], means_RW[2:4]):
            middle = median(mean_W)
            errors_W = ((square_W - mean_W.square()).clamp(min=0) / counted).sqrt()
            spread = torch.maximum(1.4826 * median((mean_W - middle).abs()), median(errors_W))
            far_2W.append(((mean_W - middle) / wanted / spread.clamp(min=1e-12), mean_W, middle))
        (agrees_W, e_W, e), (length_W, l_W, l_mid) = far_2W
        enough = self._num_steps >= _MIN_STEPS
        nearest_W, is_same_W = self._likeness(gram_WW)
        stuck_W = (squares_W - self._squares_W).abs() <= _STUCK * squares_W
        stuck_W = stuck_W & (squares_W > 0) & (2 * stuck_W.sum() < len(stuck_W))
        looks_KW = torch.stack(
            [
                bad_W & (2 * bad_W.sum() <= len(bad_W)),
                (length_W > 1) & (l_W - l_mid > 0.6931) & enough,
                (length_W < -1) & (l_W - l_mid < -0.6931) & enough,
                (agrees_W < -1) & (e_W < 0.5 * e) & (e > 0) & enough,
                stuck_W,
                is_same_W,
            ]
        )
        counts_KW = (self._runs_KW + 1) * looks_KW
        since_KW = torch.where(counts_KW == 1, float(step), self._since_KW)
        known_K1 = torch.stack([~bad_W.all(), *[ok] * (len(KINDS) - 1)])[:, None]
        self._runs_KW = torch.where(known_K1, counts_KW, self._runs_KW)
        self._since_KW = torch.where(known_K1, since_KW, self._since_KW)
        self._squares_W = squares_W.clone()
        self._nearest_W = nearest_W
        run_W = self._runs_KW[KINDS.index("disagreeing")]
        self._disagreed_W = torch.where(ok, (self._disagreed_W + s_W) * (run_W > 0), self._disagreed_W)
        self._away_W = (self._disagreed_W < _AWAY * e * run_W).double()

    @property
    def _num_equal_steps(self) -> float:
        """Steps whose plain mean has as small an error as the running mean."""
        return (1 + self._decay) / (1 - self._decay)

    def _likeness(self, gram_WW: Tensor) -> tuple[Tensor, Tensor]:
        """Of each worker the one most alike, and whether it is far more so than workers are."""
        others_WW = ~torch.eye(len(gram_WW), dtype=torch.bool, device=gram_WW.device)
        distances_WW = 1 - cosines(gram_WW)
        middle = median(distances_WW.flatten(), others_WW.flatten())
        least_W, nearest_W = torch.where(others_WW, distances_WW, float("inf")).min(1)
        return nearest_W.double(), (least_W < _SAME * middle) & (norms(gram_WW) > 0)

    def packed(self) -> Tensor:
        """All numbers of a reading in one tensor, float64."""
        scalars = torch.cat([self._sums[:5], self.noise.value.view(1)])
        parts = [self._norms_W, self._agreements_W, self._away_W, self._nearest_W]
        return torch.cat([scalars, *parts, self._runs_KW.flatten(), self._since_KW.flatten()])

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint holds; sums of a period that is not over are lost."""
        names = ("_means_RW", "_num_steps", "_squares_W", "_runs_KW", "_since_KW", "_disagreed_W")
        return {"noise": self.noise.sums, **{name.strip("_"): getattr(self, name) for name in names}}

    def load_state_dict(self, saved: dict[str, Tensor]) -> bool:
        """Take over a checkpoint's state; False if it is of other workers."""
        present = self.state_dict()
        if any(name not in saved or saved[name].shape != value.shape for name, value in present.items()):
            return False
        for name, value in present.items():
            value.copy_(saved[name])
        return True


def packed_size(num_workers: int) -> int:
    """The numbers that `WorkerMeasures.packed` has."""
    return _SCALARS + (4 + 2 * len(KINDS)) * num_workers


def unpack(values: list[float], num_workers: int) -> Reading:
    """A reading from the numbers of `WorkerMeasures.packed`."""
    steps, mean, least, trace, square, noise = values[:_SCALARS]
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
