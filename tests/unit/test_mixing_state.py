"""The numbers that a mixing rule keeps of each worker: they move on once a step, and are in checkpoints."""

from __future__ import annotations

import torch

from ds_gradmix.config import parse_block
from ds_gradmix.exchange.mixing_state import MixingState, load_states
from ds_gradmix.exchange.state import RuleState
from tests.support.outside_rules import MODULE
from tests.support.solo import NoSynchronisation

CPU = torch.device("cpu")
TRUST = {"mixing": {"type": f"{MODULE}:Trust"}}


def of(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_a_step_moves_it_to_the_mean_by_elements() -> None:
    state = MixingState(of([1.0, 2.0]), CPU)
    with NoSynchronisation():
        state.add(of([3.0, 4.0])[None], 10.0)  # a bucket
        state.add(torch.stack([of([5.0, 6.0]), of([7.0, 8.0])]), torch.tensor([20.0, 10.0]))  # parameters
        assert state.values_KW is state._initial_KW  # all decisions of the step have the same state
        state.end_step(taken=True)
    assert state.values_KW.tolist() == [[(30 + 100 + 70) / 40, (40 + 120 + 80) / 40]]


def test_a_skipped_step_or_one_without_decisions_leaves_it() -> None:
    state = MixingState(of([1.0, 2.0]), CPU)
    state.add(of([3.0, 4.0])[None], 10.0)
    state.end_step(taken=False)
    assert state.values_KW.tolist() == [[1.0, 2.0]]
    state.end_step(taken=True)
    assert state.values_KW.tolist() == [[1.0, 2.0]]


def test_it_loads_what_is_of_the_same_workers() -> None:
    states = [MixingState(of([1.0, 2.0]), CPU), MixingState(of([1.0, 2.0]), CPU)]
    assert load_states(states, [of([3.0, 4.0]), of([5.0, 6.0])])
    assert [state.values_KW.tolist() for state in states] == [[[3.0, 4.0]], [[5.0, 6.0]]]
    for other in ([of([3.0, 4.0])], [of([3.0, 4.0]), of([5.0, 6.0, 7.0])], []):
        assert not load_states(states, other)
        assert all(state.values_KW.tolist() == [[1.0, 2.0]] for state in states)


def rule_state(block: object, num_workers: int) -> RuleState:
    config = parse_block(block)
    initial_KW = getattr(config.mixing, "initial_state", lambda w: torch.zeros(0, w))(num_workers)
    return RuleState(config, [MixingState(initial_KW, CPU)], None, None, layout=7)


def test_a_checkpoint_goes_to_the_same_rule_with_as_many_workers() -> None:
    saved = rule_state(TRUST, 2)
    saved.mixing[0].load(of([3.0, 4.0]))
    told, found = saved.state_dict(), rule_state(TRUST, 2)
    assert found.load(told, "") is None and found.mixing[0].values_KW.tolist() == [[3.0, 4.0]]
    assert told["mixing"] == f"{MODULE}:Trust"
    for other, reason in [
        (rule_state(TRUST, 3), f"it has no state of mixing {MODULE}:Trust for as many workers"),
        (
            rule_state({"mixing": {"type": "GAF"}}, 2),
            f"it has state of mixing {MODULE}:Trust, which is GAF now",
        ),
    ]:
        warning = other.load(told, "")
        assert warning is not None and reason in warning and "starts afresh" in warning
        assert not other.mixing[0].values_KW.any()


def test_rules_without_state_may_change() -> None:
    told = rule_state({"mixing": {"type": "GAF"}}, 2).state_dict()
    assert rule_state({}, 2).load(told, "") is None
    warning = rule_state(TRUST, 2).load(told, "")
    assert warning is not None and f"it has no state of mixing {MODULE}:Trust" in warning
