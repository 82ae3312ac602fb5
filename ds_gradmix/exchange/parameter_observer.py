"""How long each parameter's gradients are, and how far workers agree on them, at the steps that are read.

Of the workers' gradients g_i of a parameter only `sum |g_i|^2` and `|sum g_i|^2` are needed, so that nothing
grows with the square of their number. They are taken from sketches of 4096 float32, or from what is smaller
itself: a rank sends (R-1)/R of 16 KiB for each parameter, and 2 P numbers of P parameters are summed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_gradmix.comm.groups import RankGroup
from ds_gradmix.comm.workers import WorkerGroup
from ds_gradmix.exchange.bucket import Bucket, ParamInfo
from ds_gradmix.exchange.plan import even_sizes
from ds_gradmix.ops.segments import Segments, to_device
from ds_gradmix.ops.sketch import SketchMaps
from ds_gradmix.rules import RngKey

_SIZE = 4096
_HELD = 1 << 23  # numbers of sketches, beyond which they are exchanged


class ParameterObserver:
    """Gathers both sums over a step, by `ParamInfo.draw`: a parameter's place among all names, sorted."""

    def __init__(
        self,
        workers: WorkerGroup,
        group: RankGroup,
        infos: Sequence[ParamInfo],
        names: Sequence[str],
        every: int,
    ) -> None:
        self.names = names
        self._workers = workers
        self._group = group
        self._infos = infos
        self._every = every
        self._held: list[tuple[int, Tensor]] = []
        self._num_held = 0
        self._maps: tuple[RngKey, SketchMaps] | None = None  # of the latest step
        self._sums_2P: Tensor | None = None

    def is_due(self, key: RngKey) -> bool:
        """Whether the step is one that is read."""
        return (key.step + 1) % self._every == 0

    def add(self, param: int, parts: Sequence[Tensor], bucket: Bucket, key: RngKey) -> None:
        """Project a parameter's gradient in a bucket, flat views of its parts."""
        if self._maps is None or self._maps[0] != key:
            self._maps = (key, SketchMaps(_SIZE, key.generator, parts[0].device))
        sketch = self._maps[1].of_length(sum(part.numel() for part in parts))
        sketch_M = parts[0].new_empty(sketch.size, dtype=torch.float32)
        sketch.of(parts, sketch_M)
        self._held.append((self._infos[param].draw, sketch_M.mul_(bucket.observed_scale)))
        self._num_held += sketch.size
        if self._num_held >= _HELD:
            self._exchange()

    def _exchange(self) -> None:
        if not self._held:
            return
        sent = torch.cat([sketch_M for _, sketch_M in self._held])
        sizes = even_sizes(sent.numel(), self._workers.num_ranks)
        begin = sum(sizes[: self._workers.rank])
        rows_WC = self._workers.exchange(sent, sizes, sent.new_empty(self._workers.receive_size(sizes)))
        ids, lengths, place = [], [], 0
        for draw, sketch_M in self._held:
            first, last = max(place, begin), min(place + sketch_M.numel(), begin + rows_WC.shape[1])
            place += sketch_M.numel()
            if first < last:
                ids.append(draw)
                lengths.append(last - first)
        self._held, self._num_held = [], 0
        local = Segments(range(len(ids)), lengths, max(len(ids), 1), rows_WC.device)
        sums_2S = torch.stack([local.sum(values_C) for values_C in _squares(rows_WC)])
        if self._sums_2P is None:
            self._sums_2P = sums_2S.new_zeros(2, len(self.names))
        if ids:
            self._sums_2P.index_add_(1, to_device(torch.tensor(ids), rows_WC.device), sums_2S)

    def collect(self, device: torch.device) -> Tensor | None:
        """`[2, P]`, float64, on the first rank of the group, and None on the others; the next step begins."""
        self._exchange()
        sums_2P = self._sums_2P
        if sums_2P is None:
            sums_2P = torch.zeros(2, len(self.names), dtype=torch.float64, device=device)
        self._sums_2P = None
        if self._group.num_ranks > 1:
            self._group.reduce(sums_2P)
        return sums_2P if self._group.is_first else None


def _squares(rows_WC: Tensor) -> tuple[Tensor, Tensor]:
    exact_WC = rows_WC.double()
    return exact_WC.square().sum(0), exact_WC.sum(0).square()
