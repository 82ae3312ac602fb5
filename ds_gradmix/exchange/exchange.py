"""The exchange that replaces averaging: every rank gets all W workers' gradients for its share, and combines
them.

    1. all-to-all: rank j gets every worker's gradient for region j (plan.py);  a rank sends (W-1)/W B
    2. Gram matrices of the shares are summed on the first rank, which decides; W^2 numbers
       it sends the weights, and the rule's next state, to all, so that
       they are identical;                                                       (3 + K) W numbers
    3. a scaling rule's L sums over every parameter, over the ranks;             L P numbers
    4. weighted combination, one pass over the share
    5. all-to-all of what was combined to its owners, unless regions are owned;  (W-1)/W B/W
       or to all ranks, where every one of them needs all of the result          (W-1)/W B

for a bucket of B bytes; stock ZeRO all-reduces it for 2 (W-1)/W B. Where each worker has n ranks, step 1 has
two levels (comm/workers.py): (n-1)/n B inside a worker, and (W-1)/W B/n between workers. With momentum of the
factors step 5 carries these as well, since the owner has their running mean.

Weights that are decided before the gradients are sent leave out step 2. Then the two levels of step 1 may be
those of nodes, whatever a worker is: a node's ranks sum their gradients, weighted, and send that. A decision
for the whole model, if not from sketches, needs steps 1 and 2 of all buckets first: these are suspended with
their gradients in their own memory, or, where that cannot be, sent once more.

Tensor-parallel ranks hold parts of the same gradients: in 2 and 3 the sums go over them, too, replicas
counted once, and the first of them all decides.

Memory beyond the bucket: at most 3 `tile_bytes`, plus the small numbers above. Steps 1 and 5 work in tiles;
what has been sent is overwritten by what was received, and that by the result.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from ds_gradmix.comm.groups import RankGroup
from ds_gradmix.comm.workers import WorkerGroup, sum_rows
from ds_gradmix.exchange.bucket import Bucket, CommDtypes, ParamSpan
from ds_gradmix.exchange.factor_momentum import FactorMomentum
from ds_gradmix.exchange.mixing_state import MixingState
from ds_gradmix.exchange.observer import Observer
from ds_gradmix.exchange.participation import Participation
from ds_gradmix.exchange.plan import ExchangePlan, columns_per_tile, even_sizes, plan_tiles, share_evenly
from ds_gradmix.exchange.tiled_buffer import TiledBuffer
from ds_gradmix.exchange.transport import decides_before
from ds_gradmix.exchange.weighted import Weighting
from ds_gradmix.ops.segments import Segments
from ds_gradmix.rules import GramianMixing, MixingDecision, NormMixing, RngKey, Scaling
from ds_gradmix.rules.apply import (
    decide_from_gram,
    decide_from_norms,
    layer_sums,
    mix,
    scaling_factors,
    scaling_statistics,
)
from ds_gradmix.rules.decision import Considered, packed, unpacked

_PLANS_KEPT = 1024  # compositions of buckets; they recur from step to step


class Decided(NamedTuple):
    """A decision, what the mixing rule's state is after it, `[S, K, W]`, and which workers count, `[W]`."""

    decision: MixingDecision
    next_state_SKW: Tensor | None
    present_W: Tensor


class GramShare(NamedTuple):
    """This rank's share of Gram matrices, which add up to them."""

    values_SWW: Tensor
    errors_S: Tensor | None = None  # the standard error of their cosines, where they are of sketches


