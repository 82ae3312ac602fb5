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

import torch
from torch import Tensor

from ds_gradmix.config import Block
from ds_gradmix.decision import Verdict, gram_verdict
from ds_gradmix.layout import Piece, Tile, plan_tiles
from ds_gradmix.mixing import GramMixing, Moment
from ds_gradmix.record import Record
from ds_gradmix.scaling import Scaling
from ds_gradmix.scaling.smoothing import Smoothing
from ds_gradmix.segments import Segments, to_device, weighted_sum
from ds_gradmix.transit import Transit, Wire
from ds_gradmix.workers import Workers


@dataclass(frozen=True)
class Plan:
    """How one composition of a bucket is exchanged."""

    tiles: list[Tile]
    parameters: list[Segments]  # of every tile, one segment a parameter of the bucket
    whole: list[Segments]  # of every tile, as one segment
    owned: list[Piece]  # what this rank owns of the bucket
    elements: Tensor  # of every parameter of the bucket, float64


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
        num_parameters = 1 + max((piece.parameter for piece in pieces), default=0)
        elements = [0] * num_parameters
        for piece in pieces:
            elements[piece.parameter] += piece.length
        return Plan(
            tiles,
            [tile.segments(num_parameters, device, workers.size) for tile in tiles],
            [tile.segments(1, device, workers.size) for tile in tiles],
            [piece for piece in pieces if piece.owner == workers.rank],
            to_device(torch.tensor(elements, dtype=torch.float64), device),
        )

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
            layer_mean_S = self._layer_means(self._block.scaling, transit, plan, segments, weights_WS)
        if self._smoothing is not None:
            self._smoothing.begin(plan.owned)
        for k, grads_WC in transit.sweep(last=True):
            weights_WC = segments[k].expand(weights_WS)
            if self._block.scaling is None:
                transit.place(k, weighted_sum(grads_WC.float(), weights_WC))
                continue
            signal = self._block.scaling.signal(grads_WC.to(torch.float32, copy=True), weights_WC)
            factors_C = self._block.scaling.factors(signal, plan.parameters[k].expand(layer_mean_S[None])[0])
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

    def _layer_means(
        self, rule: Scaling, transit: Transit, plan: Plan, segments: list[Segments], weights_WS: Tensor
    ) -> Tensor:
        """Mean signal-to-noise ratio of every parameter, over all the ranks that combine a part of it."""

        def sums() -> Iterator[Tensor]:
            for k, grads_WC in transit.sweep():
                signal = rule.signal(grads_WC.to(torch.float32, copy=True), segments[k].expand(weights_WS))
                ratio_C = torch.where(signal.counted_C, signal.ratio_C, 0.0)
                counted_S = plan.parameters[k].sum(signal.counted_C.float())
                yield torch.stack([plan.parameters[k].sum(ratio_C), counted_S])

        total = _total(sums())
        self._workers.sum(total)
        return (total[0] / total[1].clamp(min=1)).float()


def _total(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total = total + part
    return total
