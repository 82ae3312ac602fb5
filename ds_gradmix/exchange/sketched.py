"""Gram matrices from sketches of the gradients, by which a rule decides before the gradients travel.

    1. each rank projects its gradient to m float32, by a map that is new at every step     (ops/sketch.py)
    2. all-to-all: rank j gets every worker's share j of the sketches       a rank sends (R-1)/R 4 m bytes

for each decision, on R ranks. From there on a sketch is treated as a small bucket of gradients: sums of Gram
matrices and decisions are those of exchange.py. A parameter, or bucket, of at most m elements is sent as it
is, and its Gram matrix is exact.

Memory: 4 m bytes each for signs, sketch, and what is sent and received; or `tile_bytes` in place of the
latter three where many parameters have sketches of their own.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_gradmix.exchange.bucket import Bucket, CommDtypes, ParamSpan, runs_of
from ds_gradmix.exchange.exchange import Exchange, GramShare
from ds_gradmix.ops.segments import to_device
from ds_gradmix.ops.sketch import COSINE_ERROR, SketchMaps
from ds_gradmix.rules import RngKey

_FLOAT32 = CommDtypes(torch.float32, torch.float32)


class Segment(NamedTuple):
    """What is decided on at once: gradients, flat, of which the first is that of parameter `param`."""

    param: int
    parts: Sequence[Tensor]

    @property
    def length(self) -> int:
        """How many elements they have."""
        return sum(part.numel() for part in self.parts)


class SketchedGrams:
    """The sketches of one group of workers' gradients, and their Gram matrices."""

    def __init__(self, exchange: Exchange, size: int) -> None:
        self._exchange = exchange
        self._size = size
        self._maps: tuple[RngKey, SketchMaps] | None = None  # of the latest step

    def of_bucket(self, flat_N: Tensor, spans: Sequence[ParamSpan], key: RngKey) -> GramShare:
        """The Gram matrices of a bucket, as the config's scope has them."""
        return self.of(self._segments(flat_N, spans), key)

    def _segments(self, flat_N: Tensor, spans: Sequence[ParamSpan]) -> list[Segment]:
        """What is decided on at once; of replicas only one is counted."""
        if self._exchange.config.scope == "parameter":
            return [Segment(span.param, [span.of(flat_N)]) for span in spans]
        infos = self._exchange.weighting.infos
        counted = [span for span in spans if infos[span.param].counted]
        parts = [flat_N.narrow(0, start, length) for start, length, _ in runs_of(counted)]
        return [Segment(counted[0].param, parts)] if counted else []

    def of(self, segments: Sequence[Segment], key: RngKey) -> GramShare:
        """Gram matrices `[S, W, W]` of this rank's share of the sketches, one at least; exact ones have no
        error.
        """
        workers, device, grams = self._exchange.workers, self._exchange.weighting.stats.device, []
        maps = self._maps[1] if self._maps and self._maps[0] == key else None
        self._maps = (key, maps or SketchMaps(self._size, key.generator, device))
        for batch in self._batches(segments):
            sizes = [min(segment.length, self._size) for segment in batch]
            sketch_M = batch[0].parts[0].new_empty(sum(sizes), dtype=torch.float32)
            spans, start = [], 0
            for segment, size in zip(batch, sizes, strict=True):
                spans.append(ParamSpan(segment.param, start, size))
                self._maps[1].of_length(segment.length).of(segment.parts, spans[-1].of(sketch_M))
                start += size
            bucket = Bucket([sketch_M], tuple(spans), workers, _FLOAT32, lambda: None, lambda _: None)
            grams.append(self._exchange.send(bucket).gram())
        error = COSINE_ERROR * self._size**-0.5
        if not grams:
            grams = [torch.zeros(1, workers.size, workers.size, dtype=torch.float64, device=device)]
        errors = [error if segment.length > self._size else 0.0 for segment in segments] or [0.0]
        errors_S = to_device(torch.tensor(errors, dtype=torch.float64), device)
        return GramShare(torch.cat(grams), errors_S)

    def _batches(self, segments: Sequence[Segment]) -> Iterator[Sequence[Segment]]:
        """Segments whose sketches take about `tile_bytes` together."""
        batch: list[Segment] = []
        room = self._exchange.config.tile_bytes // 4
        for segment in segments:
            size = min(segment.length, self._size)
            if batch and size > room:
                yield batch
                batch, room = [], self._exchange.config.tile_bytes // 4
            batch.append(segment)
            room -= size
        if batch:
            yield batch
