"""The reduction that replaces averaging: every rank gets all W copies of its share, and combines them.

    1. all-to-all: rank j gets every worker's gradient for region j (layout.py);  a rank sends (W-1)/W B
    2. Gram matrices of the shares are summed on the first rank, which decides;   W^2 numbers
       it tells the weights to all: identical by construction;                    W numbers
    3. a scaling rule's mean ratio of every parameter, summed over the ranks;     P numbers
    4. weighted combination, one pass over the share
    5. all-to-all of what was combined to its owners, unless regions are owned;   (W-1)/W B/W
       or to all ranks, where every one of them needs the whole result            (W-1)/W B

for a bucket of B bytes; stock ZeRO all-reduces it for 2 (W-1)/W B. Where each worker has n ranks, step 1 has
two levels (workers.py): (n-1)/n B inside a worker, and (W-1)/W B/n between workers. With a smoothed scaling
rule hop 5 carries the factors as well, since the owner has their running mean. Weights known beforehand leave
out step 2. A decision for the whole model needs step 1 of all buckets first: they are gathered and kept where
they are, or, where that cannot be, sent once more.

Tensor-parallel ranks hold parts of the same gradients: in 2 and 3 the sums go over them, too, replicas
counted once, and the first of them all decides.

Memory beyond the bucket: at most 3 `tile_bytes`, plus the small numbers above. Steps 1 and 5 work in tiles;
what has been sent is overwritten by what was received, and that by the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ds_gradmix.comm.groups import RankGroup
from ds_gradmix.comm.workers import WorkerGroup
from ds_gradmix.config import GradmixConfig
from ds_gradmix.exchange.factor_momentum import FactorMomentum
from ds_gradmix.exchange.plan import Piece, Tile, even_sizes, plan_tiles
from ds_gradmix.exchange.step_stats import StepStats
from ds_gradmix.exchange.tiled_buffer import CommDtypes, TiledBuffer
from ds_gradmix.ops.segments import Segments, to_device
from ds_gradmix.rules import GramianMixing, MixingDecision, RngKey, Scaling
from ds_gradmix.rules.apply import decide_from_gram, layer_sums, mix, scaling_factors, scaling_statistics


@dataclass(frozen=True)
class ExchangePlan:
    """How one composition of a bucket is exchanged."""

    tiles: list[Tile]
    pieces: list[Piece]
    rank: int
    num_workers: int
    device: torch.device
    counted: list[bool]  # of every parameter of the bucket, whether this rank adds it to sums over the ranks
    whole: bool  # every rank gets all of the result

    @cached_property
    def owned(self) -> list[Piece]:
        """What this rank owns of the bucket."""
        return [piece for piece in self.pieces if piece.owner == self.rank]

    @cached_property
    def num_elements(self) -> list[int]:
        """Elements of every parameter of the bucket that this rank counts."""
        numbers = [0] * self._num_parameters
        for piece in self.pieces:
            numbers[piece.parameter] += piece.length if self.counted[piece.parameter] else 0
        return numbers

    @cached_property
    def elements(self) -> Tensor:
        """The same, `[P]` float64."""
        return to_device(torch.tensor(self.num_elements, dtype=torch.float64), self.device)

    @cached_property
    def parameters(self) -> list[Segments]:
        """Of every tile, one segment a parameter of the bucket."""
        return self._segments(list(range(self._num_parameters)))

    @cached_property
    def together(self) -> list[Segments]:
        """Of every tile, as one segment."""
        return self._segments([0] * self._num_parameters)

    @cached_property
    def together_once(self) -> list[Segments]:
        """Of every tile, one segment of what is counted; and one of what is not, where there is such."""
        return self._segments([int(not counts) for counts in self.counted])

    @cached_property
    def counted_P(self) -> Tensor | None:
        """1 or 0 for every parameter of the bucket, float64; None if all are counted."""
        if all(self.counted):
            return None
        return to_device(torch.tensor(self.counted, dtype=torch.float64), self.device)

    def _segments(self, segment_of: list[int]) -> list[Segments]:
        return [tile.segments(segment_of, self.device, self.num_workers) for tile in self.tiles]

    @property
    def _num_parameters(self) -> int:
        return len(self.counted)


def columns_per_tile(block: GradmixConfig, num_ranks: int, num_workers: int, wire_bytes: int) -> int:
    """Elements a rank combines at a time, such that 3 `tile_bytes` hold all that a tile needs.

    Per column: `wire_bytes` for every rank, an element sent and one received; up to 12 float32 of
    statistics; and for the work of each worker a float64 (Gram matrix, or gradients in float32), or half as
    much again where weights differ by parameter, or six times as much for Gram matrices by parameter (blocks
    that parameters share are copied for each); and a float32 more where its ranks' parts are summed.
    """
    work = 8
    if block.mixing.by_parameter:
        work = 12
    if block.mixing.needs_gram and block.scope == "parameter":
        work = 48
    if num_ranks > num_workers:
        work += 4
    per_column = num_ranks * wire_bytes + num_workers * work + 48
    return max(3 * block.tile_bytes // per_column, 1)


class Exchange:
    """Combines buckets by a block's rules over a group of workers.

    Args:
        workers: who exchanges.
        block: mixing, scaling, scope and tile size.
        record: takes note of what was decided.
        smoothing: state of a smoothed scaling rule, if it is one.
        share: what the combined gradient is multiplied by.
    """

    def __init__(
        self,
        workers: WorkerGroup,
        block: GradmixConfig,
        record: StepStats,
        smoothing: FactorMomentum | None = None,
        share: float = 1.0,
    ) -> None:
        self._workers = workers
        self._block = block
        self._record = record
        self._smoothing = smoothing
        self._share = share
        self._by_parameter = block.mixing.needs_gram and block.scope == "parameter"

    def plan(
        self,
        pieces: Sequence[Piece],
        wire: CommDtypes,
        device: torch.device,
        *,
        counted: Sequence[bool],
        whole: bool = False,
    ) -> ExchangePlan:
        """ExchangePlan the exchange of a bucket, given all its pieces in order. Worth keeping: buckets recur.

        `counted` tells of every parameter of the bucket whether this rank adds it to sums over the ranks.
        """
        workers = self._workers
        columns = columns_per_tile(self._block, workers.num_ranks, workers.size, wire.num_bytes)
        tiles = plan_tiles(pieces, workers.order, workers.rank, columns)
        return ExchangePlan(tiles, list(pieces), workers.rank, workers.size, device, list(counted), whole)

    def combine(
        self,
        flat_N: Tensor,
        plan: ExchangePlan,
        wire: CommDtypes,
        moment: RngKey,
        present_W: Tensor,
        known: MixingDecision | None,
        outputs: Sequence[Tensor] = (),
        last_tile: Tensor | None = None,
    ) -> None:
        """Replace, in every owner's slices of the bucket, its own gradient by the combination of all
        workers'.

        Args:
            flat_N: the bucket, this worker's gradients; elsewhere than in owned slices undefined afterwards.
            plan: of this composition of the bucket.
            wire: the dtypes in which gradients travel.
            moment: keys what is drawn at random.
            present_W: which workers count; the gradient of one that does not must be finite.
            known: the weights, if they do not depend on this bucket; one row, or one a parameter.
            outputs: for each of `plan.owned`, what its combined gradient is also added to, unless empty.
            last_tile: what `gather` gave, if the bucket has been gathered.
        """
        if not plan.tiles:
            return
        transit = TiledBuffer(
            self._workers,
            flat_N,
            plan.tiles,
            wire,
            list(zip(plan.owned, outputs, strict=True)) if outputs else (),
            whole=plan.whole,
            last_tile=last_tile,
        )
        verdict = known
        if verdict is None:
            verdict = self.decide(self._gram(transit, plan), moment, present_W, self._workers.decision_group)
        one_row = len(verdict.weights_SW) == 1
        elements_S = float(sum(plan.num_elements)) if one_row else plan.elements
        self._record.add_verdict(verdict, elements_S, present_W)
        weights_WS = verdict.weights_SW.t().float()
        segments = plan.together if one_row else plan.parameters
        if self._block.scaling is not None:
            self._scale(self._block.scaling, transit, plan, segments, weights_WS)
            return
        weights_WS = weights_WS * self._share
        for k, grads_WC in transit.sweep(last=True):
            transit.place(k, mix(grads_WC, weights_WS, segments[k]))

    def gather(self, flat_N: Tensor, plan: ExchangePlan, wire: CommDtypes) -> tuple[Tensor, Tensor]:
        """Step 1 alone: Gram matrix `[1, W, W]` of this rank's share, and the last tile for `combine`.

        Until that follows, the bucket's memory holds what all workers have for this rank's share.
        """
        if not plan.tiles:
            size = self._workers.size
            return torch.zeros(1, size, size, dtype=torch.float64, device=flat_N.device), flat_N.new_empty(0)
        transit = TiledBuffer(self._workers, flat_N, plan.tiles, wire, whole=plan.whole)
        return self._gram(transit, plan), transit.interrupt()

    def _gram(self, transit: TiledBuffer, plan: ExchangePlan) -> Tensor:
        """Gram matrices `[S, W, W]` of this rank's share of the bucket."""
        if self._by_parameter:
            gram_SWW = _total(plan.parameters[k].gram(grads_WC) for k, grads_WC in transit.sweep())
            return gram_SWW if plan.counted_P is None else gram_SWW * plan.counted_P[:, None, None]
        gram_SWW = _total(plan.together_once[k].gram(grads_WC) for k, grads_WC in transit.sweep())
        return gram_SWW[:1] if plan.counted[0] or len(gram_SWW) == 2 else torch.zeros_like(gram_SWW)

    def _scale(
        self,
        rule: Scaling,
        transit: TiledBuffer,
        plan: ExchangePlan,
        segments: Sequence[Segments],
        weights_WS: Tensor,
    ) -> None:
        """Statistics of all tiles, their means over every parameter on all the ranks, and factors."""
        sums_2S: list[Tensor] = []
        for k, grads_WC in transit.sweep():
            signal = scaling_statistics(rule, grads_WC, weights_WS, segments[k])
            sums_2S.append(layer_sums(rule, signal, plan.parameters[k]))
            if transit.holds_signals:
                transit.hold(k, signal)
        total_2S = _total(iter(sums_2S))
        if plan.counted_P is not None:
            total_2S = total_2S * plan.counted_P
        self._workers.sum_over_shares(total_2S)
        if self._smoothing is not None:
            self._smoothing.begin(plan.owned)
        again = (
            transit.held()
            if transit.holds_signals
            else (
                (k, scaling_statistics(rule, g_WC, weights_WS, segments[k]))
                for k, g_WC in transit.sweep(last=True)
            )
        )
        for k, signal in again:
            factors_C = scaling_factors(rule, signal, total_2S, plan.parameters[k])
            counted_C = None
            if plan.counted_P is not None:
                counted_C = plan.parameters[k].expand(plan.counted_P[None])[0]
            self._record.add_factors(factors_C, counted_C)
            transit.place(k, signal[0] * self._share, factors_C, self._smoothing)

    def gram(self, grads: Sequence[Tensor], wire: CommDtypes, device: torch.device) -> Tensor:
        """Gram matrix `[1, W, W]` of this rank's share of whole gradients, which are read; nothing is kept.

        Any division of the elements among the R ranks serves, so each tile is cut into R equal parts.
        """
        workers = self._workers
        columns = columns_per_tile(self._block, workers.num_ranks, workers.size, wire.num_bytes)
        pieces, start = [], 0
        for grad in grads:
            pieces.append((start, grad.reshape(-1)))
            start += grad.numel()
        total = torch.zeros(1, workers.size, workers.size, dtype=torch.float64, device=device)
        for begin in range(0, start, columns * workers.num_ranks):
            end = min(begin + columns * workers.num_ranks, start)
            parts = [
                flat[max(begin - first, 0) : end - first]
                for first, flat in pieces
                if first < end and first + flat.numel() > begin
            ]
            sent = torch.cat([part.to(wire.gradient) for part in parts])
            sizes = even_sizes(end - begin, workers.num_ranks)
            rows_WC = workers.exchange(sent, sizes, sent.new_empty(workers.receive_size(sizes)))
            segment = Segments([0], [rows_WC.shape[1]], 1, sent.device, workers.size)
            total += segment.gram(rows_WC)
        return total

    def decide(
        self, gram_SWW: Tensor, moment: RngKey, present_W: Tensor, circle: RankGroup
    ) -> MixingDecision:
        """Decide from Gram matrices of which every rank of the circle has a share.

        The first rank decides and tells the others, since a sum is not promised to be bit-identical
        everywhere.
        """
        rule = self._block.mixing
        assert isinstance(rule, GramianMixing)
        circle.reduce(gram_SWW)
        if circle.is_first:
            packed = decide_from_gram(rule, gram_SWW, present_W, moment).packed()
        else:
            packed = gram_SWW.new_empty(gram_SWW.shape[0], self._workers.size + 2)
        circle.broadcast(packed)
        return MixingDecision.unpacked(packed)


def _total(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total = total + part
    return total
