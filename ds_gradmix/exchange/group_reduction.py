"""The reduction of one group of workers' gradients: the ways of a bucket, and a decision for all of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from ds_gradmix.comm.groups import RankGroup
from ds_gradmix.config import OBSERVED_SKETCH
from ds_gradmix.exchange.bucket import Bucket, CommDtypes, ParamSpan, runs_of
from ds_gradmix.exchange.exchange import Decided, Exchange, GramShare, PendingExchange
from ds_gradmix.exchange.sketched import Segment, SketchedGrams
from ds_gradmix.exchange.transport import Transport
from ds_gradmix.exchange.watch import WorkerWatch
from ds_gradmix.ops.stopwatch import Stopwatch
from ds_gradmix.rules import NormMixing, RngKey

Grads = Sequence[tuple[int, Tensor]]  # position and gradient of parameters


@dataclass
class Backward:
    """What lasts from the first reduction of a backward pass to its end."""

    decided: Decided | None = None  # for the whole model
    combined: set[int] = field(default_factory=set)  # tied parameters whose gradient is combined already
    sequence_summed: bool = False  # all gradients are summed over sequence-parallel ranks


class GroupReduction:
    """The rules at work in one group of workers; `clock` measures how long they take."""

    def __init__(
        self, exchange: Exchange, transport: Transport, watch: WorkerWatch, clock: Stopwatch
    ) -> None:
        config, weighting = exchange.config, exchange.weighting
        self.exchange = exchange
        self.transport = transport
        self.watch = watch
        self._infos = weighting.infos
        self._clock = clock
        size = config.sketch_size if config.mixing.needs_gram else None
        if isinstance(config.mixing, NormMixing) and exchange.workers.ranks_per_worker > 1:
            size = config.sketch_size or OBSERVED_SKETCH  # lengths of sums over ranks
        self.sketches = None if size is None else SketchedGrams(exchange, size)

    def watch_model(self, grads: Grads, scale: float) -> None:
        """All gradients are about to be decided on at once; observed as multiplied by a scale."""
        counted = [grad.detach().reshape(-1) for i, grad in grads if self._infos[i].counted]
        self.watch.before(counted, scale)

    def decide_for_model(
        self, grads: Grads, dtypes: CommDtypes, key: RngKey, model: RankGroup, buckets: Sequence[Bucket]
    ) -> tuple[Decided, list[PendingExchange]]:
        """One decision from all gradients; where these are exchanged for it, `buckets`, which hold all of
        them but those of `grads`, are sent and returned.
        """
        in_buckets = {span.param for bucket in buckets for span in bucket.spans}
        alone = [(i, grad.detach().reshape(-1)) for i, grad in grads]
        exchange = self.exchange
        present_W = exchange.weighting.present([grad for _, grad in alone], model)
        counted = [(i, grad) for i, grad in alone if self._infos[i].counted]
        parts = [grad for _, grad in counted]
        if self.sketches is not None:
            gram = self.sketches.of([Segment(counted[0][0], parts)] if counted else [], key)
            return exchange.decide_by(gram, present_W, key, model), []
        if not exchange.config.mixing.needs_gram:
            squares_SW = exchange.weighting.squares_of([parts])
            return exchange.decide_from_norms(squares_SW, present_W, model), []
        gram_SWW = exchange.gram([grad for i, grad in counted if i not in in_buckets], dtypes)
        pending = []
        for bucket in buckets:
            pending.append(exchange.send(bucket))
            gram_SWW += pending[-1].gram()
            pending[-1].tiled.suspend()
        return exchange.decide(GramShare(gram_SWW), present_W, key, model), pending

    def reduce(
        self, bucket: Bucket, key: RngKey, backward: Backward, pending: PendingExchange | None = None
    ) -> None:
        """Reduce a bucket, which may be sent already."""
        combined = backward.combined
        spans = tuple(span for span in bucket.spans if span.param not in combined)
        done = [span for span in bucket.spans if span.param in combined]
        if backward.decided is None:
            self.watch.before(self._watched(bucket, spans), bucket.observed_scale)
        if self.transport is Transport.STOCK:
            self._observe(bucket, spans, None, key)
            self._clock.pause(bucket.replay)
        elif self.transport is Transport.EXCHANGE:
            for start, output in bucket.outputs:
                if any(span.start <= start < span.start + span.length for span in done):
                    output.add_(bucket.load().narrow(0, start, output.numel()).to(output.dtype))
            pending = pending or self.exchange.send(replace(bucket, spans=spans), by_node=True)
            decided, flat_N = backward.decided, None
            if decided is None:
                flat_N = pending.tiled.flat_N
                decided = self._decide(flat_N, spans, key, pending)
            self._observe(bucket, spans, flat_N, key)
            pending.combine(decided)
        else:
            self._weigh(bucket, spans, done, key, backward.decided)

    def _weigh(
        self,
        bucket: Bucket,
        spans: tuple[ParamSpan, ...],
        done: Sequence[ParamSpan],
        key: RngKey,
        decided: Decided | None,
    ) -> None:
        """Multiply each worker's gradient, and have DeepSpeed sum or average."""
        flat_N = bucket.load()
        decided = decided or (self._decide(flat_N, spans, key) if spans else None)
        self._observe(bucket, spans, flat_N, key)
        if spans and decided is not None:
            self.exchange.weigh(flat_N, spans, decided)
        if self.transport is Transport.RESCALED:
            bucket.store(flat_N)
            self._clock.pause(bucket.replay)
            return
        for span in done if bucket.workers.rank != 0 else ():
            span.of(flat_N).zero_()  # it is there already, and survives the sum
        self._clock.pause(lambda: bucket.sum(flat_N))
        bucket.store(flat_N)

    def _observe(
        self, bucket: Bucket, spans: Sequence[ParamSpan], flat_N: Tensor | None, key: RngKey
    ) -> None:
        """A bucket is about to be reduced, from `flat_N` if that is not None."""
        parts = self._watched(bucket, spans, flat_N)
        self.watch.after(parts, bucket.observed_scale, bucket.dtypes, key)
        if (observer := self.watch.parameters) is not None and observer.is_due(key):
            for span in spans:
                if self._infos[span.param].counted and span.length > 0:
                    views = bucket.views([span]) if flat_N is None else [span.of(flat_N)]
                    observer.add(span.param, views, bucket, key)

    def _watched(
        self, bucket: Bucket, spans: Sequence[ParamSpan], flat_N: Tensor | None = None
    ) -> list[Tensor]:
        """Views of what is watched of a bucket: of replicas only one."""
        if self.watch.observer is None:
            return []
        counted = [span for span in spans if self._infos[span.param].counted]
        if flat_N is None:
            return bucket.views(counted)
        return [flat_N.narrow(0, start, length) for start, length, _ in runs_of(counted)]

    def _decide(
        self,
        flat_N: Tensor,
        spans: tuple[ParamSpan, ...],
        key: RngKey,
        pending: PendingExchange | None = None,
    ) -> Decided:
        """The decision for a bucket alone: from Gram matrices of sketches, or of what is exchanged."""

        def gram() -> GramShare:
            if self.sketches is not None:
                return self.sketches.of_bucket(flat_N, spans, key)
            assert pending is not None
            return GramShare(pending.gram())

        return self.exchange.decide_on(flat_N, spans, key, gram)
