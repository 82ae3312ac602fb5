"""`GradientWindow`, every call in every phase of `ExtrapolatedWeights`, and the hooks that make these calls:
without processes.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ds_gradmix.engines.weight_hooks import attach
from ds_gradmix.rules import Extrapolation, Noise, PastGradient
from ds_gradmix.weights.extrapolated import ExtrapolatedWeights, Phase
from ds_gradmix.weights.gradient_window import GradientWindow, ParamLayout

PAST, NOISE = PastGradient(lr=1.0), Noise(std=1.0)
PLACES = [(0, 3, 2), (1, 0, 4), (0, 0, 3)]
SIZES = [size for _, _, size in PLACES]
EVERY = range(len(PLACES))
GRADS = [torch.full((size,), 2.0 + i) for i, size in enumerate(SIZES)]


def layout() -> ParamLayout:
    return ParamLayout([torch.arange(1.0, 6.0), torch.arange(11.0, 15.0)], PLACES)


THETA = layout().views(layout().flats, EVERY)


class Probe:
    """Weights brought to a phase, where parameter 0 is the reduced one."""

    def __init__(self, phase: Phase, rule: Extrapolation, accumulates: bool = False) -> None:
        self.layout = layout()
        self.weights = ExtrapolatedWeights(rule, self.layout, (0, 0), accumulates=accumulates)
        self.delta = [torch.zeros(size) for size in SIZES]
        if phase in (Phase.NO_GRADIENT, Phase.REDUCING_WITHOUT_OFFSET):
            pass
        elif rule.needs_gradient:
            self.reduce(EVERY)
            if phase is not Phase.REDUCED:
                self.weights.post_step(keep=True)
        if phase not in (Phase.NO_GRADIENT, Phase.READY, Phase.REDUCING_WITHOUT_OFFSET, Phase.REDUCED):
            self.weights.extrapolate(1, [0.1, 0.1])
            self.delta = [p - theta for p, theta in zip(self.params, THETA, strict=True)]
        if phase is Phase.SET_ASIDE:
            self.weights.set_aside()
        if phase in (Phase.REDUCING, Phase.REDUCING_WITHOUT_OFFSET):
            self.weights.keep_gradients([0], GRADS[:1], last=True)
        if phase is Phase.REDUCED and not rule.needs_gradient:
            self.reduce(EVERY)
        assert self.weights.phase is phase

    @property
    def params(self) -> list[Tensor]:
        return [view.clone() for view in self.layout.views(self.layout.flats, EVERY)]

    @property
    def buffer(self) -> list[Tensor]:
        return [view.clone() for view in self.layout.views(self.weights._buffer, EVERY)]

    def reduce(self, indices: Any) -> None:
        self.weights.keep_gradients(list(indices), [GRADS[i] for i in indices], last=True)
        self.weights.end_backward(last=True, gradient_scale=1.0)

    def write(self) -> None:
        """As the optimizer does, or a checkpoint that is loaded."""
        for flat, fresh in zip(self.layout.flats, layout().flats, strict=True):
            flat.copy_(fresh)


def call(probe: Probe, name: str) -> None:
    weights = probe.weights
    if name in ("forget", "post_step keep", "load"):
        probe.write()
    {
        "extrapolate": lambda: weights.extrapolate(1, [0.1, 0.1]),
        "set_aside": weights.set_aside,
        "recover": weights.recover,
        "undo": weights.undo,
        "drop": weights.drop,
        "forget": weights.forget,
        "keep": lambda: weights.keep_gradients([1], GRADS[1:2], last=False),
        "keep nothing": lambda: weights.keep_gradients([], [], last=True),
        "keep last": lambda: weights.keep_gradients([1], GRADS[1:2], last=True),
        "end": lambda: weights.end_backward(last=False, gradient_scale=1.0),
        "end last": lambda: weights.end_backward(last=True, gradient_scale=1.0),
        "post_step keep": lambda: weights.post_step(keep=True),
        "post_step": lambda: weights.post_step(keep=False),
        "state_dict": weights.state_dict,
        "load": lambda: weights.load_state_dict(Probe(Phase.SET_ASIDE, PAST).weights.state_dict()),
    }[name]()


NO_GRADIENT, READY, EXTRAPOLATED, SET_ASIDE, REDUCING, WITHOUT, REDUCED = Phase
# The phase after a call in each of these phases; of two, the second is that of a rule that needs no gradient.
TABLE: dict[str, list[Any]] = {
    "extrapolate": [
        (NO_GRADIENT, EXTRAPOLATED), EXTRAPOLATED, EXTRAPOLATED, EXTRAPOLATED, REDUCING, WITHOUT, REDUCED
    ],
    "set_aside": [NO_GRADIENT, READY, SET_ASIDE, SET_ASIDE, NO_GRADIENT, NO_GRADIENT, REDUCED],
    "recover": [NO_GRADIENT, READY, EXTRAPOLATED, SET_ASIDE, NO_GRADIENT, NO_GRADIENT, REDUCED],
    "undo": [NO_GRADIENT, READY, NO_GRADIENT, NO_GRADIENT, NO_GRADIENT, WITHOUT, REDUCED],
    "drop": [NO_GRADIENT] * 7,
    "forget": [NO_GRADIENT] * 7,
    "keep": list(Phase),
    "keep nothing": list(Phase),
    "keep last": [WITHOUT, WITHOUT, REDUCING, WITHOUT, REDUCING, WITHOUT, WITHOUT],
    "end": [NO_GRADIENT, READY, EXTRAPOLATED, SET_ASIDE, NO_GRADIENT, NO_GRADIENT, REDUCED],
    "end last": [REDUCED] * 7,
    "post_step keep": [
        NO_GRADIENT, READY, NO_GRADIENT, NO_GRADIENT, NO_GRADIENT, NO_GRADIENT, (READY, NO_GRADIENT)
    ],
    "post_step": [NO_GRADIENT] * 7,
    "state_dict": [NO_GRADIENT, READY, SET_ASIDE, SET_ASIDE, NO_GRADIENT, NO_GRADIENT, REDUCED],
    "load": [(SET_ASIDE, NO_GRADIENT)] * 7,
}  # fmt: skip


def check(probe: Probe, before: Phase, name: str, accumulates: bool) -> None:
    """The invariants of the phase that a call has led to."""
    phase = probe.weights.phase
    reduced = {0} if before in (REDUCING, WITHOUT) else set()
    reduced |= {1} if name == "keep last" else set()
    expected = [p.tolist() for p in THETA]
    if phase in (EXTRAPOLATED, REDUCING):
        moved = [] if phase is EXTRAPOLATED and before in (NO_GRADIENT, READY) else EVERY
        for i in set(moved) - (reduced if phase is REDUCING else set()):
            expected[i] = (THETA[i] + probe.delta[i]).tolist()
    if phase is EXTRAPOLATED and before in (NO_GRADIENT, READY):
        assert all(not torch.equal(p, theta) for p, theta in zip(probe.params, THETA, strict=True))
    else:
        assert [p.tolist() for p in probe.params] == expected
    for i, kept in enumerate(probe.buffer):
        if phase in (EXTRAPOLATED, REDUCING) and (accumulates or i not in reduced):
            assert torch.equal(kept, THETA[i])
        if phase is SET_ASIDE and name != "load":
            assert torch.equal(kept, THETA[i] + probe.delta[i])
        if probe.weights._window is None or accumulates:
            continue
        if phase in (REDUCING, WITHOUT) and i in reduced:
            assert torch.equal(kept, GRADS[i])
        if phase is REDUCED:
            all_of_it = before is REDUCED and name != "end last"
            assert torch.equal(kept, GRADS[i] if all_of_it or i in reduced else torch.zeros(SIZES[i]))
        if phase is READY:
            assert torch.equal(kept, GRADS[i])


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("rule, accumulates", [(PAST, False), (PAST, True), (NOISE, False)])
def test_every_call_in_every_phase(name: str, rule: Extrapolation, accumulates: bool) -> None:
    for before, after in zip(Phase, TABLE[name], strict=True):
        if before is READY and rule is NOISE:
            continue
        probe = Probe(before, rule, accumulates)
        call(probe, name)
        if isinstance(after, tuple):
            after = after[rule is NOISE]
        assert probe.weights.phase is after, (before, name)
        check(probe, before, name, accumulates)


def test_the_table_has_every_method() -> None:
    methods = {
        name for name, value in vars(ExtrapolatedWeights).items() if callable(value) and name[0] != "_"
    }
    names = {"keep": "keep_gradients", "end": "end_backward", "load": "load_state_dict"}
    assert methods == {names.get(name.split()[0], name.split()[0]) for name in TABLE}


@pytest.mark.parametrize("rule, accumulates", [(PAST, False), (PAST, True), (NOISE, False)])
def test_any_order_of_calls_keeps_theta(rule: Extrapolation, accumulates: bool) -> None:
    """However calls follow each other, theta is in the parameters or in the buffer, bit for bit."""
    random = np.random.default_rng(0)
    probe = Probe(NO_GRADIENT, rule, accumulates)
    seen = set()
    usual = ["extrapolate", "keep last", "end last", "post_step keep"]
    names = [*(name for name in TABLE if name != "load"), *usual * 20]
    for name in random.choice(names, 4000):
        call(probe, str(name))
        phase = probe.weights.phase
        seen.add(phase)
        if phase is EXTRAPOLATED:
            held = [probe.buffer[i] for i in EVERY]
        elif phase is REDUCING:
            held = [(probe.params if i in probe.weights._reduced else probe.buffer)[i] for i in EVERY]
        else:
            held = probe.params
        assert all(torch.equal(ours, theta) for ours, theta in zip(held, THETA, strict=True)), phase
    assert seen == set(Phase) - ({READY} if rule is NOISE else set())


@pytest.mark.parametrize("accumulates", [False, True])
def test_what_is_saved_is_loaded(accumulates: bool) -> None:
    for phase in Phase:
        saved = copy.deepcopy(Probe(phase, PAST, accumulates).weights.state_dict())
        probe = Probe(REDUCING, PAST, accumulates)
        probe.write()
        assert probe.weights.load_state_dict(saved)
        expected = {EXTRAPOLATED: SET_ASIDE, REDUCED: READY, REDUCING: NO_GRADIENT, WITHOUT: NO_GRADIENT}
        assert probe.weights.phase is expected.get(phase, phase)
        if saved["buffers"]:
            assert all(map(torch.equal, probe.weights._buffer, saved["buffers"]))
        assert not saved["buffers"] or not probe.weights.load_state_dict({**saved, "replicas": 2})
        assert not saved["buffers"] or not probe.weights.load_state_dict({**saved, "buffers": [GRADS[0]] * 2})
        assert saved["buffers"] == [] or probe.weights.phase is NO_GRADIENT


def window(accumulates: bool) -> tuple[GradientWindow, list[Tensor]]:
    return GradientWindow(layout(), accumulates=accumulates), [torch.ones_like(f) for f in layout().flats]


def test_one_reduction_needs_one_buffer() -> None:
    collected, buffer = window(False)
    collected.add([2, 1], [GRADS[2], GRADS[1]], buffer, last=True)
    assert collected._sums is None
    found, complete = collected.finish(buffer, [0])
    assert found is buffer and complete
    assert found[0].tolist() == [4, 4, 4, 0, 0] and found[1].tolist() == [3] * 4


@pytest.mark.parametrize("accumulates", [False, True])
def test_several_reductions_are_added_up(accumulates: bool) -> None:
    """Also where nobody knew that there would be several."""
    collected, buffer = window(accumulates)
    given = buffer
    for _ in range(2):
        collected.add([0], GRADS[:1], buffer, last=False)
        collected.add([1], GRADS[1:2], buffer, last=False)
        assert all(bool((flat == 1).all()) for flat in given)  # the caller still needs it
        collected.add([0], GRADS[:1], buffer, last=True)
        buffer, complete = collected.finish(buffer, [1, 2])
        assert complete and buffer is not given
        assert buffer[0].tolist() == [0, 0, 0, 4, 4] and buffer[1].tolist() == [3] * 4
        assert collected._sums is given and not any(bool(flat.any()) for flat in given)
        given = buffer
        for flat in buffer:
            flat.fill_(1.0)


@pytest.mark.parametrize("times", [1, 2])  # master weights may be set twice in a step
def test_a_gradient_of_which_a_part_was_lost_is_not_complete(times: int) -> None:
    collected, buffer = window(True)
    collected.add([0], GRADS[:1], buffer, last=False)
    for _ in range(times):
        collected.clear(in_step=True)
    collected.add([0], GRADS[:1], buffer, last=True)
    buffer, complete = collected.finish(buffer, [])
    assert not complete
    collected.add([0], GRADS[:1], buffer, last=True)
    buffer, complete = collected.finish(buffer, [])
    assert complete
    collected.add([0], GRADS[:1], buffer, last=False)
    collected.clear(in_step=False)
    collected.add([1], GRADS[1:2], buffer, last=True)
    buffer, complete = collected.finish(buffer, [])
    assert complete and buffer[0].tolist() == [0] * 5 and buffer[1].tolist() == [3] * 4


class Engine:
    """What `attach` sees of an engine, with parameters in the optimizer's flat tensors."""

    def __init__(self, rule: Extrapolation) -> None:
        self.module = torch.nn.Linear(3, 3)
        params = list(self.module.parameters())
        places = [(i, 0, p.numel()) for i, p in enumerate(params)]
        flats = [p.data.reshape(-1) for p in params]
        self.weights = ExtrapolatedWeights(rule, ParamLayout(flats, places), (0, 0), accumulates=False)
        self.loads, self.reasons, self.loaded = 0, list[str](), "place"
        attach(
            self,
            self.weights,
            lambda: self.weights.extrapolate(0, [0.1, 0.1]),
            self.reasons.append,
            lambda: self.loads,
        )

    def backward(self, loss: Tensor, scale: float = 1.0) -> float:
        return scale

    def _backward_prologue(self) -> None: ...

    def step(self) -> None: ...

    def destroy(self) -> None: ...

    def eval(self) -> None:
        self.module.eval()

    def load_module_state_dict(self, state: dict[str, Tensor]) -> None:
        self.module.load_state_dict(state)

    def load_checkpoint(self, states: bool) -> tuple[str | None, None]:
        self.loads += int(states)
        return self.loaded or None, None


