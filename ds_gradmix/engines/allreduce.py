"""ZeRO-0 and BF16_Optimizer: the adapter to an engine that all-reduces, so that every rank has the result.

Nobody owns a part of these buckets, so ranks share the work evenly, and the result goes back to all of them:
as many bytes as the all-reduce it replaces. DeepSpeed enumerates the buckets of a step, all of which pass
`engine.allreduce_and_copy`; this only records them, and then they are reduced.

Four optimizers are behind this adapter, and the pipeline engine compares one's type, so it replaces methods
of the engine and of the optimizer, and needs no subclasses.
"""

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor

from ds_gradmix.engines.context import EngineContext, build_reducer, extrapolated_weights
from ds_gradmix.engines.parallel_groups import Named
from ds_gradmix.exchange.bucket import Bucket, CommDtypes, ParamSpan
from ds_gradmix.exchange.transport import Transport
from ds_gradmix.weights.gradient_window import ParamLayout


class RecordedCall(NamedTuple):
    """A call of `engine.allreduce_and_copy`."""

    tensors: list[Tensor]
    group: Any
    world_size: Any


class AllReduceAdapter:
    """The rules between an engine and its optimizer, if that is not ZeRO's.

    It is kept alive by the methods that `install` replaces.
    """

    def __init__(self, engine: Any, context: EngineContext) -> None:
        self._engine = engine
        self._optimizer = engine.optimizer
        self._context = context
        own = self._own_groups()
        self._named, self._frozen = self._named_parameters({id(p) for group in own for p in group})
        for _, p in self._named if context.config.extrapolation is not None else ():
            p.data = p.data.contiguous()  # offsets work on flat views
        self._addresses = [p.data_ptr() for _, p in self._named]
        flats = [p.data.reshape(-1) for _, p in self._named]
        memory = ParamLayout(flats, [(i, 0, p.numel()) for i, (_, p) in enumerate(self._named)])
        self.weights = extrapolated_weights(context, self._named, memory, accumulates=False)
        self.reducer = build_reducer(context, self._named, memory, self.weights)
        self._recorded: list[RecordedCall] | None = None  # inside of the reduction of a step
        self._reduce_all = engine.buffered_allreduce_fallback
        self._allreduce_and_copy = engine.allreduce_and_copy

    def install(self) -> None:
        """Replace the engine's and the optimizer's methods."""
        engine, optimizer = self._engine, self._optimizer
        optimizer.gradmix = self.reducer
        engine.buffered_allreduce_fallback = self._reduce
        engine.allreduce_and_copy = self._record
        engine.save_checkpoint = self._saving(engine.save_checkpoint)
        engine.load_checkpoint = self._loading(engine.load_checkpoint)
        # An optimizer may have been in another engine before.
        take_step = getattr(optimizer.step, "_gradmix_replaces", optimizer.step)
        optimizer.step = self._stepping(take_step)
        for name in ("refresh_fp32_params", "update_lp_params"):
            if hasattr(optimizer, name):
                setattr(optimizer, name, self._without_offset(getattr(optimizer, name)))

    @property
    def _is_bf16(self) -> bool:
        return isinstance(self._optimizer, BF16_Optimizer)

    def _own_groups(self) -> list[list[torch.nn.Parameter]]:
        """The model's parameters in the optimizer, by its groups."""
        if self._is_bf16:
            return list(self._optimizer.bf16_groups)
        if isinstance(self._optimizer, (FP16_Optimizer, FP16_UnfusedOptimizer)):
            return list(self._optimizer.fp16_groups)
        return [group["params"] for group in self._optimizer.param_groups]

    def _named_parameters(self, own: set[int]) -> tuple[Named, Named]:
        """The optimizer's parameters that require gradients, which the rules are about, and its others."""
        if self._is_bf16:
            names = self._engine.param_names
            return [(names[p], p) for group in self._optimizer.bf16_groups for p in group], []
        named = [(n, p) for n, p in self._engine.module.named_parameters() if id(p) in own and p.numel()]
        trained = [(name, p) for name, p in named if p.requires_grad]
        return trained, [(name, p) for name, p in named if not p.requires_grad]

    def learning_rates(self) -> list[float]:
        """The learning rate of every parameter."""
        for (name, p), address in zip(self._named, self._addresses, strict=True):
            if p.data_ptr() != address:
                raise ValueError(
                    f"{name}: its memory is not what it was when the engine was built, and gradmix."
                    "extrapolation works on that: convert or move the model before"
                )
        groups = zip(self._optimizer.param_groups, self._own_groups(), strict=True)
        rates = {id(p): float(group["lr"]) for group, params in groups for p in params}
        return [rates[id(p)] for _, p in self._named]

    # --- one backward ---

    def _record(self, small_bucket: Sequence[Tensor], dp_group: Any, dp_world_size: Any = None) -> None:
        """In place of `engine.allreduce_and_copy`."""
        if self._recorded is None:  # not by the reduction of a step
            self._allreduce_and_copy(small_bucket, dp_group, dp_world_size)
        else:
            self._recorded.append(RecordedCall(list(small_bucket), dp_group, dp_world_size))

    def _reduce(self, grads: Any = None, elements_per_buffer: int = 500_000_000) -> None:
        """In place of `engine.buffered_allreduce_fallback`: reduce all gradients of a step."""
        found, spans_at = self._find_gradients()
        self._recorded = []
        try:
            self._reduce_all(grads=grads, elements_per_buffer=elements_per_buffer)
            calls = self._recorded
        finally:
            self._recorded = None
        buckets = []
        for call in calls:
            own, others = call.tensors, []
            if self.reducer.transport is not Transport.STOCK:
                own = [tensor for tensor in call.tensors if tensor.data_ptr() in spans_at]
                others = [tensor for tensor in call.tensors if tensor.data_ptr() not in spans_at]
            if others:  # of parameters that the optimizer does not have
                self._allreduce_and_copy(others, call.group, call.world_size)
            if own:
                buckets.append(self._bucket(call._replace(tensors=own), spans_at))
        dtypes = (grad.dtype for _, grad in found)
        widest = max(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)
        self.reducer.reduce_all(found, buckets, self._dtypes(widest), self._context.key)
        # Also in fp16: DeepSpeed 0.19.8 scales the loss for ZeRO's optimizers only.
        self.reducer.end_backward(last=True, gradient_scale=1.0)

    def _bucket(self, call: RecordedCall, spans_at: Mapping[int, tuple[ParamSpan, ...]]) -> Bucket:
        spans, start = [], 0
        for tensor in call.tensors:
            for index, begin, length in spans_at.get(tensor.data_ptr(), ()):
                spans.append(ParamSpan(index, start + begin, length))
            start += tensor.numel()
        workers, dtypes = self.reducer.workers_of(call.group), self._dtypes(call.tensors[0].dtype)

        def sum_over_workers(flat_N: Tensor) -> None:
            sent = flat_N.to(dtypes.gradient)
            workers.all_reduce(sent)
            flat_N.copy_(sent)

        replay = functools.partial(self._allreduce_and_copy, *call)
        return Bucket(call.tensors, tuple(spans), workers, dtypes, replay, sum_over_workers)

    def _find_gradients(self) -> tuple[list[tuple[int, Tensor]], dict[int, tuple[ParamSpan, ...]]]:
        """Of every parameter its position and gradient; and which of them lie in a tensor, by its address."""
        grads: list[tuple[int, Tensor]] = []
        spans_at: dict[int, tuple[ParamSpan, ...]] = {}
        if not self._is_bf16:
            self._check_frozen()
            self._engine._get_gradients_for_reduction()  # makes those that are missing, with zeros
            for index, (name, p) in enumerate(self._named):
                if p.grad is None:
                    continue
                grads.append((index, p.grad.detach()))
                if p.grad.layout != torch.strided:
                    raise ValueError(
                        f"{name}: its gradient is sparse; allowed are dense ones; build the layer with "
                        "sparse=False"
                    )
                spans_at[p.grad.data_ptr()] = (ParamSpan(index, 0, p.grad.numel()),)
            return grads, spans_at
        index = 0
        for group, flat in enumerate(self._optimizer.fp32_groups_gradients_flat):
            spans, start = [], 0
            for grad in self._optimizer.fp32_groups_gradients[group]:
                spans.append(ParamSpan(index, start, grad.numel()))
                grads.append((index, grad))
                index, start = index + 1, start + grad.numel()
            spans_at[flat.data_ptr()] = tuple(spans)
        return grads, spans_at

    def _check_frozen(self) -> None:
        for name, p in self._frozen:
            if p.requires_grad:
                raise ValueError(
                    f"{name}: requires gradients, but did not when the engine was built, so the rules do "
                    "not know it: freeze it after deepspeed.initialize(), or build the engine anew"
                )

    def _dtypes(self, gradient: torch.dtype) -> CommDtypes:
        sent = min(gradient, self._engine.communication_data_type, key=lambda dtype: dtype.itemsize)
        return CommDtypes(sent, sent)

    # --- one step ---

    def _stepping(self, take_step: Callable[..., Any]) -> Callable[..., Any]:
        """In place of `optimizer.step`: take it, or skip it as this optimizer skips an overflow.

        A method, since torch's schedulers wrap the function below it.
        """

        @functools.wraps(take_step)
        def step(_: Any, *args: Any, **kwargs: Any) -> Any:
            self._undo_offset()  # if nothing was reduced, it is still there
            skips, result = self.reducer.pre_step(self._context.step()), None
            self._optimizer.overflow = skips  # the engine counts it, and leaves its schedule alone
            if not skips:
                result = take_step(*args, **kwargs)
            else:
                if self._is_bf16:
                    self._optimizer.clear_hp_grads()
                self._optimizer.zero_grad()
            self._context.end_step(self.reducer, taken=not self._optimizer.overflow)
            return result

        step._gradmix_replaces = take_step  # type: ignore[attr-defined]
        return types.MethodType(step, self._optimizer)

    def _undo_offset(self) -> None:
        if self.weights is not None:
            self.weights.undo()

    def _without_offset(self, method: Callable[[], None]) -> Callable[[], None]:
        """Between master weights and parameters, which must not hold an offset then, nor get it back."""

        @functools.wraps(method)
        def wrapped() -> None:
            self._undo_offset()
            method()

        return wrapped

    # --- checkpoints ---

    def _saving(self, save: Callable[..., Any]) -> Callable[..., Any]:
        """Every rank has state of its own, and here DeepSpeed saves the first rank's optimizer alone."""

        @functools.wraps(save)
        def save_checkpoint(save_dir: str, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
            if save_dir:  # without one DeepSpeed says what is wrong
                name = f"global_step{self._engine.global_steps}" if tag is None else str(tag)
                path = self._file(Path(save_dir) / name)
                path.parent.mkdir(parents=True, exist_ok=True)
                state = {**self.reducer.state.state_dict(), "step": int(self._engine.global_steps)}
                torch.save(state, path)  # before DeepSpeed names the checkpoint the latest
            return save(save_dir, tag, *args, **kwargs)

        return save_checkpoint

    def _loading(self, load: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(load)
        def load_checkpoint(load_dir: str, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
            loaded = load(load_dir, tag, *args, **kwargs)
            names = ("load_module_strict", "load_optimizer_states", "_", "load_module_only")
            given = dict(zip(names, args, strict=False)) | kwargs
            weights_alone = given.get("load_module_only") or not given.get("load_optimizer_states", True)
            if loaded[0] is None or weights_alone:
                return loaded
            path = self._file(Path(loaded[0]).parent)
            saved = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
            why = "it was made without a gradmix block, or by other ranks"
            if saved is not None and saved["step"] != self._engine.global_steps:
                saved, why = None, "what a gradmix block has left there is of another step"
            self.reducer.load(saved, why)
            return loaded

        return load_checkpoint

    @staticmethod
    def _file(folder: Path) -> Path:
        return folder / f"gradmix_rank_{torch.distributed.get_rank():05d}.pt"
