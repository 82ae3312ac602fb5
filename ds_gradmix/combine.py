from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_gradmix.config import GradmixConfig, parse_block
from ds_gradmix.ops.segments import Segments
from ds_gradmix.rules import GradientFreeMixing, GramianMixing, MixingDecision, RngKey
from ds_gradmix.rules.apply import (
    decide_from_gram,
    decide_without_gradients,
    layer_sums,
    mix,
    scaling_factors,
    scaling_statistics,
)


def combine(
    grads_WN: Tensor,
    block: GradmixConfig | Mapping[str, Any],
    step: int = 0,
    sizes: Sequence[int] | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Apply a gradmix block to a stack of W workers' gradients, in one process.

    `g = r * sum_i w_i g_i`, by the same functions as the distributed reduction; the stack is one bucket.

    Args:
        grads_WN: gradients `[W, N]`, one worker a row (whatever the block's `worker`: means over ranks, if it
            is larger than a rank), float16, bfloat16, float32 or float64; not modified.
        block: the block of ds_config.json, as a mapping or already parsed.
        step: optimizer step, which keys everything drawn at random.
        sizes: the lengths of the parameters along N, which add up to N; one parameter if None. Draws by
            parameter (GradientMix) go by position here, and in training by the order of all names, sorted.

    Returns:
        The combined gradient `[N]`, in the dtype of `grads_WN`, and a dictionary: `weights`, float64 `[W]`,
        or `[P, W]` where they are decided by parameter; `factors`, `[N]`, if the block scales; `skipped`,
        whether the optimizer step would be skipped because no worker agreed, or none was finite under
        `nonfinite: "drop"`. `extrapolation` has no part in it: the gradients are already taken. `momentum`
        needs a history and has no effect on a single gradient (its bias correction undoes it).

    Raises:
        ValueError: for a mistake in the block, a tensor that is not `[W, N]`, or sizes that do not add up to
            N.
    """
    rules = block if isinstance(block, GradmixConfig) else parse_block(block)
    lengths = _check(grads_WN, sizes)
    num_workers = grads_WN.shape[0]
    ids = list(range(len(lengths)))
    parameters = Segments(ids, lengths, max(len(lengths), 1), grads_WN.device)
    whole = Segments([0], [grads_WN.shape[1]], 1, grads_WN.device)
    present_W = torch.ones(num_workers, dtype=torch.bool, device=grads_WN.device)
    if rules.nonfinite == "drop":
        present_W = grads_WN.isfinite().all(1)
        grads_WN = torch.where(present_W[:, None], grads_WN, 0)
    by_parameter = rules.mixing.by_parameter or (rules.mixing.needs_gram and rules.scope == "parameter")
    segments = parameters if by_parameter else whole
    decision = _decide(rules, grads_WN, segments, present_W, RngKey(rules.seed, step))
    precise = torch.float64 if grads_WN.dtype == torch.float64 else torch.float32
    weights_WS = decision.weights_SW.t().to(precise)
    info: dict[str, Any] = {
        "weights": decision.weights_SW if by_parameter else decision.weights_SW[0],
        "skipped": not bool(decision.agreed_S.any()),
    }
    if rules.scaling is None or num_workers == 1:
        combined_N = mix(grads_WN, weights_WS, segments)
        if rules.scaling is not None:
            info["factors"] = torch.ones_like(combined_N)
    else:
        statistics_KN = scaling_statistics(rules.scaling, grads_WN, weights_WS, segments)
        sums_2P = layer_sums(rules.scaling, statistics_KN, parameters)
        info["factors"] = scaling_factors(rules.scaling, statistics_KN, sums_2P, parameters)
        combined_N = info["factors"] * statistics_KN[0]
    return combined_N.to(grads_WN.dtype), info


def _decide(
    rules: GradmixConfig, grads_WN: Tensor, segments: Segments, present_W: Tensor, key: RngKey
) -> MixingDecision:
    num_workers = grads_WN.shape[0]
    if num_workers == 1:
        one_S1 = torch.ones(segments.num_segments, 1, dtype=torch.float64, device=grads_WN.device)
        return MixingDecision(one_S1 * present_W, present_W.expand(segments.num_segments))
    if isinstance(rules.mixing, GramianMixing):
        return decide_from_gram(rules.mixing, segments.gram(grads_WN), present_W, key)
    assert isinstance(rules.mixing, GradientFreeMixing)
    weights = rules.mixing.weights(key, num_workers, segments.num_segments)
    return decide_without_gradients(torch.from_numpy(weights), present_W)


def _check(grads_WN: Tensor, sizes: Sequence[int] | None) -> list[int]:
    if not isinstance(grads_WN, Tensor):
        raise ValueError(
            f"grads_WN: a {type(grads_WN).__name__}; allowed is a tensor [W, N]; stack the gradients"
        )
    if grads_WN.dim() != 2 or grads_WN.shape[0] == 0 or not grads_WN.is_floating_point():
        raise ValueError(
            f"grads_WN: {grads_WN.dtype} of shape {tuple(grads_WN.shape)}; allowed is a floating-point "
            "tensor [W, N] with at least one worker; stack one flat gradient a worker"
        )
    lengths = [grads_WN.shape[1]] if sizes is None else [int(size) for size in sizes]
    if sum(lengths) != grads_WN.shape[1] or min(lengths, default=0) < 0:
        raise ValueError(
            f"sizes: {lengths} adds up to {sum(lengths)}; allowed are non-negative lengths that add up to "
            f"N = {grads_WN.shape[1]}; give the number of elements of every parameter, in order"
        )
    return lengths