def test_training_alone_sees_the_offset() -> None:
    engine, x = Engine(NOISE), torch.ones(1, 3)
    weights = engine.weights
    engine.module(x)
    assert weights.phase is EXTRAPOLATED
    with torch.no_grad():
        engine.module(x)
    assert weights.phase is SET_ASIDE
    assert engine.backward(x, scale=2.0) == 2.0 and weights.phase is EXTRAPOLATED
    theta = {name: value.clone() for name, value in engine.module.state_dict().items()}
    assert weights.phase is SET_ASIDE
    engine._backward_prologue()
    assert weights.phase is EXTRAPOLATED
    engine.eval()
    assert weights.phase is SET_ASIDE and not engine.module.training
    engine.module(x)
    assert weights.phase is SET_ASIDE
    engine.load_module_state_dict(theta)
    assert weights.phase is NO_GRADIENT
    assert all(torch.equal(value, theta[name]) for name, value in engine.module.state_dict().items())
    for loaded, states, reasons in (("place", True, 0), ("", False, 0), ("place", False, 1)):
        engine.loaded = loaded
        assert engine.load_checkpoint(states) == (loaded or None, None)
        assert len(engine.reasons) == reasons


def test_a_copy_of_the_module_is_on_its_own() -> None:
    """An average of the weights that is loaded, evaluated or trained changes nothing of the engine."""
    engine, x = Engine(NOISE), torch.ones(1, 3)
    engine.module(x)
    for copied in (copy.deepcopy(engine.module), pickle.loads(pickle.dumps(engine.module))):
        with torch.no_grad():
            copied(x)
        copied.load_state_dict(copied.state_dict())
        assert engine.weights.phase is EXTRAPOLATED
    engine.weights.drop()
    copied(x)
    assert engine.weights.phase is NO_GRADIENT
    copy.copy(engine.module)(x)  # shares the parameters
    assert engine.weights.phase is EXTRAPOLATED


def test_a_backward_trains_if_a_forward_of_its_step_did() -> None:
    engine, x = Engine(NOISE), torch.ones(1, 3)
    engine.module.eval()
    engine.module(x)
    engine.backward(x)
    assert engine.weights.phase is NO_GRADIENT
    engine.module.train()
    with pytest.raises(RuntimeError, match="shape"):
        engine.module(torch.ones(1, 4))
    assert engine.weights.phase is EXTRAPOLATED
    engine.step()
    engine.weights.drop()
    engine.backward(x)
    assert engine.weights.phase is NO_GRADIENT
    engine.module(x)
    assert engine.weights.phase is EXTRAPOLATED
    engine.weights.drop()
    engine.destroy()
    engine.module(x)
    assert engine.weights.phase is NO_GRADIENT
