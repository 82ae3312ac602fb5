"""The arithmetic of the rules: from weights and gradients to the combined gradient, `g = r * sum_i w_i g_i`.

`ds_gradmix.combine` does it on a stack of gradients in one process, and the exchange on the tiles of a bucket
that is spread over ranks; both call these functions. Nothing here communicates.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ds_gradmix.ops import kernels
from ds_gradmix.ops.cosines import mean_cosine
from ds_gradmix.ops.gram import CACHED_COLUMNS, gram
from ds_gradmix.ops.segments import Segments, to_device, weighted_sum
from ds_gradmix.ops.sketch import SketchMaps
from ds_gradmix.rules.base import GramianMixing, NormMixing, RngKey, Scaling
from ds_gradmix.rules.decision import Considered, MixingDecision


def decide_without_gradients(weights_SW: Tensor, present_W: Tensor) -> MixingDecision:
    """Weights drawn on the host in float64, renormalised over the workers present."""
    weights_SW = to_device(weights_SW, present_W.device) * present_W
    total_S = weights_SW.sum(1)
    # A draw may give (numerically) everything to a worker that is not there; then the others share equally.
    equal_W = present_W.to(weights_SW.dtype) / present_W.sum().clamp(min=1)
    weights_SW = torch.where(total_S[:, None] > 0, weights_SW / total_S[:, None], equal_W)
    agreed_S = present_W.any().expand(len(weights_SW))
    return MixingDecision(weights_SW, agreed_S, torch.full_like(total_S, float("nan")))


def sketched_gram(grads_WN: Tensor, lengths: Sequence[int], size: int, key: RngKey) -> Tensor:
    """Gram matrices `[S, W, W]`, float64, from sketches of S segments of so many consecutive elements."""
    maps, grams, begin = SketchMaps(size, key.generator, grads_WN.device), [], 0
    for length in lengths or [0]:
        sketch = maps.of_length(length)
        sketches_WM = grads_WN.new_empty(len(grads_WN), sketch.size, dtype=torch.float32)
        for worker, sketch_M in enumerate(sketches_WM):
            sketch.of([grads_WN[worker, begin : begin + length]], sketch_M)
        grams.append(gram(sketches_WM))
        begin += length
    return torch.stack(grams)


def decide_from_gram(
    rule: GramianMixing, gram_SWW: Tensor, present_W: Tensor, key: RngKey, state_KW: Tensor
) -> Considered:
    """Weights from Gram matrices, and the rule's next state; NaN weights where a matrix is not finite.

    A filter that quietly dropped the worker with the Inf would hide an overflow from dynamic loss scaling, so
    what is not finite stays visible: the combined gradient becomes NaN, as the mean would. It leaves the
    state as it was.
    """
    decision, margin_S, next_SKW = rule.consider(gram_SWW, present_W, key, state_KW)
    finite_S = gram_SWW.isfinite().all(-1).all(-1)
    weights_SW = torch.where(finite_S[:, None], decision.weights_SW, float("nan"))
    next_SKW = torch.where(finite_S[:, None, None], next_SKW, state_KW)
    decision = MixingDecision(weights_SW, decision.agreed_S | ~finite_S, mean_cosine(gram_SWW))
    return Considered(decision, margin_S, next_SKW)


def decide_from_norms(
    rule: NormMixing, norms_SW: Tensor, present_W: Tensor, state_KW: Tensor
) -> MixingDecision:
    """Weights from the lengths of gradients; NaN where one is not finite, as in `decide_from_gram`."""
    norms_SW = torch.where(present_W, norms_SW, 0.0)
    decision = rule.decide_from_norms(norms_SW, present_W, state_KW)
    finite_S = norms_SW.isfinite().all(1)
    weights_SW = torch.where(finite_S[:, None], decision.weights_SW, float("nan"))
    unknown_S = torch.full_like(weights_SW[:, 0], float("nan"))
    return MixingDecision(weights_SW, decision.agreed_S | ~finite_S, unknown_S)


def observe(rule: NormMixing, gram_WW: Tensor, state_KW: Tensor) -> Tensor:
    """A rule's next state after it saw the model's Gram matrix; as it was if that is not finite."""
    finite = gram_WW.isfinite().all()
    seen_WW = torch.where(finite, gram_WW, 0.0)
    return torch.where(finite, rule.observe(seen_WW, state_KW), state_KW)


def mix(grads_WC: Tensor, weights_WS: Tensor, segments: Segments) -> Tensor:
    """`sum_i w_i g_i`, `[C]`, in the dtype of the weights, float32 or float64."""
    if weights_WS.shape[1] == 1 and weights_WS.dtype == torch.float32 and kernels.available(grads_WC.device):
        from ds_gradmix.ops.kernels.weighted_sum import weighted_sum as in_one_launch

        return in_one_launch(grads_WC.contiguous(), weights_WS[:, 0].contiguous())
    chunks = _column_chunks(grads_WC, segments.expand(weights_WS))
    return _joined([weighted_sum(part_WC.to(weights.dtype), weights) for part_WC, weights in chunks])


def scaling_statistics(
    rule: Scaling, grads_WC: Tensor, weights_WS: Tensor, segments: Segments
) -> tuple[Tensor, Tensor]:
    """The weighted mean `[C]`, and a scaling rule's statistics `[K, C]`."""
    means, statistics = [], []
    for part_WC, weights_WC in _column_chunks(grads_WC, segments.expand(weights_WS)):
        means.append(weighted_sum(part_WC.to(weights_WC.dtype), weights_WC))
        statistics.append(rule.statistics(part_WC, weights_WC, means[-1]))
    return _joined(means), _joined(statistics)


def _column_chunks(grads_WC: Tensor, weights_WC: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Gradients and their weights, on a CPU by as many columns as stay in its cache."""
    size = CACHED_COLUMNS if grads_WC.device.type == "cpu" else max(grads_WC.shape[1], 1)
    grads = grads_WC.split(size, dim=1)
    weights = weights_WC.split(size, dim=1) if weights_WC.shape[1] > 1 else [weights_WC] * len(grads)
    return zip(grads, weights, strict=True)


def _joined(chunks: Sequence[Tensor]) -> Tensor:
    return chunks[0] if len(chunks) == 1 else torch.cat(list(chunks), dim=-1)


def layer_sums(rule: Scaling, mean_C: Tensor, statistics_KC: Tensor, params: Segments) -> Tensor:
    """The sums of a scaling rule's terms over every parameter, `[L, P]`, float64."""
    sums = [params.sum(terms_C) for terms_C in rule.layer_terms(mean_C, statistics_KC)]
    return torch.stack(sums) if sums else mean_C.new_zeros(0, params.num_segments, dtype=torch.float64)


def scaling_factors(
    rule: Scaling, mean_C: Tensor, statistics_KC: Tensor, sums_LP: Tensor, params: Segments
) -> Tensor:
    """A scaling rule's factors, `[C]`, once the sums are those of the whole parameters."""
    return rule.factors(mean_C, statistics_KC, params.expand(sums_LP))
