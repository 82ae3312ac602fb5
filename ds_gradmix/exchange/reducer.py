"""The reduction of one engine's gradients, whatever the optimizer: a step from its first bucket to its end.

Each bucket goes downwards: check that all ranks are at the same bucket, sum over sequence-parallel ranks,
keep the worker's own gradient for extrapolation, leave out what is not finite, and then by one of the ways
of transport.py: left to DeepSpeed, weighted and left to DeepSpeed, or exchanged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ds_gradmix.comm.groups import ranks_of
from ds_gradmix.comm.workers import ParallelGroups, WorkerGroup
from ds_gradmix.config import GradmixConfig
from ds_gradmix.exchange.bucket import Bucket, CommDtypes, ParamSpan, ParamTable, runs_of
from ds_gradmix.exchange.exchange import Exchange, PendingExchange
from ds_gradmix.exchange.factor_momentum import FactorMomentum
from ds_gradmix.exchange.group_reduction import Backward, Grads, GroupReduction
from ds_gradmix.exchange.state import RuleState, WorkerWeights
from ds_gradmix.exchange.step_stats import StepStats
from ds_gradmix.exchange.transport import Transport, choose_transport
from ds_gradmix.exchange.watch import Told, Units, watch_over
from ds_gradmix.exchange.weighted import Weighting
from ds_gradmix.log import logger
from ds_gradmix.ops.stopwatch import Stopwatch
from ds_gradmix.rules import RngKey

_ADVICE = (
    "every worker must have the same gradients, of the same shapes, in the same order; look for "
    "parameters that only some workers use, say behind a branch on the data"
)
_UNEVEN = (
    "; or a tensor-parallel rank has larger parts than another, and fills buckets sooner: raise "
    "zero_optimization.reduce_bucket_size"
)


@dataclass
class _Step:
    """What lasts from a step's first reduction to its end."""

    reductions: int = 0
    gradient_scale: float = 1.0
    is_read: bool = True  # whether the host reads the numbers of this step


