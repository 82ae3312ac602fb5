"""What is known of one group's workers beside the reduction of their gradients: what a rule observes, what
telemetry measures, and who is left out.

At the end of a step, or for telemetry once in a few, the first rank has the model's Gram matrix of it
(observer.py). From it come the rule's next state, which it sends to all, and the measures of telemetry, which
it sends when they are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_gradmix.comm.workers import ParallelGroups
from ds_gradmix.exchange.bucket import CommDtypes
from ds_gradmix.exchange.exchange import Exchange
from ds_gradmix.exchange.observer import Observation, Observer
from ds_gradmix.exchange.parameter_observer import ParameterObserver
from ds_gradmix.exchange.participation import Change, Participation
from ds_gradmix.exchange.transport import Transport
from ds_gradmix.ops.sketch import SketchMaps
from ds_gradmix.rules import NormMixing, RngKey
from ds_gradmix.rules.apply import observe
from ds_gradmix.telemetry.measures import Reading, WorkerMeasures, packed_size, unpack
from ds_gradmix.telemetry.noise_scale import NoiseScale, estimates

_STEPS_TOGETHER = 16  # whose sketches are kept to be exchanged together


@dataclass(frozen=True)
class Units:
    """How the gradients of a step's reductions are related to those of a worker's mean loss."""

    gradient_scale: float  # they are so many times as long, by loss scaling or an average taken before
    reductions: int  # which a step has; each is of its part of the loss
    batch: int  # samples of a step, on all workers

    def samples(self, num_workers: int) -> float:
        """Of a worker and reduction."""
        return self.batch / num_workers / self.reductions

    @property
    def square_factor(self) -> float:
        """From sums of squares over a step's reductions to their mean, of gradients of a mean loss."""
        return self.reductions / self.gradient_scale**2


class Told(NamedTuple):
    """What a reading has."""

    reading: Reading | None  # None without telemetry
    kept: list[float]  # how often each worker was kept
    changes: list[Change]  # who was left out, or is back
    parameters: dict[str, tuple[float, float, float]]  # length, agreement and noise scale, on the first rank


def watch_over(
    exchange: Exchange, transport: Transport, parallel: ParallelGroups, names: Sequence[str]
) -> "WorkerWatch":
    """The watch over a group of workers, as far as its config and rule ask for one; `names` are those of all
    of the model's parameters.
    """
    config, workers, device = exchange.config, exchange.workers, exchange.weighting.stats.device
    dense = workers is parallel.workers
    telemetry = config.telemetry if dense else None  # experts have other workers than the rest
    if workers.size == 1 or (telemetry is None and not config.mixing.observes):
        return WorkerWatch(exchange, None)
    group = parallel.model if dense else workers.decision_group
    steps = 1 if telemetry is None or config.mixing.observes else min(telemetry.every, _STEPS_TOGETHER)
    exchange.observer = observer = Observer(workers, group, exchange.gram, steps, device)
    if dense and transport is not Transport.STOCK:  # those of experts have others to be told of
        exchange.participation = Participation(workers.size, device)
    watch = WorkerWatch(exchange, observer, has_telemetry=telemetry is not None)
    if telemetry is not None and group.is_first:
        watch.measures = WorkerMeasures(workers.size, telemetry, device)
    if telemetry is not None and telemetry.per_parameter:
        infos = exchange.weighting.infos
        watch.parameters = ParameterObserver(workers, group, infos, names, telemetry.every)
        watch.parameter_noise = NoiseScale((len(names),), device)
    return watch


