"""The step of an optimizer with trust ratios: two sweeps over a param group, and between them the sums of
squares of whole parameters.

The first sweep brings the state forward and sums, for each of P parameters, the squares of its weights and
of what they are compared with, `[2, P]` in float64. Where parameters are divided over ranks the sums are
added in one all-reduce of 2 P numbers. The second sweep takes the step. Both work on tiles: beyond its state
the optimizer takes the memory of a few tiles and a few numbers a parameter, and starts no kernel for a
parameter. Nothing waits for the device.
"""

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_gradmix.ops.segments import to_device
from ds_gradmix.optim.layout import GroupLayout, Tile, tiles_of, whole_parameters

_WHOLE = "whole parameters"  # in a copy of an optimizer: whether its param groups hold them
# Elements: on a CPU a tile's tensors stay in a core's cache, on a GPU each kernel has enough to do.
_CPU_TILE, _GPU_TILE = 1 << 17, 1 << 24


class TileTensors(NamedTuple):
    """What an optimizer works on in a tile, in float32 or float64; it changes weights and state in place."""

    weights_C: Tensor
    grads_C: Tensor
    state: Mapping[str, Tensor]  # each `[C]`
    decay_C: Tensor  # the weight decay of each column, `[C]` or `[1]`
    update_C: Tensor  # memory for an update
    keeps_update: bool  # whether what the first sweep wrote there is still there in the second
    scratch_C: Tensor  # more memory, since a CPU is slow to give it


class _Memory(NamedTuple):
    """What the tiles of a step compute in."""

    update_C: Tensor
    scratch_C: Tensor
    spends_gradients: bool


class _Plan(NamedTuple):
    """A param group, ready for its steps."""

    key: tuple[object, ...]
    layout: GroupLayout
    tiles: Sequence[Tile]
    plain_P: Tensor  # parameters without decay and ratio, and the padding: P + 1
    uncounted_P: Tensor  # parameters that this rank adds nothing of to the sums


