from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_gradmix.config import GradmixConfig, check_workers, parse_block
from ds_gradmix.ops.segments import Segments
from ds_gradmix.rules import GradientFreeMixing, GramianMixing, Mean, Mixing, NormMixing, RngKey, apply
from ds_gradmix.rules.decision import MixingDecision


class CombineState(NamedTuple):
    """What the rules of a block keep from a step to the next one."""

    mixing_KW: Tensor  # the mixing rule's numbers, float64
    factors_N: Tensor | None = None  # the running mean of factors, before its bias is corrected
    steps: int = 0  # that were taken


def combine(
    grads_WN: Tensor,
    block: GradmixConfig | Mapping[str, Any],
    step: int = 0,
    sizes: Sequence[int] | None = None,
    state: CombineState | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Apply a gradmix block to a stack of W workers' gradients, in one process: `g = r * sum_i w_i g_i`.

    The functions are those of training, and the stack is one bucket. `extrapolation` has no effect here.

    Args:
        grads_WN: gradients `[W, N]`, one worker a row, float16, bfloat16, float32 or float64; not modified.
        block: the block of ds_config.json, as a mapping or already parsed.
        step: optimizer step, which keys everything drawn at random.
        sizes: the lengths of the parameters along N, which add up to N; one parameter if None. Draws by
            parameter (GradientMix) go by position here, and in training by the order of all names, sorted.
        state: `state` of the step before, for rules that keep something over steps; None at the first.

    Returns:
        The combined gradient `[N]`, in the dtype of `grads_WN`, and a dictionary: `weights`, float64 `[W]`,
        or `[P, W]` where they are decided by parameter; `factors`, `[N]`, if the block scales; `skipped`,
        whether the optimizer step would be skipped, since no worker agreed with another or was finite;
        `state`, for the next step.

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
    if state is None:
        state = CombineState(_mixing(config, grads_WN).initial_state(len(grads_WN)).to(grads_WN.device))
    combined_N, info = _combine(grads_WN, config, present_W, RngKey(config.seed, step), lengths, state)
    return combined_N.to(grads_WN.dtype), info


def _mixing(config: GradmixConfig, grads_WN: Tensor) -> Mixing:
    return config.mixing if len(grads_WN) > 1 else Mean()


def _combine(
    grads_WN: Tensor,
    config: GradmixConfig,
    present_W: Tensor,
    key: RngKey,
    lengths: list[int],
    state: CombineState,
) -> tuple[Tensor, dict[str, Any]]:
    params = Segments(list(range(len(lengths))), lengths, max(len(lengths), 1), grads_WN.device)
    by_param = config.weighs_by_parameter
    sizes = lengths if by_param else [grads_WN.shape[1]]
    segments = params if by_param else Segments([0], sizes, 1, grads_WN.device)
    decision, next_KW = _decide(grads_WN, config, present_W, key, (segments, sizes), state.mixing_KW)
    weights_WS = decision.weights_SW.t().to(torch.promote_types(grads_WN.dtype, torch.float32))
    skipped = not bool(decision.agreed_S.any())
    weights = decision.weights_SW if by_param else decision.weights_SW[0]
    info: dict[str, Any] = {"weights": weights, "skipped": skipped}
    scaling, factors_N, mean_factors_N = config.scaling, None, None
    if scaling is None or len(grads_WN) == 1:
        combined_N = apply.mix(grads_WN, weights_WS, segments)
        factors_N = None if scaling is None else torch.ones_like(combined_N)
    else:
        mean_N, statistics_KN = apply.scaling_statistics(scaling, grads_WN, weights_WS, segments)
        sums_LP = apply.layer_sums(scaling, mean_N, statistics_KN, params)
        factors_N = apply.scaling_factors(scaling, mean_N, statistics_KN, sums_LP, params)
        if decay := scaling.factor_momentum:
            before_N = torch.zeros_like(factors_N) if state.factors_N is None else state.factors_N
            mean_factors_N = decay * before_N + (1 - decay) * factors_N
            factors_N = mean_factors_N / (1 - decay ** (state.steps + 1))
        combined_N = factors_N * mean_N
    if factors_N is not None:
        info["factors"] = factors_N
    info["state"] = state if skipped else CombineState(next_KW, mean_factors_N, state.steps + 1)
    return combined_N, info


def _decide(
    grads_WN: Tensor,
    config: GradmixConfig,
    present_W: Tensor,
    key: RngKey,
    parts: tuple[Segments, list[int]],
    state_KW: Tensor,
) -> tuple[MixingDecision, Tensor]:
    """The weights, and the mixing rule's next state, the mean over what was decided on, by elements."""
    mixing, (segments, sizes) = _mixing(config, grads_WN), parts
    if isinstance(mixing, GramianMixing):
        if config.sketch_size is None:
            gram_SWW = segments.gram(grads_WN)
        else:
            gram_SWW = apply.sketched_gram(grads_WN, sizes, config.sketch_size, key)
        considered = apply.decide_from_gram(mixing, gram_SWW, present_W, key, state_KW)
        share_S = torch.tensor(sizes or [0]).to(state_KW) / max(sum(sizes), 1)
        return considered.decision, torch.einsum("s,skw->kw", share_S, considered.next_state_SKW)
    if isinstance(mixing, NormMixing):
        norms_SW = torch.stack([segments.sum_of_squares(row_N.double()) for row_N in grads_WN], 1).sqrt()
        decision = apply.decide_from_norms(mixing, norms_SW, present_W, state_KW)
        if mixing.observes:
            whole = Segments([0], [grads_WN.shape[1]], 1, grads_WN.device)
            state_KW = apply.observe(mixing, whole.gram(grads_WN)[0], state_KW)
        return decision, state_KW
    assert isinstance(mixing, GradientFreeMixing)
    drawn_SW = torch.from_numpy(mixing.weights(key, len(grads_WN), segments.num_segments))
    weights_SW = drawn_SW.expand(segments.num_segments, -1).contiguous()  # may be pinned
    return apply.decide_without_gradients(weights_SW, present_W), state_KW


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