@dataclass
class WorkerWatch:
    """The watch over one group of workers."""

    exchange: Exchange
    observer: Observer | None
    measures: WorkerMeasures | None = None  # on the first rank of the observer's, if there is telemetry
    has_telemetry: bool = False
    parameters: ParameterObserver | None = None
    parameter_noise: NoiseScale | None = None
    _maps: tuple[RngKey, SketchMaps] | None = None  # of the latest step
    _observation: Observation | None = None  # of the steps up to the present one, if it was collected
    _steps: list[tuple[int, Units]] = field(default_factory=list)  # that are not measured yet
    _units: Units = field(default=Units(1.0, 1, 1))

    def before(self, parts: Sequence[Tensor], scale: float = 1.0) -> None:
        """Gradients, flat views, are about to be decided on; observed as multiplied by a scale."""
        if self.observer is not None and self.has_telemetry:
            self.observer.add_length(parts, scale)

    def after(self, parts: Sequence[Tensor], scale: float, dtypes: CommDtypes, key: RngKey) -> None:
        """They have been decided on, and are about to be reduced; exchanged by the rule, if it needs it."""
        config = self.exchange.config
        if self.observer is None or config.mixing.needs_gram:
            return
        if config.sketch_size is None:
            self.observer.add_exact(parts, scale, dtypes)
        else:
            self.observer.add_sketch(parts, scale, self._maps_of(key, config.sketch_size), config.tile_bytes)

    def _maps_of(self, key: RngKey, size: int) -> SketchMaps:
        if self._maps is None or self._maps[0] != key:
            device = self.exchange.weighting.stats.device
            self._maps = (key, SketchMaps(size, key.generator, device))
        return self._maps[1]

    def pre_step(self, *, is_read: bool) -> None:
        """All gradients of a step are reduced, and the optimizer is about to take it."""
        if self.observer is None or not (is_read or self.observer.is_full):
            return
        self._observation = observation = self.observer.collect()
        rule, state = self.exchange.config.mixing, self.exchange.state
        if isinstance(rule, NormMixing) and rule.observes:
            next_KW = torch.empty_like(state.values_KW)
            if observation is not None:
                next_KW = observe(rule, observation.gram_TWW[-1], state.values_KW).contiguous()
            if self.observer.group.num_ranks > 1:
                self.observer.group.broadcast(next_KW)
            state.observe(next_KW)

    def end_step(self, units: Units, step: int) -> None:
        """The optimizer has taken its step, counted from 1, or left it out."""
        self._units = units
        if (participation := self.exchange.participation) is not None:
            participation.end_step(step)
        if self.observer is None:
            return
        self._steps.append((step, units))
        if self.measures is not None and self._observation is not None:
            for observed, (number, of_step) in zip(
                zip(*self._observation, strict=True), self._steps, strict=True
            ):
                self._measure(self.measures, observed, of_step, number)
        if self.observer.end_step():
            self._observation, self._steps = None, []

    def read_parameters(self) -> dict[str, tuple[float, float, float]]:
        """Length, agreement and noise scale of every parameter, on the first rank; the host waits here."""
        if self.parameters is None or self.parameter_noise is None:
            return {}
        sums_2P = self.parameters.collect(self.exchange.weighting.stats.device)
        if sums_2P is None:
            return {}
        size, units = self.exchange.workers.size, self._units
        squares_P, of_sum_P = sums_2P * units.square_factor
        self.parameter_noise.add(estimates(squares_P, of_sum_P, size, units.samples(size)))
        agreement_P = (of_sum_P - squares_P) / ((size - 1) * squares_P)
        table_3P = torch.stack([(squares_P / size).sqrt(), agreement_P, self.parameter_noise.value])
        return dict(zip(self.parameters.names, map(tuple, table_3P.t().tolist()), strict=True))

    def _measure(
        self, measures: WorkerMeasures, observed: tuple[Tensor, Tensor], units: Units, step: int
    ) -> None:
        gram_WW, squares_W = (values * units.square_factor for values in observed)
        if self.exchange.workers.ranks_per_worker == 1:  # then lengths are known exactly
            gram_WW = gram_WW.diagonal_scatter(torch.where(squares_W.isfinite(), squares_W, 0.0))
            finite_W = observed[0].diagonal().isfinite()
            gram_WW = torch.where(finite_W[:, None] & finite_W, gram_WW, float("nan"))
        measures.add(gram_WW, squares_W, units.samples(len(squares_W)), step)

    def read(self) -> Told:
        """The numbers since the last reading; here the host waits for the device."""
        size = self.exchange.workers.size
        kept = [1.0] * size
        changes: list[Change] = []
        if self.exchange.participation is not None:
            kept, changes = self.exchange.participation.read()
        if not self.exchange.config.mixing.observes:  # other rules leave somebody out of many a step
            changes = []
        reading = None
        if self.has_telemetry and self.observer is not None:
            group, device = self.observer.group, self.exchange.weighting.stats.device
            values = torch.empty(packed_size(size), dtype=torch.float64, device=device)
            if self.measures is not None:
                values = self.measures.packed()
                self.measures.begin_period()
            if group.num_ranks > 1:
                group.broadcast(values)
            reading = unpack(values.tolist(), size)
        return Told(reading, kept, changes, self.read_parameters())

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: measures on the rank that has them."""
        participation = self.exchange.participation
        return {
            "measures": None if self.measures is None else self.measures.state_dict(),
            "participation": None if participation is None else participation.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any] | None) -> None:
        """Take over a checkpoint's, or start afresh."""
        saved = saved or {}
        if self.measures is not None:
            self.measures.load_state_dict(saved.get("measures"))
        if self.exchange.participation is not None:
            self.exchange.participation.load_state_dict(saved.get("participation"))