class LayerwiseOptimizer(torch.optim.Optimizer):
    """An optimizer whose steps are scaled by a trust ratio for every parameter.

    State is float32 for parameters of 16 bits. `step` is counted by param group. What an engine puts in the
    place of parameters has to be told by `use_layouts`: with a ratio for a whole flat partition it would be
    another optimizer.
    """

    # --- what makes an optimizer of it ---

    def state_names(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """The names of the tensors that are kept for each weight."""
        raise NotImplementedError

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Raise a ValueError beginning with the name of a setting that is not allowed."""
        raise NotImplementedError

    def measure(self, tile: TileTensors, group: Mapping[str, Any]) -> Tensor:
        """First sweep: bring the state forward, and return what the weights are compared with, `[C]`."""
        raise NotImplementedError

    def trust_ratios(self, norms_2P: Tensor, group: Mapping[str, Any]) -> Tensor:
        """The ratios `[P]` from the norms of the weights, and of what they are compared with."""
        raise NotImplementedError

    def take_step(self, tile: TileTensors, ratios_C: Tensor, group: Mapping[str, Any]) -> None:
        """Second sweep: change the weights; ratios are `[C]` or `[1]`."""
        raise NotImplementedError

    # --- a step ---

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step; parameters without a gradient are left as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["params"]:
                self._step(group)
        return loss

    def _step(self, group: dict[str, Any]) -> None:
        params = group["params"]
        state = {name: [self._state_of(p, name) for p in params] for name in self.state_names(group)}
        if self.waits_for_layouts:
            return
        plan = self._plan_of(group)
        counted = self.state[params[0]] if plan.layout.is_in_turns else group
        group["step"] = counted["step"] = counted.get("step", 0) + 1
        decay_P = torch.full_like(plan.plain_P, group["weight_decay"], dtype=_wide(params[0].dtype))
        decay_P.masked_fill_(plan.plain_P, 0.0)
        columns = max((tile.num_columns for tile in plan.tiles), default=0)
        update_C, scratch_C = decay_P.new_empty(2, columns)
        memory = _Memory(update_C, scratch_C, plan.layout.spends_gradients)
        squares = []
        for tile in plan.tiles:
            tensors = _load(tile, group, state, decay_P, memory)
            for values_C in (tensors.weights_C, self.measure(tensors, group)):
                squares.append(tile.segments.sum_of_squares(values_C))
            _store(tile, group, state, tensors)
        ratios_P = self.trust_ratios(_add_up(plan, squares).sqrt_(), group)
        ratios_P = torch.nn.functional.pad(ratios_P, (0, 1)).masked_fill_(plan.plain_P, 1.0).to(decay_P.dtype)
        for tile in plan.tiles:
            tensors = _load(tile, group, state, decay_P, memory)
            self.take_step(tensors, tile.expand(ratios_P), group)
            _store(tile, group, state, tensors)

    def _state_of(self, p: Tensor, name: str) -> Tensor:
        state = self.state[p]
        if name not in state:
            state[name] = torch.zeros_like(p, dtype=_wide(p.dtype))
        found: Tensor = state[name]
        return found

    # --- what is stepped on ---

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._set_up()
        super().__init__(params, defaults)

    def _set_up(self) -> None:
        self.waits_for_layouts = False  # an engine that is being built may take a step, which does nothing
        self._layouts: dict[int, tuple[Tensor, GroupLayout]] = {}  # by the id of a group's first tensor
        self._plans: dict[int, _Plan] = {}
        self._given: dict[int, weakref.ref[Tensor]] = {}  # parameters, by their id

    def use_layouts(self, layouts: Sequence[tuple[Tensor, GroupLayout]]) -> None:
        """Tell what an engine has put in the place of parameters: the first tensor of each param group, and
        the group's layout.
        """
        self._layouts = {id(tensor): (tensor, layout) for tensor, layout in layouts}
        self._plans.clear()
        self.waits_for_layouts = False

    def _plan_of(self, group: Mapping[str, Any]) -> _Plan:
        params = group["params"]
        first, present = id(params[0]), tuple(p.grad is not None for p in params)
        key = (present, tuple(map(id, params)), params[0].device, group["exclude_one_dimensional"])
        plan = self._plans.get(first)
        if plan is None or plan.key != key:
            self._plans[first] = plan = self._make_plan(group, key, present)
        return plan

    def _make_plan(self, group: Mapping[str, Any], key: tuple[object, ...], present: Sequence[bool]) -> _Plan:
        params = group["params"]
        if any(p.is_sparse or (p.grad is not None and p.grad.is_sparse) for p in params):
            raise RuntimeError(f"{type(self).__name__} does not take sparse gradients")
        if len({(p.device, _wide(p.dtype)) for p in params}) > 1:
            raise RuntimeError(
                f"{type(self).__name__} takes param groups of one device, and float64 in groups of its own"
            )
        layout, device = self._layout_of(params), params[0].device
        tile_size = _CPU_TILE if device.type == "cpu" else _GPU_TILE
        is_plain = [group["exclude_one_dimensional"] and found for found in layout.one_dimensional]
        plain_P = to_device(torch.tensor([*is_plain, True]), device)
        uncounted_P = to_device(torch.tensor([not counted for counted in layout.counted]), device)
        return _Plan(key, layout, tiles_of(layout, params, present, tile_size), plain_P, uncounted_P)

    def _layout_of(self, params: Sequence[Tensor]) -> GroupLayout:
        tensor, layout = self._layouts.get(id(params[0]), (None, None))
        if tensor is params[0] and layout is not None:
            return layout
        if not all(id(p) in self._given and self._given[id(p)]() is p for p in params):
            raise RuntimeError(
                f"{type(self).__name__}: the param groups hold other tensors than the optimizer was given, "
                "such as ZeRO's flat partitions, and where parameters begin and end in them is not known: "
                "start the script with `deepspeed --module ds_gradmix`, or call ds_gradmix.enable() before "
                "deepspeed.initialize(), or ds_gradmix.initialize() in place of it"
            )
        return whole_parameters(params, params)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self.check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise
        group["step"] = 0
        self._given.update((id(p), weakref.ref(p)) for p in group["params"])

    # --- checkpoints ---

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` gave; float32 state of parameters of 16 bits stays float32."""
        super().load_state_dict(dict(state_dict))
        ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(ids, params, strict=True):
            for name, saved in state_dict["state"].get(index, {}).items():
                if isinstance(saved, Tensor) and saved.dtype != self.state[p][name].dtype:
                    self.state[p][name] = saved.to(p.device, _wide(p.dtype), copy=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), _WHOLE: not self._layouts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also called by `load_state_dict`, which leaves parameters and layouts as they are."""
        whole = state.pop(_WHOLE, None)
        if whole is not None:  # a copy, or read from a file
            self._set_up()
        super().__setstate__(state)
        if whole:
            self._given.update(
                (id(p), weakref.ref(p)) for group in self.param_groups for p in group["params"]
            )


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in, and state is kept in."""
    return torch.promote_types(dtype, torch.float32)


def _add_up(plan: _Plan, squares: Sequence[Tensor]) -> Tensor:
    """The sums `[2, P]` of what tiles gave for weights and for what they are compared with, in turn."""
    sums_2P = torch.zeros(2, len(plan.plain_P), dtype=torch.float64, device=plan.plain_P.device)
    if squares:
        params_T = torch.cat([tile.params_S for tile in plan.tiles])
        squares_2T = torch.stack([torch.cat(list(squares[row::2])) for row in (0, 1)])
        sums_2P.index_add_(1, params_T, squares_2T)
    sums_2P = sums_2P[:, :-1].masked_fill(plan.uncounted_P, 0.0)  # without that of the padding
    plan.layout.all_reduce(sums_2P)
    return sums_2P


def _load(
    tile: Tile,
    group: Mapping[str, Any],
    state: Mapping[str, Sequence[Tensor]],
    decay_P: Tensor,
    memory: _Memory,
) -> TileTensors:
    grads = [p if p.grad is None else p.grad for p in group["params"]]
    grads_C = tile.load(grads)
    keeps = memory.spends_gradients and tile.is_view(grads) and grads_C.dtype == decay_P.dtype
    return TileTensors(
        tile.load(group["params"]).to(decay_P.dtype),
        grads_C.to(decay_P.dtype),
        {name: tile.load(tensors) for name, tensors in state.items()},
        tile.expand(decay_P),
        grads_C if keeps else memory.update_C[: tile.num_columns],
        keeps,
        memory.scratch_C[: tile.num_columns],
    )


def _store(
    tile: Tile, group: Mapping[str, Any], state: Mapping[str, Sequence[Tensor]], tensors: TileTensors
) -> None:
    tile.store(group["params"], tensors.weights_C)
    for name, kept in state.items():
        tile.store(kept, tensors.state[name])


def check_number(group: Mapping[str, Any], name: str, below: float = math.inf) -> None:
    """Raise a ValueError unless a setting is a finite number of at least 0, and below a bound."""
    value = group[name]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and 0 <= value < below):
        bound = "" if below == math.inf else f" and below {below:g}"
        raise ValueError(f"{name}: {value!r}, but allowed is a number of at least 0{bound}")


def check_flag(group: Mapping[str, Any], name: str) -> None:
    """Raise a ValueError unless a setting is true or false."""
    if not isinstance(group[name], bool):
        raise ValueError(f"{name}: {group[name]!r}, but allowed is true or false")
