from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_gradmix.config import GradmixConfig, check_workers, parse_block
from ds_gradmix.ops.segments import Segments
from ds_gradmix.rules import GradientFreeMixing, GramianMixing, Mean, NormMixing, RngKey, apply


def combine(
    grads_WN: Tensor,
    block: GradmixConfig | Mapping[str, Any],
    step: int = 0,
    sizes: Sequence[int] | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Apply a gradmix block to a stack of W workers' gradients, in one process: `g = r * sum_i w_i g_i`.

    The functions are those of training, and the stack is one bucket. `extrapolation` and the momentum of
    factors have no effect here, and a mixing rule with state has its initial one.

    Args:
        grads_WN: gradients `[W, N]`, one worker a row, float16, bfloat16, float32 or float64; not modified.
        block: the block of ds_config.json, as a mapping or already parsed.
        step: optimizer step, which keys everything drawn at random.
        sizes: the lengths of the parameters along N, which add up to N; one parameter if None. Draws by
            parameter (GradientMix) go by position here, and in training by the order of all names, sorted.

    Returns:
        The combined gradient `[N]`, in the dtype of `grads_WN`, and a dictionary: `weights`, float64 `[W]`,
        or `[P, W]` where they are decided by parameter; `factors`, `[N]`, if the block scales; `skipped`,
        whether the optimizer step would be skipped, since no worker agreed with another or was finite.

    Raises:
        ValueError: for a mistake in the block (a param may not fit so many workers), in the tensor's shape
            or dtype, or in `sizes`.
    """
    config = block if isinstance(block, GradmixConfig) else parse_block(block)
    lengths = _check(grads_WN, sizes)
    check_workers(config, len(grads_WN))
    present_W = torch.ones(len(grads_WN), dtype=torch.bool, device=grads_WN.device)
    if config.nonfinite == "drop":
        present_W = grads_WN.isfinite().all(1)
        grads_WN = torch.where(present_W[:, None], grads_WN, 0)
    combined_N, info = _combine(grads_WN, config, present_W, RngKey(config.seed, step), lengths)
    return combined_N.to(grads_WN.dtype), info


def _combine(
    grads_WN: Tensor, config: GradmixConfig, present_W: Tensor, key: RngKey, lengths: list[int]
) -> tuple[Tensor, dict[str, Any]]:
    params = Segments(list(range(len(lengths))), lengths, max(len(lengths), 1), grads_WN.device)
    by_param = config.weighs_by_parameter
    segments = params if by_param else Segments([0], [grads_WN.shape[1]], 1, grads_WN.device)
    mixing = config.mixing if len(grads_WN) > 1 else Mean()
    if isinstance(mixing, GramianMixing):
        state_KW = mixing.initial_state(len(grads_WN)).to(grads_WN.device)
        sizes = lengths if by_param else [grads_WN.shape[1]]
        if config.sketch_size is None:
            gram_SWW = segments.gram(grads_WN)
        else:
            gram_SWW = apply.sketched_gram(grads_WN, sizes, config.sketch_size, key)
        decision = apply.decide_from_gram(mixing, gram_SWW, present_W, key, state_KW).decision
    elif isinstance(mixing, NormMixing):
        state_KW = mixing.initial_state(len(grads_WN)).to(grads_WN.device)
        norms_SW = torch.stack([segments.sum_of_squares(row_N.double()) for row_N in grads_WN], 1).sqrt()
        decision = apply.decide_from_norms(mixing, norms_SW, present_W, state_KW)
    else:
        assert isinstance(mixing, GradientFreeMixing)
        drawn_SW = torch.from_numpy(mixing.weights(key, len(grads_WN), segments.num_segments))
        weights_SW = drawn_SW.expand(segments.num_segments, -1).contiguous()  # may be pinned
        decision = apply.decide_without_gradients(weights_SW, present_W)
    weights_WS = decision.weights_SW.t().to(torch.promote_types(grads_WN.dtype, torch.float32))
    weights = decision.weights_SW if by_param else decision.weights_SW[0]
    info: dict[str, Any] = {"weights": weights, "skipped": not bool(decision.agreed_S.any())}
    scaling = config.scaling
    if scaling is None or len(grads_WN) == 1:
        combined_N = apply.mix(grads_WN, weights_WS, segments)
        return combined_N, info if scaling is None else {**info, "factors": torch.ones_like(combined_N)}
    mean_N, statistics_KN = apply.scaling_statistics(scaling, grads_WN, weights_WS, segments)
    sums_LP = apply.layer_sums(scaling, mean_N, statistics_KN, params)
    factors_N = apply.scaling_factors(scaling, mean_N, statistics_KN, sums_LP, params)
    return factors_N * mean_N, {**info, "factors": factors_N}


def _check(grads_WN: Tensor, sizes: Sequence[int] | None) -> list[int]:
    if not isinstance(grads_WN, Tensor):
        kind = type(grads_WN).__name__
        raise ValueError(f"grads_WN: a {kind}; allowed is a tensor [W, N]; stack the gradients")
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
