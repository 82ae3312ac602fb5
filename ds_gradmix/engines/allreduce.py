"""ZeRO-0 and BF16_Optimizer: the seam to `engine.allreduce_bucket`, after which every rank has the result.

Nobody owns a part of these buckets, so ranks share the work evenly, and the result goes back to all of them:
as many bytes as the all-reduce it replaces. For a decision on the whole model all buckets are sent before any
is combined: in between, gradients hold what others sent for this rank's share.

There are four optimizers behind this seam, and the pipeline engine compares one's type, so it works on the
engine's and the optimizer's own methods, not on subclasses.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor

from ds_gradmix.comm.consistency import fingerprint_of
from ds_gradmix.comm.workers import ParallelGroups
from ds_gradmix.config import GradmixConfig
from ds_gradmix.engines.seam import Named, Seam
from ds_gradmix.exchange.reducer import ParamSpan
from ds_gradmix.exchange.tiled_buffer import CommDtypes
from ds_gradmix.weights.extrapolated import State


class AllreduceSeam:
    """The rules between an engine and its optimizer, if that is not ZeRO's.

    Building it sets them to work; it is kept alive by the methods it replaces.
    """

    def __init__(
        self,
        engine: Any,
        block: GradmixConfig,
        place: ParallelGroups,
        step: Callable[[], int],
        report: Callable[[Mapping[str, float]], None],
    ) -> None:
        self._engine = engine
        self._optimizer = engine.optimizer
        own = self._own_groups()
        self._named, self._frozen = self._named_parameters({id(p) for group in own for p in group})
        device = self._named[0][1].device if self._named else torch.device("cpu")
        self.seam = Seam(block, place, self._named, [], device, step, report)
        self.seam.layout = self._layout()
        self._spans_at: dict[int, tuple[ParamSpan, ...]] = {}  # by address of a tensor: the gradients in it
        for _, p in self._named if block.extrapolation is not None else ():
            p.data = p.data.contiguous()  # offsets work on flat views
        self._grams: list[Tensor] | None = None  # of buckets, while these are gathered
        self._addresses = [p.data_ptr() for _, p in self._named]
        places = [(i, 0, p.numel()) for i, (_, p) in enumerate(self._named)]
        flats = [p.data.reshape(-1) for _, p in self._named]
        self.seam.look_ahead(flats, places, self._rates, accumulates=False)
        self._optimizer.gradmix = self.seam
        self._allreduce_bucket = engine.allreduce_bucket
        self._reduce_all = engine.buffered_allreduce_fallback
        engine.allreduce_bucket = self._reduce_bucket
        engine.buffered_allreduce_fallback = self._reduce
        engine.save_checkpoint = self._saving(engine.save_checkpoint)
        engine.load_checkpoint = self._loading(engine.load_checkpoint)
        # An optimizer may have been in another engine before.
        take_step = getattr(self._optimizer.step, "_gradmix_replaces", self._optimizer.step)
        self._optimizer.step = self._stepping(take_step)
        for name in ("refresh_fp32_params", "update_lp_params"):
            if hasattr(self._optimizer, name):
                setattr(self._optimizer, name, self._without_offset(getattr(self._optimizer, name)))

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

    def _rates(self) -> list[float]:
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

    def _reduce(self, grads: Any = None, elements_per_buffer: int = 500_000_000) -> None:
        """In place of `engine.buffered_allreduce_fallback`: all gradients of a step."""
        self.seam.begin()
        found = self._find_gradients()
        self.seam.agree(tuple(ParamSpan(i, 0, grad.numel()) for i, grad in found), "gradient reduction")
        self.seam.add_up([grad for _, grad in found])
        dtypes = (grad.dtype for _, grad in found)
        wire = self._wire(max(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32))
        ties = self.seam.ties  # which are combined before buckets are
        for index, grad in found:
            if index not in ties:
                self.seam.capture([ParamSpan(index, 0, grad.numel())], grad.reshape(-1), boundary=True)
        reduce_all = functools.partial(self._reduce_all, grads=grads, elements_per_buffer=elements_per_buffer)
        self.seam.prepare(found, wire, functools.partial(self._gather, reduce_all))
        reduce_all()
        # Also in fp16: DeepSpeed 0.19.8 scales the loss for ZeRO's optimizers only.
        self.seam.end_backward(boundary=True, gradient_scale=1.0)

    def _gather(self, reduce_all: Callable[[], None]) -> list[Tensor]:
        """Send all buckets, and combine none: what is returned for one goes to where its gradients were."""
        self._grams = []
        reduce_all()
        grams, self._grams = self._grams, None
        return grams

    def _find_gradients(self) -> list[tuple[int, Tensor]]:
        """Of every parameter its position and gradient; and where they lie in the tensors of buckets."""
        self._spans_at.clear()
        if not self._is_bf16:
            for name, p in self._frozen:
                if p.requires_grad:
                    raise ValueError(
                        f"{name}: requires gradients, but did not when the engine was built, so the rules do "
                        "not know it: freeze it after deepspeed.initialize(), or build the engine anew"
                    )
            self._engine._get_gradients_for_reduction()  # makes those that are missing, with zeros
            found = [(i, p.grad.detach()) for i, (_, p) in enumerate(self._named) if p.grad is not None]
            for index, grad in found:
                if grad.layout != torch.strided:
                    raise ValueError(
                        f"{self._named[index][0]}: its gradient is sparse; allowed are dense ones; build "
                        "the layer with sparse=False"
                    )
                self._spans_at[grad.data_ptr()] = (ParamSpan(index, 0, grad.numel()),)
            return found
        grads, index = [], 0
        for group, flat in enumerate(self._optimizer.fp32_groups_gradients_flat):
            spans, start = [], 0
            for grad in self._optimizer.fp32_groups_gradients[group]:
                spans.append(ParamSpan(index, start, grad.numel()))
                grads.append((index, grad))
                index, start = index + 1, start + grad.numel()
            self._spans_at[flat.data_ptr()] = tuple(spans)
        return grads

    def _reduce_bucket(self, bucket: Sequence[Tensor], dp_group: Any, dp_world_size: Any = None) -> Tensor:
        """In place of `engine.allreduce_bucket`: the combined gradients of a bucket, flat.

        Parameters that the optimizer does not have are averaged, as DeepSpeed does.
        """
        own = [tensor for tensor in bucket if tensor.data_ptr() in self._spans_at]
        if self._grams is not None and not own:
            return self._engine.flatten(bucket)  # is averaged once, with the buckets that are combined
        if self.seam.is_stock or not own:
            return self._allreduce_bucket(bucket, dp_group, dp_world_size)
        if len(own) < len(bucket):
            others = [tensor for tensor in bucket if tensor.data_ptr() not in self._spans_at]
            self._engine.allreduce_and_copy(others, dp_group, dp_world_size)
            self._engine.allreduce_and_copy(own, dp_group, dp_world_size)
            return self._engine.flatten(bucket)
        flat_N = self._engine.flatten(bucket)
        spans, start = [], 0
        for tensor in bucket:
            for index, begin, length in self._spans_at[tensor.data_ptr()]:
                spans.append(ParamSpan(index, start + begin, length))
            start += tensor.numel()
        reduction = self.seam.reduction_over(dp_group)
        ties = self.seam.ties  # combined before, or, while buckets are gathered, after
        remaining = tuple(span for span in spans if span.parameter not in ties)
        if self.seam.exchanges:
            wire = self._wire(flat_N.dtype)
            if self._grams is not None:
                self._grams.append(self.seam.gather_whole(flat_N, remaining, wire))
            else:
                self.seam.exchange_whole(reduction, flat_N, remaining, wire)
            return flat_N
        reduction.weigh(flat_N, remaining)
        self.seam.keep_once(spans, flat_N)
        sent = flat_N.to(self._wire(flat_N.dtype).gradient)
        reduction.workers.all_reduce(sent)
        return flat_N.copy_(sent)

    def _wire(self, dtype: torch.dtype) -> CommDtypes:
        wire = min(dtype, self._engine.communication_data_type, key=lambda dtype: dtype.itemsize)
        return CommDtypes(wire, wire)

    # --- one step ---

    def _stepping(self, take_step: Callable[..., Any]) -> Callable[..., Any]:
        """In place of `optimizer.step`: take it, or skip it as this optimizer skips an overflow.

        A method, since torch's schedulers wrap the function below it.
        """

        @functools.wraps(take_step)
        def step(_: Any, *args: Any, **kwargs: Any) -> Any:
            self._lose_offset()  # if nothing was reduced, it is still there
            if not self.seam.finish():
                self._optimizer.overflow = False
                result = take_step(*args, **kwargs)
                self.seam.settle(taken=not self._optimizer.overflow)
                return result
            self._optimizer.overflow = True  # the engine counts it as skipped, and leaves its schedule alone
            if self._is_bf16:
                self._optimizer.clear_hp_grads()
            self._optimizer.zero_grad()
            self.seam.settle(taken=False)
            return None

        step._gradmix_replaces = take_step  # type: ignore[attr-defined]
        return types.MethodType(step, self._optimizer)

    def _lose_offset(self) -> None:
        lookahead = self.seam.lookahead
        if lookahead is not None and lookahead.state in (State.AHEAD, State.ASIDE):
            lookahead.drop()

    def _without_offset(self, method: Callable[[], None]) -> Callable[[], None]:
        """Between master weights and parameters, which must not hold an offset then, nor get it back."""

        @functools.wraps(method)
        def wrapped() -> None:
            self._lose_offset()
            method()

        return wrapped

    # --- checkpoints ---

    def _saving(self, save: Callable[..., Any]) -> Callable[..., Any]:
        """Every rank has state of its own, and here DeepSpeed saves the first rank's optimizer alone."""

        @functools.wraps(save)
        def save_checkpoint(save_dir: str, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
            name = f"global_step{self._engine.global_steps}" if tag is None else str(tag)
            path = self._file(Path(save_dir) / name)
            path.parent.mkdir(parents=True, exist_ok=True)
            state = {**self.seam.state_dict(), "step": int(self._engine.global_steps)}
            torch.save(state, path)  # before DeepSpeed names the checkpoint the latest
            return save(save_dir, tag, *args, **kwargs)

        return save_checkpoint

    def _loading(self, load: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(load)
        def load_checkpoint(load_dir: str, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
            loaded = load(load_dir, tag, *args, **kwargs)
            names = ("load_module_strict", "load_optimizer_states", "_", "load_module_only")
            given = dict(zip(names, args, strict=False)) | kwargs
            if (
                loaded[0] is None
                or given.get("load_module_only")
                or not given.get("load_optimizer_states", True)
            ):
                return loaded
            path = self._file(Path(loaded[0]).parent)
            saved = torch.load(path, map_location="cpu", weights_only=False) if path.exists() else None
            why = "it was made without a gradmix block, or by other ranks"
            if saved is not None and saved["step"] != self._engine.global_steps:
                saved, why = None, "what a gradmix block has left there is of another step"
            self.seam.load(saved, why)
            return loaded

        return load_checkpoint

    @staticmethod
    def _file(folder: Path) -> Path:
        return folder / f"gradmix_rank_{torch.distributed.get_rank():05d}.pt"

    def _layout(self) -> int:
        ranks = f"{self.seam.place.workers.num_ranks} ranks"
        return fingerprint_of([ranks, *(f"{name} {p.numel()}" for name, p in self._named)])
