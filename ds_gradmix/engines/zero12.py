"""ZeRO-1 and ZeRO-2: a `DeepSpeedZeroOptimizer` that hands each bucket to the rules before it is reduced.

`average_tensor` cuts a bucket into slices by owner and calls a reduce method for every process group (experts
have their own), or for every owner. These methods only record; the call that completes the bucket hands it to
the rules. So the reduction runs inside of DeepSpeed's own call, on the stream that `overlap_comm` asks for,
and whoever wraps `average_tensor` finds a reduced bucket after it.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from ds_gradmix.engines.context import EngineContext, build_reducer, extrapolated_weights
from ds_gradmix.engines.deepspeed_api import check_attributes
from ds_gradmix.engines.recorded_bucket import OwnedSlice, RecordedBucket, ReduceCall, pieces_of
from ds_gradmix.exchange.bucket import Bucket, CommDtypes, ParamSpan
from ds_gradmix.exchange.state import CHECKPOINT_KEY, saved_by
from ds_gradmix.exchange.transport import Transport
from ds_gradmix.weights.gradient_window import ParamLayout


class GradmixZeroOptimizer(DeepSpeedZeroOptimizer):
    """`DeepSpeedZeroOptimizer` with the rules of a gradmix block; its arguments are DeepSpeed's.

    `gradmix_context` is the engine's.
    """

    check_grad_overflow: bool
    reduce_scatter: bool
    overflow: bool

    def __init__(self, *args: Any, gradmix_context: EngineContext, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_attributes(self, "DeepSpeedZeroOptimizer")
        self.gradmix_context = gradmix_context
        parameters = [self.param_dict[i] for i in range(len(self.param_dict))]
        named = [(self.param_names.get(p, f"parameter {i}"), p) for i, p in enumerate(parameters)]
        memory = self._gradmix_memory()
        accumulates = bool(self.partition_gradients) and self.gradient_accumulation_steps > 1
        weights = extrapolated_weights(gradmix_context, named, memory, accumulates=accumulates)
        sizes = [int(size) for size in self.partition_size]
        self._gradmix_weights = weights
        self.gradmix = build_reducer(gradmix_context, named, memory, weights, partition_sizes=sizes)
        self._gradmix_recorded: RecordedBucket | None = None  # inside of average_tensor
        self._gradmix_skips = False  # inside of step
        transport = self.gradmix.transport
        if transport not in (Transport.STOCK, Transport.RESCALED):
            self.gradient_average = False  # weights say what gradients sum to
        if self.gradient_average and self.reduce_scatter:  # before we see the gradient
            self.gradmix.divisor = self.gradmix.parallel.workers.num_replicas
        if transport is Transport.EXCHANGE:
            self.use_multi_rank_bucket_allreduce = True  # one call with all of a group's slices
            self.reduce_scatter = True  # only owners need the result, however DeepSpeed would reduce

    def _gradmix_memory(self) -> ParamLayout:
        found = {
            self.get_param_id(p): (group, int(offset), p.numel())
            for group, params in enumerate(self.round_robin_bit16_groups)
            for p, offset in zip(params, self.round_robin_bit16_offsets[group], strict=True)
        }
        return ParamLayout(self.bit16_groups_flat, [found[index] for index in range(len(found))])

    # --- one bucket: record ---

    def average_tensor(self, tensor: Tensor, communication_data_type: torch.dtype) -> None:
        """Have DeepSpeed enumerate what it would reduce of a bucket, and reduce it by the rules."""
        spans, start = [], 0
        for _, _, index in self.ipg_buckets[communication_data_type].params:
            spans.append(ParamSpan(index, start, self.param_dict[index].numel()))
            start += spans[-1].length
        self.gradmix.check(tuple(spans), "gradient reduction")
        self._gradmix_recorded = RecordedBucket(tensor, tuple(spans), communication_data_type)
        try:
            super().average_tensor(tensor, communication_data_type)
        finally:
            self._gradmix_recorded = None

    def allreduce_and_scatter(
        self, bucket: Sequence[Any], communication_data_type: torch.dtype, **kwargs: Any
    ) -> None:
        """Record slices `(owners, slice, output)` that one process group reduces."""
        replay = functools.partial(super().allreduce_and_scatter, bucket, communication_data_type, **kwargs)
        slices = [(part, min(owners), output) for owners, part, output in bucket]
        self._gradmix_record(slices, kwargs.get("process_group"), replay)

    def allreduce_no_retain(
        self, bucket: Sequence[Tensor], communication_data_type: torch.dtype, **kwargs: Any
    ) -> None:
        """Record slices of one owner, with `use_multi_rank_bucket_allreduce: false`."""
        replay = functools.partial(super().allreduce_no_retain, bucket, communication_data_type, **kwargs)
        outputs = kwargs.get("output_bucket") or [None] * len(bucket)
        slices = [(part, kwargs.get("rank"), output) for part, output in zip(bucket, outputs, strict=True)]
        self._gradmix_record(slices, kwargs.get("process_group"), replay)

    def gradient_reduction_w_predivide(self, tensor: Tensor, communication_data_type: torch.dtype) -> Tensor:
        """Record all of a bucket, with `reduce_scatter: false`."""
        reduce, reduced = super().gradient_reduction_w_predivide, [tensor]

        def replay() -> None:
            reduced[0] = reduce(tensor, communication_data_type)

        self._gradmix_record([(tensor, 0, None)], self.dp_process_group, replay)
        return reduced[0]

    def _gradmix_record(
        self, parts: Sequence[tuple[Tensor, Any, Tensor | None]], group: Any, replay: Callable[[], None]
    ) -> None:
        recorded = self._gradmix_recorded
        if recorded is None:  # not by average_tensor
            replay()
            return
        begin = int(recorded.flat_N.storage_offset())
        slices = [
            OwnedSlice(int(part.storage_offset()) - begin, part.numel(), owner, out)
            for part, owner, out in parts
        ]
        recorded.calls.append(ReduceCall(slices, group, replay))
        if recorded.is_complete:
            for process_group in dict.fromkeys(call.group for call in recorded.calls):
                self._gradmix_reduce(recorded, process_group)

    # --- one bucket: reduce ---

    def _gradmix_reduce(self, recorded: RecordedBucket, group: Any) -> None:
        """Reduce what one process group reduces of a bucket."""
        calls = [call for call in recorded.calls if call.group is group]
        slices = [part for call in calls for part in call.slices]
        workers = self.gradmix.workers_of(group)
        spans = recorded.spans
        if self.has_moe_layers:
            spans = tuple(span for span in spans if self._gradmix_group_of(span.param) is group)
        owned = [part for part in slices if part.owner == workers.rank]

        def replay(*_: Tensor) -> None:
            for call in calls:
                call.replay()

        dtypes = self._gradmix_dtypes(recorded.flat_N.dtype, recorded.comm_dtype)
        outputs = [(part.start, part.output) for part in owned if part.output is not None]
        pieces = functools.partial(pieces_of, self, slices)
        bucket = Bucket([recorded.flat_N], spans, workers, dtypes, replay, replay, pieces, outputs)
        last = bool(self.is_gradient_accumulation_boundary())
        self.gradmix.reduce(bucket, self.gradmix_context.key, last=last)
        if self.gradmix.transport is not Transport.EXCHANGE:
            return
        if self.cpu_offload:  # accumulates whole gradients: what others own must not look like an overflow
            others = [part for part in slices if part.owner != workers.rank]
            if others:
                torch._foreach_zero_([recorded.flat_N.narrow(0, p.start, p.length) for p in others])
        if self.overlap_comm and not get_accelerator().resolves_data_dependency():
            # A parameter larger than the bucket is reduced in its own gradient, which is freed after this.
            recorded.flat_N.record_stream(self.reduction_stream)

    def _gradmix_dtypes(self, gradient: torch.dtype, comm_dtype: torch.dtype) -> CommDtypes:
        # What is combined in float32 gains nothing from gradients that were widened before they were sent.
        sent = min(gradient, comm_dtype, key=lambda dtype: dtype.itemsize)
        if self._use_compact_grad_partition_buffer(0) and comm_dtype.itemsize > sent.itemsize:
            return CommDtypes(sent, comm_dtype)  # sums over micro-steps are kept in float32
        return CommDtypes(sent, sent)

    def _gradmix_group_of(self, index: int) -> Any:
        p = self.param_dict[index]
        return self.expert_dp_process_group[p.group_name] if is_moe_param(p) else self.dp_process_group

    # --- gradients that are not contiguous ---

    def buffered_reduce_fallback(
        self, rank: int | None, grads: list[Tensor], communication_data_type: torch.dtype, **kwargs: Any
    ) -> None:
        """With `contiguous_gradients: false`: reduce a copy of the gradients that is."""
        if not self._gradmix_reduce_copy(grads, communication_data_type):
            super().buffered_reduce_fallback(rank, grads, communication_data_type, **kwargs)

    def _buffered_reduce_fallback_preserving_fp32(
        self, grads: list[Tensor], params: Any, communication_data_type: torch.dtype, **kwargs: Any
    ) -> None:
        """The same where sums over micro-steps are kept in float32."""
        if not self._gradmix_reduce_copy(grads, communication_data_type):
            super()._buffered_reduce_fallback_preserving_fp32(
                grads, params, communication_data_type, **kwargs
            )

    def _gradmix_reduce_copy(self, grads: list[Tensor], communication_data_type: torch.dtype) -> bool:
        """Whether DeepSpeed has nothing left to do."""
        if not grads or (self.gradmix.transport is Transport.STOCK and self._gradmix_weights is None):
            dtypes = self._gradmix_dtypes(self.dtype, communication_data_type)
            self.gradmix.watch_alone(grads, dtypes, self.gradmix_context.key)
            return not grads
        flat_N = torch.cat([grad.reshape(-1) for grad in grads])
        self.average_tensor(flat_N, communication_data_type)
        overlaps = self.overlap_comm and not get_accelerator().resolves_data_dependency()
        stream = self.reduction_stream if self.overlap_comm else get_accelerator().current_stream()
        with get_accelerator().stream(stream):
            parts = flat_N.split([grad.numel() for grad in grads])
            for grad, part in zip(grads, parts, strict=True):
                grad.copy_(part.view_as(grad))
            for tensor in [flat_N, *grads] if overlaps else ():
                tensor.record_stream(stream)
        return True

    # --- one backward ---

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """ZeRO-1, at the end of a step: all gradients are there, in a bucket or not."""
        parameters = [(self.get_param_id(p), p) for group in self.bit16_groups for p in group]
        found = [(index, self.get_gradient_for_reduction(p)) for index, p in parameters]
        grads = [(index, grad) for index, grad in found if grad is not None and grad.numel()]
        dtypes = [self.communication_data_type, *(grad.dtype for _, grad in grads[:1])]
        sent = min(dtypes, key=lambda dtype: dtype.itemsize)
        if self.gradmix.decides_for_model:
            spans = tuple(ParamSpan(index, 0, grad.numel()) for index, grad in grads)
            self.gradmix.check(spans, "gradient reduction for the model")
        self.gradmix.prepare(grads, CommDtypes(sent, sent), self.gradmix_context.key)
        super().reduce_gradients(pipeline_parallel)

    def independent_gradient_partition_epilogue(self) -> None:
        """The end of a backward's reductions."""
        super().independent_gradient_partition_epilogue()
        self.gradmix.end_backward(
            last=bool(self.is_gradient_accumulation_boundary()),
            gradient_scale=float(self.loss_scale) / self.gradmix.divisor,
        )

    # --- one step ---

    def step(self, closure: Any = None) -> None:
        """Take the optimizer step, or skip it if no worker agreed: then by the way DeepSpeed skips an
        overflow.
        """
        self._gradmix_skips = self.gradmix.pre_step(self.gradmix_context.step())
        with self._gradmix_discarding() if self._gradmix_skips else contextlib.nullcontext():
            super().step(closure)
        self.gradmix_context.end_step(self.gradmix, taken=not self.overflow)

    @contextlib.contextmanager
    def _gradmix_discarding(self) -> Iterator[None]:
        checked = self.check_grad_overflow
        self.check_grad_overflow = True  # bf16 and fp32 do not look for overflows otherwise
        try:
            yield
        finally:
            self.check_grad_overflow = checked
            self._gradmix_skips = False

    def check_overflow(self, partition_gradients: bool = True) -> None:
        """Whether to discard the step's gradients."""
        if self._gradmix_skips:
            self.overflow = True
        else:
            super().check_overflow(partition_gradients)

    def _update_scale(self, has_overflow: bool = False) -> None:
        if not self._gradmix_skips:  # disagreement says nothing about the loss scale
            super()._update_scale(has_overflow)

    # --- the extrapolated weights, and checkpoints ---

    def learning_rates(self) -> list[float]:
        """The learning rate of every flat tensor of parameters."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def refresh_fp32_params(self) -> None:
        """Master weights anew from the parameters, which must not hold an offset then."""
        if self._gradmix_weights is not None:
            self._gradmix_weights.drop()
        super().refresh_fp32_params()

    def update_lp_params(self) -> None:
        """Parameters anew from the master weights: without an offset, until the next step."""
        super().update_lp_params()
        if self._gradmix_weights is not None:
            self._gradmix_weights.forget()

    def state_dict(self) -> dict[str, Any]:
        """DeepSpeed's, and that of the rules under a key of its own."""
        return {**super().state_dict(), CHECKPOINT_KEY: self.gradmix.state.state_dict()}

    def load_state_dict(
        self, state_dict_list: Any, load_optimizer_states: bool = True, **kwargs: Any
    ) -> None:
        """DeepSpeed's, and that of the rules if it is there and fits."""
        super().load_state_dict(state_dict_list, load_optimizer_states=load_optimizer_states, **kwargs)
        if load_optimizer_states:
            self.gradmix.load(*saved_by(state_dict_list, self.gradmix.parallel.workers.rank))
