"""What an engine's adapter is given, and the reduction that it builds from it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ds_gradmix.comm.consistency import fingerprint_of
from ds_gradmix.comm.workers import ParallelGroups
from ds_gradmix.config import GradmixConfig
from ds_gradmix.engines.parallel_groups import Named, params_of, shard_info
from ds_gradmix.engines.telemetry import StepReporter
from ds_gradmix.exchange.bucket import ParamTable
from ds_gradmix.exchange.reducer import GradientReducer
from ds_gradmix.exchange.state import WorkerWeights
from ds_gradmix.rules import RngKey
from ds_gradmix.weights.extrapolated import ExtrapolatedWeights
from ds_gradmix.weights.gradient_window import ParamLayout


class EngineContext(NamedTuple):
    """An engine, as its adapter sees it."""

    config: GradmixConfig
    parallel: ParallelGroups
    step: Callable[[], int]  # optimizer steps taken so far, skipped ones included
    batch: Callable[[], int]  # samples of an optimizer step, on all ranks
    report: StepReporter  # is called after each step
    sums_gradients: bool  # gradient_allreduce_op "sum"

    def end_step(self, reducer: GradientReducer, *, taken: bool) -> None:
        """The optimizer has taken its step, or left it out."""
        told = reducer.post_step(taken=taken, step=self.step(), batch=self.batch())
        self.report(reducer, told)

    @property
    def measure_every(self) -> int:
        """Steps between those whose offset is measured; 0 is never."""
        return 0 if self.config.telemetry is None else self.config.telemetry.every

    @property
    def key(self) -> RngKey:
        """Of this step's random draws."""
        return RngKey(self.config.seed, self.step())


def build_reducer(
    context: EngineContext,
    named: Named,
    memory: ParamLayout,
    weights: WorkerWeights | None = None,
    *,
    partition_sizes: Sequence[int] = (),
    averages: bool = False,
) -> GradientReducer:
    """The reduction of an engine's gradients.

    Args:
        context: of the engine.
        named: the optimizer's parameters, which are known by their position here.
        memory: where they lie.
        weights: the extrapolated weights, if the rules have any.
        partition_sizes: elements that this rank owns in each of the optimizer's parameter groups.
        averages: whether DeepSpeed divides what it sums by the number of ranks, and does nothing else.
    """
    config, parallel = context.config, context.parallel
    device = named[0][1].device if named else torch.device("cpu")
    positions = {id(p): i for i, (_, p) in enumerate(named)}
    tied = [(positions[id(p)], copies) for p, copies in parallel.tied if id(p) in positions]
    words = [f"{name} {place}" for (name, _), place in zip(named, memory.places, strict=True)]
    layout = fingerprint_of([f"{parallel.workers.num_ranks} ranks", *words])
    infos, names = params_of(parallel, named)
    params = ParamTable(infos, device, layout, names, partition_sizes, tied)
    weight_sum = float(parallel.workers.num_replicas) if context.sums_gradients else 1.0
    return GradientReducer(config, parallel, params, weight_sum, weights, averages)


def extrapolated_weights(
    context: EngineContext, named: Named, memory: ParamLayout, *, accumulates: bool
) -> ExtrapolatedWeights | None:
    """The extrapolated weights of an engine whose ranks have whole parameters, if its rules have any.

    Args:
        accumulates: whether gradients of one step come in several reductions.
    """
    config, parallel = context.config, context.parallel
    if config.extrapolation is None:
        return None
    weights = ExtrapolatedWeights(
        config.extrapolation,
        memory,
        (config.seed, parallel.workers.number),
        accumulates=accumulates,
        shards=shard_info(parallel, named),
        levels=parallel.workers.levels,
    )
    weights.measure_every = context.measure_every
    return weights