class GradientReducer:
    """The rules at work in one engine."""

    def __init__(
        self,
        config: GradmixConfig,
        parallel: ParallelGroups,
        params: ParamTable,
        weight_sum: float = 1.0,  # or the number of replicas, where gradients are summed instead of averaged
        weights: WorkerWeights | None = None,  # the extrapolated weights, if the rules have any
        averages: bool = False,  # DeepSpeed divides its sums by the number of ranks, weighted ones too
    ) -> None:
        self.config = config
        self.parallel = parallel
        self.transport = choose_transport(config, parallel.workers.size, parallel.sum_sequence_ranks)
        # Whether one decision is taken from all gradients of a step.
        self.decides_for_model = self.transport is not Transport.STOCK and config.decides_for_model
        self.stats: Mapping[str, float] = {}  # of the last step
        self.momentum: FactorMomentum | None = None
        if (rule := config.scaling) is not None and rule.factor_momentum > 0 and parallel.workers.size > 1:
            sizes = params.partition_sizes
            self.momentum = FactorMomentum(rule.factor_momentum, rule.idle_factor, sizes, params.device)
        self.weights = weights
        # What gradients of buckets have been divided by, when they come, and those of `prepare` have not.
        self.divisor = 1
        self._params = params
        self._tied = {} if self.transport is Transport.STOCK else dict(params.tied)  # combined by `prepare`
        self._sequence = parallel.sequence if parallel.sum_sequence_ranks else None  # to be summed over
        self.clock = Stopwatch(params.device)  # of what is done here, without DeepSpeed's own reduction
        self.clock.is_on = config.telemetry is not None
        self._sums = StepStats(params.device)
        self._groups = self._divide(weight_sum, averages)
        self._backward = Backward()
        self._step = _Step()
        mixing = [group.exchange.state for group in self._groups.values()]
        self.watch = self._groups[parallel.workers.ranks].watch
        self.state = RuleState(config, mixing, self.momentum, weights, params.layout, self.watch)
        # Whether a step may be skipped for what the rules decide, so that each has to be read.
        self._may_skip = self.transport is not Transport.STOCK and (
            config.mixing.may_skip or config.nonfinite == "drop"
        )

    def _divide(self, weight_sum: float, averages: bool) -> dict[tuple[int, ...], GroupReduction]:
        """The groups of workers by their ranks. Experts are spread over several data-parallel ranks: their
        gradient is the sum over a smaller group of workers, divided by the number of all.
        """
        groups, parallel, params = {}, self.parallel, self._params
        for workers in (*parallel.experts.values(), parallel.workers):
            share = weight_sum * workers.size / parallel.workers.size
            weighting = Weighting(self.config, workers, params.infos, self._sums, share)
            weighted = averages and self.transport is Transport.WEIGHTED
            weighting.averaged = weighted or self.transport is Transport.RESCALED
            exchange = Exchange(weighting, self.momentum)
            watch = watch_over(exchange, self.transport, parallel, params.names)
            groups[workers.ranks] = GroupReduction(exchange, self.transport, watch, self.clock)
        return groups

    def workers_of(self, group: Any) -> WorkerGroup:
        """The workers of a process group: the data-parallel one, or one of experts."""
        return self._groups[ranks_of(group)].exchange.workers

    def check(self, spans: tuple[ParamSpan, ...], occasion: str) -> None:
        """Raise `MismatchError` on every rank unless all are about to reduce these gradients."""

        def described() -> list[str]:
            infos = [(self._params.infos[span.param], span.length) for span in spans]
            return [f"{i.name} ({'a part of it' if i.partitioned else f'{n} elements'})" for i, n in infos]

        advice = _ADVICE if self.parallel.tensor is None else _ADVICE + _UNEVEN
        self.parallel.consistency.check_equal(spans, described, occasion, advice)

    # --- one backward ---

    def reduce(self, bucket: Bucket, key: RngKey, *, last: bool) -> None:
        """Reduce one bucket, in one tensor; others of the step may not be known yet. `key` is that of the
        step's random draws, and `last` says that these parameters are not reduced again in the step.
        """
        with self.clock:
            flat_N = bucket.load()
            if self._sequence is not None and not self._backward.sequence_summed:
                for start, length, _ in runs_of(bucket.spans):
                    self._sequence.all_reduce(flat_N.narrow(0, start, length))
            combined = self._backward.combined
            self._keep([(s.param, s.of(flat_N)) for s in bucket.spans if s.param not in combined], last=last)
            self._combine(bucket, key)

    def reduce_all(self, grads: Grads, buckets: Sequence[Bucket], dtypes: CommDtypes, key: RngKey) -> None:
        """Reduce all buckets of a step, whose gradients are `grads`."""
        with self.clock:
            self.check(tuple(ParamSpan(i, 0, grad.numel()) for i, grad in grads), "gradient reduction")
            self._sum_sequence_ranks(grads)
            self._keep([(i, grad.reshape(-1)) for i, grad in grads if i not in self._tied], last=True)
            pending: Sequence[PendingExchange | None] = self.prepare(grads, dtypes, key, buckets)
            for bucket, sent in zip(buckets, pending or [None] * len(buckets), strict=True):
                self._combine(bucket, key, sent)

    def prepare(
        self, grads: Grads, dtypes: CommDtypes, key: RngKey, buckets: Sequence[Bucket] = ()
    ) -> list[PendingExchange]:
        """Before the first of a step's buckets, where all gradients are known: what concerns all of them.

        Decides for the model, where that is the scope; `buckets`, where they are known, are then sent and
        returned. Replaces the gradients of tied parameters, which are summed over their pipeline stages, by
        their combination, taken on the first of these stages and copied to the others: what stages have in
        common must stay equal, but each reduces buckets of its own, with other parameters in them.
        """
        with self.clock:
            return self._prepare(grads, dtypes, key, buckets)

    def _prepare(
        self, grads: Grads, dtypes: CommDtypes, key: RngKey, buckets: Sequence[Bucket]
    ) -> list[PendingExchange]:
        pending = self._decide_for_model(grads, dtypes, key, buckets) if self.decides_for_model else []
        found = dict(grads)
        for index, tied in self._tied.items():
            if index in found:
                grad, workers = found[index].detach(), self.parallel.workers
                span = ParamSpan(index, 0, grad.numel())
                bucket = Bucket(
                    [grad],
                    (span,),
                    workers,
                    dtypes,
                    lambda: None,
                    workers.all_reduce,
                    observed_scale=1 / self.divisor,
                )
                flat_N = bucket.load()
                self._keep([(index, flat_N)], last=True)
                if tied.is_source:
                    self._combine(bucket, key)
                    flat_N = bucket.load()
                tied.copy(flat_N)
                bucket.store(flat_N)
                self._backward.combined.add(index)
        return pending

    def _decide_for_model(
        self, grads: Grads, dtypes: CommDtypes, key: RngKey, buckets: Sequence[Bucket]
    ) -> list[PendingExchange]:
        """Send all gradients, and decide; those that are in no bucket are sent once more to be combined."""
        if not buckets:
            self._sum_sequence_ranks(grads)
        left = [
            replace(bucket, spans=tuple(span for span in bucket.spans if span.param not in self._tied))
            for bucket in buckets
        ]
        group, model = self._groups[self.parallel.workers.ranks], self.parallel.model
        group.watch_model(grads, 1 / self.divisor)
        self._backward.decided, pending = group.decide_for_model(grads, dtypes, key, model, left)
        return pending

    def _sum_sequence_ranks(self, grads: Grads) -> None:
        """Sum gradients over the sequence ranks of a replica, in place, where DeepSpeed would not."""
        if self._sequence is not None:
            self._backward.sequence_summed = True
            self._sequence.all_reduce_batched([grad.detach() for _, grad in grads], self.config.tile_bytes)

    def _keep(self, grads: Grads, *, last: bool) -> None:
        """Before anything happens to gradients: extrapolation goes by the worker's own."""
        if self.weights is not None:
            # What data ranks with the same expert have in common is the mean of theirs.
            shares = [self._params.infos[i].weight_sum for i, _ in grads]
            parts = [g if share == 1.0 else g * share for (_, g), share in zip(grads, shares, strict=True)]
            self.weights.keep_gradients([i for i, _ in grads], parts, last=last)

    def _combine(self, bucket: Bucket, key: RngKey, pending: PendingExchange | None = None) -> None:
        self._groups[bucket.workers.ranks].reduce(bucket, key, self._backward, pending)

    def watch_alone(self, grads: Sequence[Tensor], dtypes: CommDtypes, key: RngKey) -> None:
        """Gradients are about to be averaged that make no bucket; where ranks hold parts, or experts, of a
        model, it is not known whose they are.
        """
        if grads and self.parallel.tensor is None and not self.parallel.experts:
            views = [grad.detach().reshape(-1) for grad in grads]
            self.watch.before(views, 1 / self.divisor)
            self.watch.after(views, 1 / self.divisor, dtypes, key)

    def end_backward(self, *, last: bool, gradient_scale: float) -> None:
        """All gradients of a backward pass are reduced; all ranks must have come to it."""
        self.check((), "end of the backward pass")
        self._backward = Backward()
        self._step.reductions += 1
        self._step.gradient_scale = gradient_scale
        if self.weights is not None:
            self.weights.end_backward(last=last, gradient_scale=gradient_scale)

    # --- one step ---

    def pre_step(self, step: int) -> bool:
        """The optimizer is about to step: whether it has to skip, because no worker agreed. `step` counts the
        steps before.
        """
        self.check((), "optimizer step")
        telemetry = self.config.telemetry
        self._step.is_read = telemetry is None or (step + 1) % telemetry.every == 0
        with self.clock:
            for group in self._groups.values():
                group.watch.pre_step(is_read=self._step.is_read)
        if self.transport is Transport.STOCK and self._step.is_read:
            self.stats = {}
        if self.transport is Transport.STOCK or not (self._step.is_read or self._may_skip):
            return False
        scaled = self.config.scaling is not None
        sketched = self.config.mixing.needs_gram and self.config.sketch_size is not None
        found = self._sums.read(self.parallel, scaled=scaled, sketched=sketched)
        self.stats = found if self._step.is_read else {**self.stats, **found}  # with the last reading's
        if not self.parallel.decisions_are_global and not self.config.mixing.observes:
            # Experts have a state of their own, for theirs.
            self.watch.exchange.state.sum_over(self.parallel.model)
        drops = self.stats.get("dropped_workers", 0.0)
        if drops > 0 and self.parallel.model.is_first:
            logger.warning(
                f"ds_gradmix: step {step + 1}: left a worker out of {drops:.0f} reduction(s), because "
                "its gradient was not finite"
            )
        return self.stats.get("skipped", 0.0) > 0

    def post_step(self, *, taken: bool, step: int, batch: int) -> Told | None:
        """The optimizer has taken the step, or left it out; what is to be told of it, if it is read.

        `step` counts the steps before this one, and `batch` is the step's samples.
        """
        with self.clock:
            self._end_step(taken=taken, step=step, batch=batch)
        is_read, self._step = self._step.is_read, _Step()
        return self.watch.read() if is_read else None

    def _end_step(self, *, taken: bool, step: int, batch: int) -> None:
        units = Units(self._step.gradient_scale, max(self._step.reductions, 1), batch)
        for group in self._groups.values():
            group.watch.end_step(units, step + 1)
        if self.momentum is not None:
            (self.momentum.commit if taken else self.momentum.discard)()
        for group in self._groups.values():
            group.exchange.state.end_step(taken=taken)
        if self.config.telemetry is not None and self.transport is Transport.STOCK:
            everyone = {"kept_fraction": 1.0, "effective_workers": float(self.parallel.workers.size)}
            self.stats = {**everyone, "agreed_fraction": 1.0, **self.stats}
        if self.stats or self.config.telemetry is not None:
            self.stats = {**self.stats, "skipped": float(not taken)}
        if self.weights is not None:
            self.weights.post_step(keep=taken and self.stats.get("dropped_workers", 0.0) == 0)

    def load(self, saved: dict[str, Any] | None, why: str) -> None:
        """Take over a checkpoint's state of the rules, or warn and start afresh; `why` there is none."""
        warning = self.state.load(saved, why)
        if warning and self.parallel.model.is_first:
            logger.warning(f"ds_gradmix: {warning}")
