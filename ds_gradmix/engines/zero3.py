"""ZeRO-3: a `DeepSpeedZeroOptimizer_Stage3` that hands each bucket to the rules before it is scattered.

DeepSpeed fills a bucket with whole gradients, and one method turns these into this rank's slices, which are
then accumulated, offloaded and measured as ever. That method is ours here. Every rank owns an equal slice of
every parameter.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor

from ds_gradmix.engines.context import EngineContext, build_reducer
from ds_gradmix.engines.deepspeed_api import check_attributes
from ds_gradmix.engines.gathered_weights import GatheredWeights
from ds_gradmix.engines.parallel_groups import Named
from ds_gradmix.exchange.bucket import Bucket, CommDtypes, ParamSpan
from ds_gradmix.exchange.plan import Piece
from ds_gradmix.exchange.state import CHECKPOINT_KEY, saved_by
from ds_gradmix.exchange.transport import Transport
from ds_gradmix.weights.gradient_window import ParamLayout


class OwnSlice(NamedTuple):
    """What a rank owns of a parameter's gradient."""

    begin: int
    length: int  # 0 where other ranks own all of it


def slice_of(length: int, rank: int, num_ranks: int) -> OwnSlice:
    """The part of a parameter of so many elements that a rank owns: all have equal ones but the last."""
    size = -(-length // num_ranks)
    begin = min(rank * size, length)
    return OwnSlice(begin, min(size, length - begin))


class WholeGradients(NamedTuple):
    """The gradients of a bucket as one tensor, and where each of them lies."""

    flat_N: Tensor
    params: Sequence[Any]  # in the order in which they lie
    spans: tuple[ParamSpan, ...]

    def return_to_parameters(self) -> None:
        """Where the gradients were gathered into the tensor, bring them back."""
        for p, span in zip(self.params, self.spans, strict=True):
            part = span.of(self.flat_N)
            if part.data_ptr() != p.grad.data_ptr():
                p.grad.copy_(part.view_as(p.grad))


def _forget_backward_hooks(module: torch.nn.Module) -> None:
    """DeepSpeed keeps a module's hooks from an engine before, which would fetch by that one's coordinator."""
    for each in module.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn"):
            each.__dict__.pop(name, None)


class GradmixZero3Optimizer(DeepSpeedZeroOptimizer_Stage3):
    """`DeepSpeedZeroOptimizer_Stage3` with the rules of a gradmix block; its arguments are DeepSpeed's.

    `gradmix_context` is the engine's.
    """

    overflow: bool

    def __init__(self, *args: Any, gradmix_context: EngineContext, **kwargs: Any) -> None:
        if gradmix_context.config.extrapolation is not None:
            _forget_backward_hooks(args[0] if args else kwargs["module"])
        super().__init__(*args, **kwargs)
        check_attributes(self, "DeepSpeedZeroOptimizer_Stage3")
        self.gradmix_context = gradmix_context
        parameters = [p for group in self.fp16_groups for p in group]
        self._gradmix_index = {p.ds_id: index for index, p in enumerate(parameters)}
        # Sub-group, where this rank's slice begins in it, and the slice's elements, with padding.
        self._gradmix_places: list[tuple[int, int, int]] = [
            tuple(self.grad_position[self.get_param_id(p)]) for p in parameters
        ]
        named = [(self.param_names.get(p, f"parameter {i}"), p) for i, p in enumerate(parameters)]
        self._gradmix_weights = self._gradmix_new_weights(named)
        self.gradmix = build_reducer(
            gradmix_context,
            named,
            ParamLayout([], self._gradmix_places),
            self._gradmix_weights,
            partition_sizes=[int(size) for size in self.fp16_partitioned_groups_flat_numel],
            averages=True,
        )
        self._gradmix_reduced: set[int] = set()  # ds_ids in this backward
        self._gradmix_used: set[int] = set()  # and in this step
        self._gradmix_skips = False  # inside of step

    def _gradmix_new_weights(self, named: Named) -> GatheredWeights | None:
        context = self.gradmix_context
        if (rule := context.config.extrapolation) is None:
            return None
        key = (context.config.seed, context.parallel.workers.number)
        groups = [self.sub_group_to_group_id[sub_group] for sub_group, _, _ in self._gradmix_places]
        params = [(p, name, group) for (name, p), group in zip(named, groups, strict=True)]
        weights = GatheredWeights(rule, key, self.parameter_offload, params)
        weights.measure_every = context.measure_every
        return weights

    def learning_rates(self) -> list[float]:
        """The learning rate of every group of parameters."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    # --- one bucket ---

    def _DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(
        self, params_to_reduce: list[Any], communication_data_type: torch.dtype
    ) -> list[Tensor]:
        """This rank's slices of the combined gradients, in the order of the parameters."""
        average = super()._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads
        grads = self._gradmix_gathered(params_to_reduce, communication_data_type)
        self.gradmix.check(grads.spans, "gradient reduction")
        self._gradmix_reduced.update(p.ds_id for p in params_to_reduce)
        slices: list[Tensor] = []

        def replay(*_: Tensor) -> None:
            grads.return_to_parameters()
            slices.extend(average(params_to_reduce, communication_data_type))

        bucket, outputs = self._gradmix_bucket(grads, replay, communication_data_type)
        last = bool(self.is_gradient_accumulation_boundary())
        self.gradmix.reduce(bucket, self.gradmix_context.key, last=last)
        if self.gradmix.transport is not Transport.EXCHANGE:
            return slices
        found = {p.ds_id: output for p, (_, output) in zip(grads.params, outputs, strict=True)}
        return [found[p.ds_id].to(self.gradient_accumulation_dtype) for p in params_to_reduce]

    def _gradmix_gathered(self, params: Sequence[Any], comm_dtype: torch.dtype) -> WholeGradients:
        """The gradients as they lie in DeepSpeed's bucket, or a copy of those that lie elsewhere."""
        buffer = self.ipg_buckets[comm_dtype].buffer
        begin, params = buffer.data_ptr() if buffer is not None else 0, list(params)
        places = [(p.grad.data_ptr() - begin) // p.grad.itemsize for p in params]
        total = sum(p.ds_numel for p in params)
        if buffer is not None and all(0 <= place < buffer.numel() for place in places):
            params = [p for _, p in sorted(zip(places, params, strict=True), key=lambda pair: pair[0])]
            flat_N = buffer.narrow(0, 0, total)
        elif len(params) == 1:
            flat_N = params[0].grad.reshape(-1)
        else:
            flat_N = torch.cat([p.grad.reshape(-1) for p in params])
        spans, start = [], 0
        for p in params:
            spans.append(ParamSpan(self._gradmix_index[p.ds_id], start, p.ds_numel))
            start += p.ds_numel
        return WholeGradients(flat_N, params, tuple(spans))

    def _gradmix_bucket(
        self, grads: WholeGradients, replay: Any, comm_dtype: torch.dtype
    ) -> tuple[Bucket, list[tuple[int, Tensor]]]:
        """The bucket, and where an exchange leaves what this rank owns of each parameter, by its start."""
        flat_N, spans = grads.flat_N, grads.spans
        workers = self.gradmix.workers_of(self._get_param_partition_group(grads.params[0]))
        sent = min(flat_N.dtype, comm_dtype, key=lambda dtype: dtype.itemsize)
        wide = self.gradient_accumulation_dtype
        adds = wide.itemsize > sent.itemsize and self.gradmix.transport is Transport.EXCHANGE
        outputs = []
        for span in spans:
            own = slice_of(span.length, workers.rank, workers.num_ranks)
            part = flat_N.narrow(0, span.start + own.begin, own.length)
            outputs.append((span.start + own.begin, torch.zeros_like(part, dtype=wide) if adds else part))

        pieces = functools.partial(self._gradmix_pieces, workers.num_ranks)
        dtypes = CommDtypes(sent, wide if adds else sent)
        added = [(start, output) for start, output in outputs if adds and output.numel()]
        return Bucket([flat_N], spans, workers, dtypes, replay, replay, pieces, added), outputs

    def _gradmix_pieces(self, num_ranks: int, spans: Sequence[ParamSpan]) -> list[Piece]:
        pieces = []
        for param, span in enumerate(spans):
            group, offset, _ = self._gradmix_places[span.param]
            for rank in range(num_ranks):
                own = slice_of(span.length, rank, num_ranks)
                if own.length:
                    pieces.append(Piece(span.start + own.begin, own.length, rank, param, group, offset))
        return pieces

    # --- one backward ---

    def independent_gradient_partition_epilogue(self) -> None:
        """The end of a backward's reductions."""
        super().independent_gradient_partition_epilogue()
        self._gradmix_used |= self._gradmix_reduced
        self._gradmix_clear_unused()
        self._gradmix_reduced.clear()
        self.gradmix.end_backward(
            last=bool(self.is_gradient_accumulation_boundary()), gradient_scale=float(self.loss_scale)
        )

    def _gradmix_clear_unused(self) -> None:
        """DeepSpeed would take the last step's gradient for a parameter that has none in this one."""
        partitions = self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        for group in self.fp16_groups:
            for p in group:
                if p.ds_id in self._gradmix_reduced or p.ds_id not in partitions:
                    continue
                if not p.requires_grad or (self.micro_step_id == 0 and p.ds_id not in self._gradmix_used):
                    partitions[p.ds_id].zero_()
                if self.offload_optimizer and self.is_gradient_accumulation_boundary():
                    # It copies those alone that had one in this backward, whose norms are on the device.
                    self._offload_grad_partition_at_boundary(p, partitions[p.ds_id], {}, {})
                    norms, i = self.norm_for_param_grads, self.get_param_id(p)
                    norms[i] = norms[i].to(get_accelerator().current_device_name(), non_blocking=True)

    def backward_epilogue(self) -> None:
        """The end of a backward, after which DeepSpeed has released what hooks left over."""
        super().backward_epilogue()
        if self._gradmix_weights is not None:
            self._gradmix_weights.restore_idle()

    # --- one step ---

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Gradients that were accumulated count no more."""
        super().zero_grad(set_to_none)
        self._gradmix_used.clear()

    def destroy(self) -> None:
        """The engine ends."""
        if self._gradmix_weights is not None:
            self._gradmix_weights.destroy()
        super().destroy()

    def step(self, closure: Any = None) -> None:
        """Take the optimizer step, or skip it if no worker agreed: then by the way DeepSpeed skips an
        overflow.
        """
        self._gradmix_skips = self.gradmix.pre_step(self.gradmix_context.step())
        try:
            super().step(closure)
        finally:
            self._gradmix_skips = False
            self._gradmix_used.clear()
        self.gradmix_context.end_step(self.gradmix, taken=not self.overflow)

    def _loss_scale_update_and_overflow_cleanup(self) -> bool:
        """Whether to discard the step's gradients."""
        self.overflow = self.overflow or self._gradmix_skips
        return bool(super()._loss_scale_update_and_overflow_cleanup())

    def _update_scale(self, has_overflow: bool = False) -> None:
        if not self._gradmix_skips:  # disagreement says nothing about the loss scale
            super()._update_scale(has_overflow)

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """DeepSpeed's, and that of the rules under a key of its own."""
        return {**super().state_dict(), CHECKPOINT_KEY: self.gradmix.state.state_dict()}

    def load_state_dict(
        self, state_dict_list: Any, load_optimizer_states: bool = True, **kwargs: Any
    ) -> None:
        """DeepSpeed's, and that of the rules if it is there and fits."""
        # Before DeepSpeed, which may take it out of the list.
        saved, why = saved_by(state_dict_list, self.gradmix.parallel.workers.rank)
        super().load_state_dict(state_dict_list, load_optimizer_states=load_optimizer_states, **kwargs)
        if load_optimizer_states:
            self.gradmix.load(saved, why)