class Exchange:
    """Exchanges and combines the buckets of one group of workers."""

    def __init__(self, weighting: Weighting, momentum: FactorMomentum | None) -> None:
        self.config = weighting.config
        self.workers = weighting.workers
        self.weighting = weighting
        self.momentum = momentum  # of a scaling rule's factors, if it has any
        initial_KW = self.config.mixing.initial_state(self.workers.size)
        self.state = MixingState(initial_KW, weighting.stats.device)
        self.observer: Observer | None = None  # of the model's Gram matrix
        self.participation: Participation | None = None
        self._nodes = self.workers.by_node() if decides_before(self.config) else None
        self._plans: dict[tuple[CommDtypes, bool, tuple[ParamSpan, ...], bool], ExchangePlan] = {}

    def send(self, bucket: Bucket, *, by_node: bool = False) -> "PendingExchange":
        """Prepare an exchange; the gradients are sent when the Gram matrix or combination is asked for.

        With `by_node` only the combination can be asked for, and is taken inside of nodes first if they are
        known and the weights are decided before.
        """
        nodes = self._nodes if by_node else None
        key = (bucket.dtypes, bucket.pieces is None, bucket.spans, nodes is not None)
        plan = self._plans.pop(key, None) or self._plan(bucket, nodes or self.workers)
        self._plans[key] = plan  # as the most recent one
        if len(self._plans) > _PLANS_KEPT:
            del self._plans[next(iter(self._plans))]
        return PendingExchange(self, bucket, plan, nodes)

    def _plan(self, bucket: Bucket, workers: WorkerGroup) -> ExchangePlan:
        spans = bucket.spans
        if bucket.pieces is not None:
            pieces = list(bucket.pieces(spans))
        else:
            sizes = even_sizes(sum(span.length for span in spans), workers.num_ranks)
            group = 0 if self.momentum is None else self.momentum.group_of(spans, sizes[workers.rank])
            pieces = share_evenly([(span.start, span.length) for span in spans], workers.num_ranks, group)
        comm_bytes, by_node = bucket.dtypes.num_bytes, workers is not self.workers
        columns = columns_per_tile(self.config, workers.num_ranks, workers.size, comm_bytes, by_node=by_node)
        tiles = plan_tiles(pieces, workers.order, workers.rank, columns)
        counted = [self.weighting.infos[span.param].counted for span in spans]
        device = bucket.tensors[0].device
        return ExchangePlan(
            tiles, pieces, workers.rank, workers.size, device, counted, workers.ranks_per_worker
        )

    def gram(self, grads: Sequence[Tensor], dtypes: CommDtypes) -> Tensor:
        """Gram matrix `[1, W, W]` of this rank's even share of entire gradients, which are only read."""
        workers, device = self.workers, self.weighting.stats.device
        columns = columns_per_tile(self.config, workers.num_ranks, workers.size, dtypes.num_bytes)
        flats, total = [], 0
        for grad in grads:
            flats.append((total, grad.reshape(-1)))
            total += grad.numel()
        gram_SWW = torch.zeros(1, workers.size, workers.size, dtype=torch.float64, device=device)
        for begin in range(0, total, columns * workers.num_ranks):
            end = min(begin + columns * workers.num_ranks, total)
            found = [(first, flat) for first, flat in flats if first < end and first + flat.numel() > begin]
            parts = [flat[max(begin - first, 0) : end - first] for first, flat in found]
            sent = torch.cat([part.to(dtypes.gradient) for part in parts])
            sizes = even_sizes(end - begin, workers.num_ranks)
            rows_WC = workers.exchange(sent, sizes, sent.new_empty(workers.receive_size(sizes)))
            gram_SWW += Segments([0], [rows_WC.shape[1]], 1, device, workers.size).gram(rows_WC)
        return gram_SWW

    def decide_on(
        self, flat_N: Tensor, spans: Sequence[ParamSpan], key: RngKey, gram: Callable[[], GramShare]
    ) -> Decided:
        """The decision for a bucket alone, from what `gram` returns if the rule needs Gram matrices."""
        group = self.workers.decision_group
        present_W = self.weighting.present([span.of(flat_N) for span in spans], group)
        if isinstance(self.config.mixing, NormMixing):
            if self.workers.ranks_per_worker > 1:
                return self.decide_by(gram(), present_W, key, group)
            return self.decide_from_norms(self.weighting.squares(flat_N, spans), present_W, group)
        if self.config.mixing.needs_gram:
            return self.decide(gram(), present_W, key, group)
        return Decided(self.weighting.decide(spans, present_W, key), None, present_W)

    def decide_by(self, gram: GramShare, present_W: Tensor, key: RngKey, group: RankGroup) -> Decided:
        """Decide from Gram matrices, by their diagonals alone if the rule looks at lengths: those of a sum
        over a worker's ranks are known from sketches.
        """
        if self.config.mixing.needs_gram:
            return self.decide(gram, present_W, key, group)
        squares_SW = gram.values_SWW.diagonal(dim1=1, dim2=2).contiguous()
        return self.decide_from_norms(squares_SW, present_W, group)

    def decide(self, gram: GramShare, present_W: Tensor, key: RngKey, group: RankGroup) -> Decided:
        """Decide from Gram matrices of which every rank of a group has a share; the first of them decides."""
        gram_SWW, errors_S = gram
        rule, state_KW = self.config.mixing, self.state.values_KW
        assert isinstance(rule, GramianMixing)
        group.reduce(gram_SWW)
        sent = gram_SWW.new_empty(len(gram_SWW), self.workers.size + 3 + state_KW.numel())
        if group.is_first:
            sent = packed(decide_from_gram(rule, gram_SWW, present_W, key, state_KW))
            if self.observer is not None:
                self.observer.add_gram(gram_SWW)
        group.broadcast(sent)
        decision, margin_S, next_state_SKW = unpacked(sent, self.workers.size)
        if errors_S is not None:
            self.weighting.stats.add_close_calls(margin_S < 3 * errors_S, group.num_ranks)
        return Decided(decision, next_state_SKW, present_W)

    def decide_from_norms(self, squares_SW: Tensor, present_W: Tensor, group: RankGroup) -> Decided:
        """The same from squared lengths of which every rank of a group has a share."""
        rule = self.config.mixing
        assert isinstance(rule, NormMixing)
        group.reduce(squares_SW)
        sent = squares_SW.new_empty(len(squares_SW), self.workers.size + 3)
        if group.is_first:
            norms_SW = squares_SW.clamp(min=0).sqrt()
            decision = decide_from_norms(rule, norms_SW, present_W, self.state.values_KW)
            sent = packed(Considered(decision, sent[:, 0], sent.new_empty(len(sent), 0, self.workers.size)))
        group.broadcast(sent)
        return Decided(unpacked(sent, self.workers.size).decision, None, present_W)

    def note(self, decided: Decided, elements_S: Tensor | float) -> None:
        """Take a decision on segments of so many elements into the statistics and the rule's state."""
        self.weighting.stats.add_decision(decided.decision, elements_S, decided.present_W)
        if self.participation is not None:
            self.participation.add(decided.decision, elements_S, decided.present_W)
        if decided.next_state_SKW is not None:
            self.state.add(decided.next_state_SKW, elements_S)

    def weigh(self, flat_N: Tensor, spans: Sequence[ParamSpan], decided: Decided) -> None:
        """Multiply a worker's own gradients by the weights that were decided."""
        self.note(decided, self.weighting.num_elements(spans, len(decided.decision.weights_SW)))
        self.weighting.weigh(flat_N, spans, decided.decision)


