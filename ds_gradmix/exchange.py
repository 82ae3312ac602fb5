"""The reduction that replaces averaging: every rank gets all W copies of its share, and combines them.

    1. all-to-all: rank j gets every worker's gradient for region j (layout.py);  a rank sends (W-1)/W B
    2. Gram matrices of the shares are summed on the first rank, which decides;   W^2 numbers
       it tells the weights to all: identical by construction;                    W numbers
    3. a scaling rule's mean ratio of every parameter, summed over the ranks;     P numbers
    4. weighted combination, one pass over the share
    5. all-to-all of what was combined to its owners, unless regions are owned;   (W-1)/W B/W

for a bucket of B bytes; stock ZeRO all-reduces it for 2 (W-1)/W B. With a smoothed scaling rule hop 5 carries
the factors as well, since the owner has their running mean. Weights known beforehand leave out step 2.

Memory beyond the bucket: at most 3 `tile_bytes`, plus the small numbers above. Steps 1 and 5 work in tiles;
what has been sent is overwritten by what was received, and that by the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ds_gradmix.config import Block
from ds_gradmix.decision import Verdict, gram_verdict
from ds_gradmix.layout import Piece, Tile, plan_tiles
from ds_gradmix.mixing import GramMixing, Moment
from ds_gradmix.record import Record
from ds_gradmix.scaling import Scaling
from ds_gradmix.segments import Segments, to_device, weighted_sum
from ds_gradmix.smoothing import Smoothing
from ds_gradmix.transit import Transit, Wire
from ds_gradmix.workers import Workers


@dataclass(frozen=True)
class Plan:
    """How one composition of a bucket is exchanged."""

    tiles: list[Tile]
    pieces: list[Piece]
    rank: int
    num_workers: int
    device: torch.device

    @cached_property
    def owned(self) -> list[Piece]:
        """What this rank owns of the bucket."""
        return [piece for piece in self.pieces if piece.owner == self.rank]

    @cached_property
    def elements(self) -> Tensor:
        """Elements of every parameter of the bucket, `[P]` float64."""
        counts = [0] * self._num_parameters
        for piece in self.pieces:
            counts[piece.parameter] += piece.length
        return to_device(torch.tensor(counts, dtype=torch.float64), self.device)

    @cached_property
    def parameters(self) -> list[Segments]:
        """Of every tile, one segment a parameter of the bucket."""
        return [tile.segments(self._num_parameters, self.device, self.num_workers) for tile in self.tiles]

    @cached_property
    def whole(self) -> list[Segments]:
        """Of every tile, as one segment."""
        return [tile.segments(1, self.device, self.num_workers) for tile in self.tiles]

    @property
    def _num_parameters(self) -> int:
        return 1 + max((piece.parameter for piece in self.pieces), default=0)


def columns_per_tile(block: Block, num_workers: int, wire: Wire) -> int:
    """Elements a rank combines at a time, such that 3 `tile_bytes` hold all that a tile needs.

    Per column: W elements sent and W received, in the wire's dtype; up to 12 float32 of statistics; and for
    the work W float64 (Gram matrix, or gradients in float32), or half as much again where weights differ by
    parameter, or six times as much for Gram matrices by parameter (blocks that parameters share are copied
    for each).
    """
    work = 8
    if block.mixing.by_parameter:
        work = 12
    if block.mixing.needs_gram and block.scope == "parameter":
        work = 48
    per_column = num_workers * (wire.num_bytes + work) + 48
    return max(3 * block.tile_bytes // per_column, 1)


class Exchange:
    """Combines buckets by a block's rules over a group of workers.

    Args:
        workers: who exchanges.
        block: mixing, scaling, scope and tile size.
        record: takes note of what was decided.
        smoothing: state of a smoothed scaling rule, if it is one.
    """

    def __init__(
        self, workers: Workers, block: Block, record: Record, smoothing: Smoothing | None = None
    ) -> None:
        self._workers = workers
        self._block = block
        self._record = record
        self._smoothing = smoothing
        self._by_parameter = block.mixing.needs_gram and block.scope == "parameter"

    def plan(self, pieces: Sequence[Piece], wire: Wire, device: torch.device) -> Plan:
        """Plan the exchange of a bucket, given all its pieces in order. Worth keeping: buckets recur."""
        workers = self._workers
        columns = columns_per_tile(self._block, workers.size, wire)
        tiles = plan_tiles(pieces, workers.size, workers.rank, columns)
        return Plan(tiles, list(pieces), workers.rank, workers.size, device)

    def combine(
        self,
        flat_N: Tensor,
        plan: Plan,
        wire: Wire,
        moment: Moment,
        present_W: Tensor,
        known: Verdict | None,
        outputs: Sequence[Tensor] = (),
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
        """
        if not plan.tiles:
            return
        transit = Transit(
            self._workers,
            flat_N,
            plan.tiles,
            wire,
            list(zip(plan.owned, outputs, strict=True)) if outputs else (),
        )
        verdict = known
        if verdict is None:
            segments = plan.parameters if self._by_parameter else plan.whole
            grams = (segments[k].gram(grads_WC) for k, grads_WC in transit.sweep())
            verdict = self._decide(_total(grams), moment, present_W)
        one_row = len(verdict.weights_SW) == 1
        self._record.add_verdict(verdict, float(flat_N.numel()) if one_row else plan.elements, present_W)
        weights_WS = verdict.weights_SW.t().float()
        segments = plan.whole if one_row else plan.parameters
        if self._block.scaling is not None:
            self._scale(self._block.scaling, transit, plan, segments, weights_WS)
            return
        for k, grads_WC in transit.sweep(last=True):
            transit.place(k, weighted_sum(grads_WC.float(), segments[k].expand(weights_WS)))

    def _scale(
        self, rule: Scaling, transit: Transit, plan: Plan, segments: Sequence[Segments], weights_WS: Tensor
    ) -> None:
        """Statistics of all tiles, their means over every parameter on all the ranks, and factors."""
        sums_2S: list[Tensor] = []
        for k, grads_WC in transit.sweep():
            signal = rule.signal(grads_WC, segments[k].expand(weights_WS))
            sums_2S.append(torch.stack([plan.parameters[k].sum(terms_C) for terms_C in signal.layer_terms()]))
            if transit.holds_signals:
                transit.hold(k, signal)
        total_2S = _total(iter(sums_2S))
        self._workers.sum(total_2S)
        layer_mean_S = (total_2S[0] / total_2S[1].clamp(min=1)).float()
        if self._smoothing is not None:
            self._smoothing.begin(plan.owned)
        again = (
            transit.held()
            if transit.holds_signals
            else (
                (k, rule.signal(g_WC, segments[k].expand(weights_WS))) for k, g_WC in transit.sweep(last=True)
            )
        )
        for k, signal in again:
            factors_C = rule.factors(signal, plan.parameters[k].expand(layer_mean_S[None])[0])
            self._record.add_factors(factors_C)
            transit.place(k, signal.mean_C, factors_C, self._smoothing)

    def gram(self, grads: Sequence[Tensor], wire: Wire) -> Tensor:
        """Gram matrix `[1, W, W]` of whole gradients, on the first rank; they are read, and nothing is kept.

        Any division of the elements among the ranks serves, so each tile is cut into W equal parts.
        """
        workers = self._workers
        columns = columns_per_tile(self._block, workers.size, wire)
        pieces, start = [], 0
        for grad in grads:
            pieces.append((start, grad.reshape(-1)))
            start += grad.numel()
        total = torch.zeros(1, workers.size, workers.size, dtype=torch.float64, device=grads[0].device)
        for begin in range(0, start, columns * workers.size):
            end = min(begin + columns * workers.size, start)
            parts = [
                flat[max(begin - first, 0) : end - first]
                for first, flat in pieces
                if first < end and first + flat.numel() > begin
            ]
            sent = torch.cat([part.to(wire.gradient) for part in parts])
            sizes = [
                (end - begin) // workers.size + (j < (end - begin) % workers.size)
                for j in range(workers.size)
            ]
            mine = sizes[workers.rank]
            out = sent.new_empty(mine * workers.size)
            workers.all_to_all(out, sent, [mine] * workers.size, sizes)
            whole = Segments([0], [mine], 1, out.device, workers.size)
            total += whole.gram(out.view(workers.size, mine))
        return total

    def decide_for_model(
        self, grads: Sequence[Tensor], wire: Wire, moment: Moment, present_W: Tensor
    ) -> Verdict:
        """One decision for all gradients of a model, to be given to `combine` as `known`."""
        return self._decide(self.gram(grads, wire), moment, present_W)

    def _decide(self, gram_SWW: Tensor, moment: Moment, present_W: Tensor) -> Verdict:
        """The first rank decides and tells the others, since a sum is not promised to be bit-identical
        everywhere.
        """
        rule = self._block.mixing
        assert isinstance(rule, GramMixing)
        self._workers.sum_at_first(gram_SWW)
        if self._workers.rank == 0:
            packed = gram_verdict(rule, moment, gram_SWW, present_W).packed()
        else:
            packed = gram_SWW.new_empty(gram_SWW.shape[0], self._workers.size + 2)
        self._workers.from_first(packed)
        return Verdict.unpacked(packed)


def _total(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total = total + part
    return total
