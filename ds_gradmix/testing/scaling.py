"""What scaling rules must keep."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_gradmix.rules import Scaling
from ds_gradmix.rules.apply import layer_sums, scaling_factors, scaling_statistics
from ds_gradmix.testing.gradients import (
    CUTS,
    DTYPES,
    NUM_ELEMENTS,
    SIZES,
    generator,
    in_dtype,
    near,
    require,
    segments,
    stacks,
)

_OWNERS = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))


def check_scaling(rule: Scaling, resumed: Scaling) -> None:
    """Factors in every dtype, under equal weights and under such as differ by parameter."""
    require(0 <= rule.factor_momentum < 1, "factor_momentum must be at least 0 and below 1")
    for name, grads_WN in stacks().items():
        for dtype in DTYPES:
            w, wide = len(grads_WN), torch.promote_types(dtype, torch.float32)
            equal_W1 = torch.full((w, 1), 1.0 / w, dtype=wide)
            drawn_WP = torch.rand(w, len(SIZES), generator=generator(3), dtype=wide) + 0.1
            for weights_WS in (equal_W1, drawn_WP / drawn_WP.sum(0)):
                what = f"{name}, {str(dtype).removeprefix('torch.')}"
                _check_factors(rule, resumed, in_dtype(grads_WN, dtype), weights_WS, what)


def _check_factors(rule: Scaling, resumed: Scaling, grads_WN: Tensor, weights_WS: Tensor, name: str) -> None:
    w, whole, before_WN = len(grads_WN), [NUM_ELEMENTS], grads_WN.clone()
    mean_N, factors_N = _factors(rule, grads_WN, weights_WS, whole)
    require(torch.equal(grads_WN, before_WN), f"{name}: statistics changes the gradients")
    require(factors_N.isfinite().all(), f"{name}: factors are not finite")
    if w == 1:
        same = torch.equal(factors_N * mean_N, grads_WN[0].to(mean_N.dtype) * weights_WS[0, 0])
        require(same, f"{name}: one worker's gradient must stay as it is")
    # Rounding in float32 may move a ratio of small numbers; float64 shows the rule. What is compared is the
    # scaled gradient: where workers cancel, the mean is rounding, and a ratio to it is any number.
    tolerance = 1e-9 if grads_WN.dtype == torch.float64 else 0.05
    size_N = grads_WN.abs().amax(0).to(mean_N.dtype)

    def same_result(found: tuple[Tensor, Tensor]) -> bool:
        results = [factors * (mean / size_N) for mean, factors in (found, (mean_N, factors_N))]
        found_N, wanted_N = (result_N.nan_to_num(0.0) for result_N in results)  # of no gradient: 0 / 0
        return near(found_N, wanted_N, tolerance, 1e2 * torch.finfo(mean_N.dtype).eps)

    for cut in CUTS:
        tiled = _factors(resumed, grads_WN, weights_WS, cut)
        require(same_result(tiled), f"{name}: tiles matter, or a resume does")
    order = torch.randperm(w, generator=generator(w))
    numbered = _factors(rule, grads_WN[order], weights_WS[order], whole)
    require(same_result(numbered), f"{name}: the order of workers matters")
    limits, used = torch.finfo(grads_WN.dtype), grads_WN.abs()[grads_WN != 0].double()
    for scale in (2.0**-8, 2.0**8):
        if len(used) and limits.tiny <= used.min() * scale and used.max() * scale <= limits.max / 64:
            scaled_mean_N, scaled_N = _factors(rule, grads_WN * scale, weights_WS, whole)
            require(
                same_result((scaled_mean_N / scale, scaled_N)),
                f"{name}: gradients times {scale} change the factors",
            )


def _factors(
    rule: Scaling, grads_WN: Tensor, weights_WS: Tensor, cut: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The mean and the factors, tile by tile as in training."""
    tiles, num_terms = [], rule.num_layer_terms
    sums_LP = torch.zeros(num_terms, len(SIZES), dtype=torch.float64)
    for grads_WC, owners_C in zip(grads_WN.split(list(cut), 1), _OWNERS.split(list(cut)), strict=True):
        params = segments(torch.bincount(owners_C, minlength=len(SIZES)).tolist())
        by_weight = params if weights_WS.shape[1] > 1 else segments([len(owners_C)])
        mean_C, statistics_KC = scaling_statistics(rule, grads_WC, weights_WS, by_weight)
        _require_form("statistics", statistics_KC, mean_C, rule.num_statistics)
        before = mean_C.clone(), statistics_KC.clone()
        _require_form("layer_terms", rule.layer_terms(mean_C, statistics_KC), mean_C, num_terms)
        sums_LP += layer_sums(rule, mean_C, statistics_KC, params)
        require(all(map(torch.equal, before, (mean_C, statistics_KC))), "layer_terms changes its arguments")
        tiles.append((params, mean_C, statistics_KC))
    factors = []
    for params, mean_C, statistics_KC in tiles:
        before_C = mean_C.clone()
        factors_C = scaling_factors(rule, mean_C, statistics_KC, sums_LP, params)
        require(torch.equal(mean_C, before_C), "factors changes the mean")
        _require_form("factors", factors_C[None], mean_C, 1)
        factors.append(factors_C)
    return torch.cat([mean_C for _, mean_C, _ in tiles]), torch.cat(factors)


def _require_form(name: str, found_KC: Tensor, mean_C: Tensor, num_rows: int) -> None:
    found, wanted = tuple(found_KC.shape), (num_rows, len(mean_C))
    require(found == wanted, f"{name}: shape {found}, wanted {wanted}")
    require(found_KC.dtype == mean_C.dtype, f"{name}: dtype {found_KC.dtype}, wanted that of the mean")
