import warnings
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ds_gradmix.combine import combine
from ds_gradmix.config import SLOTS, GradmixConfig
from ds_gradmix.rules import (
    Extrapolation,
    GradientFreeMixing,
    GramianMixing,
    NormMixing,
    RngKey,
    Rule,
    Scaling,
)
from ds_gradmix.rules.lookup import NotARule, check_class
from ds_gradmix.testing.extrapolation import check_extrapolation
from ds_gradmix.testing.gradients import DTYPES, SIZES, in_dtype, require, stacks
from ds_gradmix.testing.mixing import check_decisions, check_state, check_weights, refuses
from ds_gradmix.testing.norms import check_norms
from ds_gradmix.testing.scaling import check_scaling


def check_rule(rule: Rule) -> None:
    """Check what every rule must keep, on a CPU, in a second or two.

    With one worker the gradient stays as it is. Nothing changes if all gradients are multiplied by the same
    positive number, or if workers are numbered otherwise (except for a `GramianMixing` that says
    `depends_on_order`). What comes of finite gradients is finite, however nasty they are, in every dtype. It
    does not matter how coordinates are cut into tiles. After a resume the rule, with the state it had, does
    the same. Arguments are not changed. Numbers of workers that a mixing rule refuses are left out. What
    makes the host wait for a GPU is warned of.

    Args:
        rule: an instance of a rule of any slot.

    Raises:
        AssertionError: with the rule and what it does not keep.
        TypeError: if it is no instance of a rule.
    """
    slot = next((slot for slot in SLOTS if isinstance(rule, SLOTS[slot].base)), None)
    if slot is None:
        raise TypeError(f"{rule!r}: allowed is an instance of a rule derived from a base in ds_gradmix.rules")
    try:
        check_class(type(rule), SLOTS[slot].base)
        require(bool(type(rule).model_config.get("frozen")), "it must be frozen: leave model_config as it is")
        resumed: Any = type(rule).model_validate_json(rule.model_dump_json())
        require(resumed == rule, "its params differ after a way through JSON, as in ds_config.json")
        _check_functions(rule, resumed)
        if not isinstance(rule, Extrapolation):
            _check_combination(GradmixConfig.model_validate({slot: rule}))
    except (AssertionError, NotARule) as error:
        raise AssertionError(f"{rule!r}: {error}") from error
    if waiting := _waiting_operations(rule):
        warnings.warn(f"{rule!r}: the host waits for a GPU in {', '.join(sorted(waiting))}", stacklevel=2)


def _check_functions(rule: Rule, resumed: Any) -> None:
    """The functions that a rule of its kind has."""
    if isinstance(rule, GradientFreeMixing):
        check_weights(rule, resumed)
    elif isinstance(rule, GramianMixing):
        check_decisions(rule, resumed)
        check_state(rule, resumed)
    elif isinstance(rule, NormMixing):
        check_norms(rule, resumed)
    elif isinstance(rule, Scaling):
        check_scaling(rule, resumed)
    elif isinstance(rule, Extrapolation):
        check_extrapolation(rule, resumed)


def _check_combination(config: GradmixConfig) -> None:
    """The whole block by the functions of training, in every dtype."""
    for name, grads_WN in stacks().items():
        if refuses(config.mixing, len(grads_WN)):
            continue
        for dtype in DTYPES:
            what = f"{name}, {str(dtype).removeprefix('torch.')}: combine"
            combined_N, _ = combine(in_dtype(grads_WN, dtype), config, sizes=SIZES)
            require(
                combined_N.dtype == dtype and combined_N.shape == grads_WN[0].shape, f"{what}: wrong form"
            )
            require(combined_N.isfinite().all(), f"{what}: not finite")
            if len(grads_WN) == 1:
                require(torch.equal(combined_N, in_dtype(grads_WN, dtype)[0]), f"{what}: not the gradient")


def _waiting_operations(rule: Rule) -> set[str]:
    """The operations of a rule for which the host has to wait for the device."""
    with _Waits() as waits:
        if isinstance(rule, GramianMixing):
            gram_SWW, present_W = torch.eye(3, dtype=torch.float64)[None], torch.ones(3, dtype=torch.bool)
            rule.decide(gram_SWW, present_W, RngKey(1, 2))
        elif isinstance(rule, NormMixing):
            gram_WW, present_W = torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.bool)
            state_KW = rule.observe(gram_WW, rule.initial_state(3))
            rule.decide_from_norms(gram_WW[:1] + 1, present_W, state_KW)
        elif isinstance(rule, Scaling):
            mean_C = torch.ones(2)
            statistics_KC = rule.statistics(torch.ones(3, 2), torch.full((3, 1), 1 / 3), mean_C)
            rule.factors(mean_C, statistics_KC, rule.layer_terms(mean_C, statistics_KC).double())
        elif isinstance(rule, Extrapolation):
            rule.direction(torch.ones(2), torch.Generator())
    names: set[str] = waits.names
    return names


class _Waits(TorchDispatchMode):
    _WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := func.overloadpacket.__name__) in self._WAITING:
            self.names.add(name)
        return func(*args, **(kwargs or {}))
