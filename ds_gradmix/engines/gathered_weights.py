"""ZeRO-3: a worker's parameters at its extrapolated point, for rules that need no gradient.

An offset is added where a module in training has its parameters gathered, and goes with what was gathered:
in backward a parameter is gathered anew and given the same offset, keyed by (seed, worker, step, name). So
it takes no memory, but for a copy of the parameters that DeepSpeed keeps gathered (persistent ones), and no
communication.
"""

import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import iter_params
from deepspeed.utils import z3_leaf_module
from torch import Tensor

from ds_gradmix.rules import Extrapolation
from ds_gradmix.weights.offset import moved, seed_of

_CHUNK = 2**24  # elements moved at a time


class GatheredWeights:
    """Parameters of a ZeRO-3 engine that hold theta + delta while a module in training has them gathered.

    Args:
        key: seed and number of the worker, for what is drawn at random.
        offload: DeepSpeed's, which has the module, and the coordinator that gathers parameters.
        named: the optimizer's parameters, each with its name and the position of its learning rate among
            those that `extrapolate` is given.
    """

    def __init__(
        self, rule: Extrapolation, key: tuple[int, int], offload: Any, named: Iterable[tuple[Any, str, int]]
    ) -> None:
        self.rule = rule
        self.measure_every = 0  # steps between those whose offset is measured; 0 is never
        self._key = key
        self._coordinator = offload.get_param_coordinator()
        self._named = {p.ds_id: (p, name, at) for p, name, at in named}
        self._step = -1
        self._learning_rates: Sequence[float] = ()
        self._in_forward = self._in_backward = False  # of training: what is gathered there is moved
        self._is_first_fetch = False
        # Those that hold an offset, by ds_id; theta where DeepSpeed keeps the parameter gathered.
        self._moved: dict[int, Tensor | None] = {}
        self._squares: dict[int, Tensor] = {}  # of offset and weights, [2], of those measured in this step
        self._lock = threading.RLock()  # leaf modules are fetched by several threads of autograd
        self._replaced: list[tuple[Any, str, Any]] = []
        self._replace(self._coordinator, "fetch_sub_module", self._fetching)
        # Of a list of parameters DeepSpeed asks the first, which may be a frozen one.
        for p in iter_params(offload.module, recurse=True):
            self._replace(p, "partition", functools.partial(self._partitioning, p))
            self._replace(p, "all_gather", functools.partial(self._gathering, p))

    def _replace(self, owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        original = getattr(owner, name)
        self._replaced.append((owner, name, original))
        setattr(owner, name, wrap(original))

    def destroy(self) -> None:
        """The engine ends; its module may go on in another one."""
        self.set_aside()
        for owner, name, original in self._replaced:
            setattr(owner, name, original)
        self._replaced.clear()

    # --- who sees what ---

    def extrapolate(self, step: int, learning_rates: Sequence[float]) -> None:
        """Training is about to use the parameters."""
        if step != self._step:
            self.set_aside()
            self._step, self._learning_rates = step, learning_rates
            self._squares.clear()
        self._in_forward = self._in_backward = self._is_first_fetch = True

    def recover(self) -> None:
        """A forward begins: what an earlier one left behind has this step's offset still."""

    def set_aside(self) -> None:
        """Something other than training is about to see the parameters."""
        self._in_forward = self._in_backward = False
        for ds_id in self._moved:
            self._named[ds_id][0].ds_active_sub_modules.clear()  # of a forward that broke off
        self._restore(self._moved)

    drop = forget = set_aside  # nothing lasts longer

    def restore_idle(self) -> None:
        """Whatever comes next sees theta, but for the rest of a backward that has not come to its end."""
        self._in_forward, self._is_first_fetch = False, True
        self._restore([i for i in self._moved if not self._named[i][0].ds_active_sub_modules])

    def _is_wanted(self, *, forward: bool = True) -> bool:
        """Whether what is gathered now is for training. Reentrant checkpointing ends a backward in the
        middle, and goes on.
        """
        in_backward = not forward or torch._C._current_graph_task_id() != -1
        return self._in_forward or (in_backward and self._in_backward)

    def _fetching(self, fetch: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(fetch)
        def fetch_sub_module(module: torch.nn.Module, forward: bool) -> None:
            fetch(module, forward)
            if self._is_wanted(forward=forward):
                self._move(iter_params(module, recurse=z3_leaf_module(module)))
                if self._is_first_fetch:  # no module has to fetch those that are there
                    self._is_first_fetch = False
                    stay = [p for p, _, _ in self._named.values() if p.ds_persist]
                    self._move(p for p in stay if p.ds_status is ZeroParamStatus.AVAILABLE)

        wrapped: Callable[..., None] = torch.compiler.disable(fetch_sub_module)
        return wrapped

    def _partitioning(self, p: Any, partition: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(partition)
        def wrapped(param_list: list[Any] | None = None, *args: Any, **kwargs: Any) -> None:
            partition(param_list, *args, **kwargs)
            for released in [p] if param_list is None else param_list:
                self._moved.pop(released.ds_id, None)

        return wrapped

    def _gathering(self, p: Any, all_gather: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(all_gather)
        def wrapped(param_list: list[Any] | None = None, *args: Any, **kwargs: Any) -> Any:
            if param_list is not None:  # GatheredParameters, which may write them
                ids = [gathered.ds_id for gathered in param_list]
                self._restore(ids)
                if held := [self._named[i][1] for i in ids if i in self._moved]:
                    raise RuntimeError(
                        f"{', '.join(held)}: cannot be gathered while a module computes with them, and "
                        "extrapolation has moved them (a forward that raised an exception keeps them, too)"
                    )
            handle = all_gather(param_list, *args, **kwargs)
            if param_list is None and self._is_wanted():  # DeepSpeed itself, for a forward or backward
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
        _, name, at = self._named[p.ds_id]
        # On one rank what is gathered is what it owns.
        is_kept = p.ds_persist or theta.data_ptr() == p.ds_tensor.data_ptr()
        ahead = torch.empty_like(theta) if is_kept else theta
        random = torch.Generator(theta.device)
        random.manual_seed(seed_of(self._key, self._step, name))
        scale = self._scale(theta, self._learning_rates[at])
        due = self.measure_every and (self._step + 1) % self.measure_every == 0
        measures = due and p.ds_id not in self._squares
        for ours, out in zip(theta.split(_CHUNK), ahead.split(_CHUNK), strict=True):
            values = moved(self.rule, ours, ours, scale, random)
            if measures:
                self._measure(p.ds_id, ours, values)
            out.copy_(values)
        if not is_kept:
            return None
        if not get_accelerator().is_synchronized_device():
            theta.record_stream(get_accelerator().current_stream())  # it was gathered on another one
        p.data = ahead.view_as(p)
        return theta

    def _scale(self, theta: Tensor, learning_rate: float) -> float | Tensor:
        scale = self.rule.scale(learning_rate)
        if scale is not None:
            return scale
        norm_1 = torch.linalg.vector_norm(theta, dtype=torch.float32).reshape(1)
        size_1 = torch.full_like(norm_1, theta.numel())
        return self.rule.scales(norm_1, torch.zeros_like(norm_1), size_1, learning_rate)[0]

    @torch.no_grad()
    def _restore(self, ids: Iterable[int]) -> None:
        for ds_id in [each for each in ids if each in self._moved]:
            p, theta = self._named[ds_id][0], self._moved[ds_id]
            if theta is not None and p.ds_status is ZeroParamStatus.AVAILABLE:
                p.data = theta.view_as(p)
            elif theta is None:  # not while a module computes with it
                self._coordinator._PartitionedParameterCoordinator__release_param(p)
                if p.ds_status is ZeroParamStatus.AVAILABLE:
                    continue
            self._moved.pop(ds_id, None)

    def _measure(self, ds_id: int, theta: Tensor, ahead: Tensor) -> None:
        parts = (ahead.float() - theta.float(), theta.float())
        norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
        self._squares[ds_id] = self._squares.get(ds_id, 0) + torch.stack(norms).square()

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
        """All gradients of a backward pass are reduced, or of a part of it."""
        self.restore_idle()

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
