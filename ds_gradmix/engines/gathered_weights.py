"""ZeRO-3: a worker's parameters at its extrapolated point, for rules that need no gradient.

An offset is added where a module in training has its parameters gathered, and goes with what was gathered:
in backward a parameter is gathered anew and given the same offset, keyed by (seed, worker, step, name). So
it takes no memory, but for a copy of the parameters that DeepSpeed keeps gathered (persistent ones), and no
communication.
"""

import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import iter_params
from deepspeed.utils import z3_leaf_module
from torch import Tensor

from ds_gradmix.rules import Extrapolation
from ds_gradmix.weights.offset import moved, seed_of


class GatheredWeights:
    """Parameters of a ZeRO-3 engine that hold theta + delta while a module in training has them gathered.

    Args:
        key: seed and number of the worker, for what is drawn at random.
        coordinator: DeepSpeed's, which gathers a module's parameters.
        named: the optimizer's parameters, each with its name and the position of its learning rate among
            those that `extrapolate` is given.
    """

    def __init__(
        self,
        rule: Extrapolation,
        key: tuple[int, int],
        coordinator: Any,
        named: Iterable[tuple[Any, str, int]],
    ) -> None:
        self.rule = rule
        self.measure_every = 0  # steps between those whose offset is measured; 0 is never
        self._key = key
        self._coordinator = coordinator
        self._named: Mapping[int, tuple[str, int]] = {p.ds_id: (name, at) for p, name, at in named}
        self._params = {p.ds_id: p for p, _, _ in named}
        self._is_training = False
        self._step = -1
        self._learning_rates: Sequence[float] = ()
        # Those that hold an offset, by ds_id; theta where DeepSpeed keeps the parameter gathered.
        self._moved: dict[int, Tensor | None] = {}
        self._squares: dict[int, Tensor] = {}  # of offset and weights, [2], of those measured in this step
        self._lock = threading.RLock()  # leaf modules are fetched by several threads of autograd
        coordinator.fetch_sub_module = self._fetching(coordinator.fetch_sub_module)
        for p in self._params.values():
            p.partition = self._partitioning(p, p.partition)
            p.all_gather = self._gathering(p, p.all_gather)

    # --- who sees what ---

    def extrapolate(self, step: int, learning_rates: Sequence[float]) -> None:
        """Training is about to use the parameters."""
        if step != self._step:
            self.set_aside()
            self._step = step
            self._squares.clear()
        self._learning_rates = learning_rates
        self._is_training = True

    def recover(self) -> None:
        """A forward begins: what an earlier one left behind has this step's offset still."""

    def set_aside(self) -> None:
        """Something other than training is about to see the parameters."""
        self._is_training = False
        for ds_id in self._moved:
            self._params[ds_id].ds_active_sub_modules.clear()  # of a forward that broke off
        self._restore(self._moved)

    drop = forget = set_aside  # nothing lasts longer

    def _fetching(self, fetch: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(fetch)
        def fetch_sub_module(module: torch.nn.Module, forward: bool) -> None:
            fetch(module, forward)
            # Reentrant checkpointing ends a backward in the middle, and goes on.
            in_backward = not forward or torch._C._current_graph_task_id() != -1
            if self._is_training or (in_backward and self._step >= 0):
                self._move(iter_params(module, recurse=z3_leaf_module(module)))

        wrapped: Callable[..., None] = torch.compiler.disable(fetch_sub_module)
        return wrapped

    def _partitioning(self, p: Any, partition: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(partition)
        def wrapped(param_list: list[Any] | None = None, *args: Any, **kwargs: Any) -> None:
            for released in [p] if param_list is None else param_list:
                self._moved.pop(released.ds_id, None)
            partition(param_list, *args, **kwargs)

        return wrapped

    def _gathering(self, p: Any, all_gather: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(all_gather)
        def wrapped(param_list: list[Any] | None = None, *args: Any, **kwargs: Any) -> Any:
            if param_list is not None:  # GatheredParameters, which may write them
                self._restore([gathered.ds_id for gathered in param_list])
            handle = all_gather(param_list, *args, **kwargs)
            if param_list is None and self._is_training:  # DeepSpeed itself, for a forward or backward
                self._move([p])
            return handle

        return wrapped

    # --- moving and restoring ---

    @torch.no_grad()
    def _move(self, params: Iterable[Any]) -> None:
        with self._lock:
            for p in params:
                if p.ds_id in self._named and p.ds_id not in self._moved:
                    self._moved[p.ds_id] = self._add_offset(p)

    def _add_offset(self, p: Any) -> Tensor | None:
        """Move a gathered parameter; theta, if it will stay gathered."""
        theta = p.data.reshape(-1)
        name, at = self._named[p.ds_id]
        rate = self._learning_rates[at]
        random = torch.Generator(theta.device)
        random.manual_seed(seed_of(self._key, self._step, name))
        scale: float | Tensor | None = self.rule.scale(rate)
        if scale is None:
            norm_1 = torch.linalg.vector_norm(theta, dtype=torch.float32).reshape(1)
            size_1 = torch.full_like(norm_1, theta.numel())
            scale = self.rule.scales(norm_1, torch.zeros_like(norm_1), size_1, rate)[0]
        ahead = moved(self.rule, theta, theta, scale, random)
        self._measure(p.ds_id, theta, ahead)
        # On one rank what is gathered is what it owns.
        if p.ds_persist or theta.data_ptr() == p.ds_tensor.data_ptr():
            p.data = ahead.view_as(p)
            return theta
        theta.copy_(ahead)
        return None

    @torch.no_grad()
    def _restore(self, ids: Iterable[int]) -> None:
        for ds_id in [each for each in ids if each in self._moved]:
            p, theta = self._params[ds_id], self._moved[ds_id]
            if theta is None:
                self._coordinator._PartitionedParameterCoordinator__release_param(p)
            elif p.ds_status is ZeroParamStatus.AVAILABLE:
                p.data = theta.view_as(p)
            self._moved.pop(ds_id, None)

    def _measure(self, ds_id: int, theta: Tensor, ahead: Tensor) -> None:
        due = self.measure_every and (self._step + 1) % self.measure_every == 0
        if due and ds_id not in self._squares:
            parts = (ahead.float() - theta.float(), theta.float())
            norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
            self._squares[ds_id] = torch.stack(norms).square()

    @property
    def offset_ratio(self) -> float | None:
        """The length of the offset by that of the weights; the host waits for the device here."""
        if not self._squares:
            return None
        squares_2 = torch.stack(list(self._squares.values())).sum(dim=0)
        return float((squares_2[0] / squares_2[1]).sqrt())

    # --- as the reduction sees it (exchange/state.py) ---

    def keep_gradients(self, indices: Sequence[int], parts: Sequence[Tensor], *, last: bool) -> None:
        """No rule here needs them."""

    def end_backward(self, *, last: bool, gradient_scale: float) -> None:
        """Whatever comes next sees theta, but for the rest of a backward that has not come to its end."""
        self._is_training = False
        self._restore([ds_id for ds_id in self._moved if not self._params[ds_id].ds_active_sub_modules])

    def post_step(self, *, keep: bool) -> None:
        """The optimizer has taken the step, or skipped it."""
        self.set_aside()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: what is drawn is keyed by DeepSpeed's own step count."""
        self.set_aside()
        return {}

    def load_state_dict(self, saved: dict[str, Any]) -> bool:
        """Nothing to take over."""
        self.set_aside()
        return True