class PendingExchange:
    """A bucket between the sending of its gradients and their combination."""

    def __init__(
        self, exchange: Exchange, bucket: Bucket, plan: ExchangePlan, nodes: WorkerGroup | None
    ) -> None:
        self._exchange = exchange
        self._bucket = bucket
        self._plan = plan
        self._nodes = nodes
        self.tiled = TiledBuffer(nodes or exchange.workers, bucket, plan, exchange.momentum)

    def gram(self) -> Tensor:
        """Gram matrices `[S, W, W]` of this rank's share of the bucket."""
        plan, size = self._plan, self._exchange.workers.size
        if not plan.tiles:
            return torch.zeros(1, size, size, dtype=torch.float64, device=plan.device)
        by_param = self._exchange.config.scope == "parameter"
        segments = plan.by_param if by_param else plan.counted_as_one
        gram_SWW = reduce(torch.add, (segments[k].gram(grads_WC) for k, grads_WC in self.tiled.sweep()))
        if by_param:
            return gram_SWW if plan.counted_P is None else gram_SWW * plan.counted_P[:, None, None]
        return gram_SWW[:1] if any(plan.counted) else torch.zeros_like(gram_SWW)

    def combine(self, decided: Decided) -> None:
        """Write the combination of all workers' gradients to every owner's slices; the rest of the bucket is
        undefined afterwards. Gradients of workers that are not present must be finite.
        """
        tiled, plan, exchange, decision = self.tiled, self._plan, self._exchange, decided.decision
        if not plan.tiles:
            return
        tiled.resume()
        one_row = len(decision.weights_SW) == 1
        elements_S = float(sum(plan.num_elements)) if one_row else plan.num_elements_P
        exchange.note(decided, elements_S)
        weights_WS = decision.weights_SW.t().float()
        segments = plan.as_one if one_row else plan.by_param
        if exchange.config.scaling is not None:
            self._scale(exchange.config.scaling, segments, weights_WS)
        elif self._nodes is not None:
            self._sum_by_node(self._nodes, weights_WS)
        else:
            weights_WS = weights_WS * exchange.weighting.weight_sum
            for k, grads_WC in tiled.sweep(last=True):
                tiled.write_result(k, mix(grads_WC, weights_WS, segments[k]))
        self._bucket.store(tiled.flat_N)
        tiled.release()

    def _sum_by_node(self, nodes: WorkerGroup, weights_WS: Tensor) -> None:
        """Weighted sums inside of nodes, and sums of these, whatever a worker is."""
        weighting, workers = self._exchange.weighting, self._exchange.workers
        first = nodes.number * nodes.ranks_per_worker  # of the node's ranks, each a part of its worker
        numbers = [rank // workers.ranks_per_worker for rank in range(first, first + nodes.ranks_per_worker)]
        own_RS = torch.cat([weights_WS.narrow(0, number, 1) for number in numbers])  # a list would be copied
        weights_RS = own_RS * (weighting.weight_sum / workers.replicas_per_worker)
        segments = self._plan.place_as_one if weights_WS.shape[1] == 1 else self._plan.place_by_param
        merges = [lambda rows_RC, own=own: mix(rows_RC, weights_RS, own) for own in segments]
        for k, rows_WC in self.tiled.sweep(last=True, merges=merges):
            self.tiled.write_result(k, sum_rows(rows_WC))

    def _scale(self, rule: Scaling, segments: Sequence[Segments], weights_WS: Tensor) -> None:
        """Statistics of all tiles, their sums over every parameter on all the ranks, and factors."""
        tiled, plan, exchange, counted_P = self.tiled, self._plan, self._exchange, self._plan.counted_P
        stashes = rule.num_layer_terms > 0 and tiled.can_stash(1 + rule.num_statistics)

        def statistics(last: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
            for k, grads_WC in tiled.sweep(last):
                yield k, *scaling_statistics(rule, grads_WC, weights_WS, segments[k])

        size = (rule.num_layer_terms, len(plan.counted))
        sums_LP = torch.zeros(size, dtype=torch.float64, device=plan.device)
        if rule.num_layer_terms > 0:  # of which the factors need the whole parameters' sums
            for k, mean_C, statistics_KC in statistics(last=stashes):
                sums_LP += layer_sums(rule, mean_C, statistics_KC, plan.by_param[k])
                if stashes:
                    tiled.stash(k, torch.cat([mean_C[None], statistics_KC]))
            if counted_P is not None:
                sums_LP *= counted_P
            exchange.workers.sum_over_shares(sums_LP)
        if exchange.momentum is not None:
            exchange.momentum.begin(plan.owned)
        stashed = ((k, rows[0], rows[1:]) for k, rows in tiled.stashed(1 + rule.num_statistics))
        for k, mean_C, statistics_KC in stashed if stashes else statistics(last=True):
            factors_C = scaling_factors(rule, mean_C, statistics_KC, sums_LP, plan.by_param[k])
            counted_C = None if counted_P is None else plan.by_param[k].expand(counted_P[None])[0]
            exchange.weighting.stats.add_factors(factors_C, rule.least_factor, counted_C)
            tiled.write_result(k, mean_C * exchange.weighting.weight_sum, factors_C)
