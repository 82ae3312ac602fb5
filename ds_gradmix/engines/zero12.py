"""ZeRO-1 and ZeRO-2: the seam to `DeepSpeedZeroOptimizer`, which hands each bucket to the rules before it is
reduced.

`average_tensor` cuts a bucket into slices by owner, on the stream that `overlap_comm` asks for, and calls
`allreduce_and_scatter` (or `allreduce_no_retain`), once for every process group: experts have their own.
These are overridden, so stream handling stays DeepSpeed's. Its own division by the number of workers is
switched off where weights replace it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from ds_gradmix.comm.consistency import fingerprint_of
from ds_gradmix.comm.workers import ParallelGroups
from ds_gradmix.config import ConfigError, GradmixConfig
from ds_gradmix.engines.seam import Seam
from ds_gradmix.exchange import state as checkpoint
from ds_gradmix.exchange.plan import Piece
from ds_gradmix.exchange.reducer import ParamSpan
from ds_gradmix.exchange.tiled_buffer import CommDtypes


class GradmixZeroOptimizer(DeepSpeedZeroOptimizer):
    """`DeepSpeedZeroOptimizer` with a gradmix block.

    Args:
        gradmix_block: the rules.
        gradmix_place: this rank's.
        gradmix_step: tells the optimizer steps taken so far, skipped ones included.
        gradmix_report: is told after each step what the rules decided in it.
    """

    check_grad_overflow: bool
    overflow: bool

    def __init__(
        self,
        *args: Any,
        gradmix_block: GradmixConfig,
        gradmix_place: ParallelGroups,
        gradmix_step: Callable[[], int],
        gradmix_report: Callable[[Mapping[str, float]], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._gradmix_refuse()
        parameters = [self.param_dict[i] for i in range(len(self.param_dict))]
        named = [(self.param_names.get(p, f"parameter {i}"), p) for i, p in enumerate(parameters)]
        device = self.bit16_groups_flat[0].device if self.bit16_groups_flat else torch.device("cpu")
        owned = [int(size) for size in self.partition_size]
        self.gradmix = Seam(gradmix_block, gradmix_place, named, owned, device, gradmix_step, gradmix_report)
        self.gradmix.layout = self._gradmix_layout()
        self._gradmix_look_ahead()
        self._gradmix_bucket: tuple[Tensor, tuple[ParamSpan, ...]] | None = None  # until it is captured
        self._gradmix_spans: tuple[ParamSpan, ...] = ()
        self._gradmix_flat: Tensor
        self._gradmix_skips = False
        self._gradmix_added_up = False
        if not self.gradmix.is_stock:
            self.gradient_average = False  # weights sum to 1
        if self.gradmix.exchanges:
            self.use_multi_rank_bucket_allreduce = True  # one call with all of a bucket's slices

    def _gradmix_refuse(self) -> None:
        """What is seen only now: settings as DeepSpeed took them."""
        wrong = {
            "contiguous_gradients: false": not self.contiguous_gradients,
            "reduce_scatter: false": not self.reduce_scatter,
            "ZenFlow": self.zenflow,
            "the Muon optimizer": "muon" in type(self.optimizer).__name__.lower(),
        }
        found = [name for name, there in wrong.items() if there]
        if found:
            raise ConfigError(
                f"gradmix: the engine was built with {', '.join(found)}, which this version does not take; "
                'change that, or remove the "gradmix" block'
            )

    # --- one bucket ---

    def average_tensor(self, tensor: Tensor, communication_data_type: torch.dtype) -> None:
        """Reduce a bucket."""
        spans, start = [], 0
        for _, _, index in self.ipg_buckets[communication_data_type].params:
            spans.append(ParamSpan(index, start, self.param_dict[index].numel()))
            start += spans[-1].length
        self._gradmix_spans = tuple(spans)
        self.gradmix.begin()
        self.gradmix.agree(self._gradmix_spans, "gradient reduction")
        self._gradmix_bucket = (tensor, self._gradmix_spans)
        super().average_tensor(tensor, communication_data_type)
        self._gradmix_bucket = None

    def allreduce_and_scatter(
        self, bucket: Sequence[Any], communication_data_type: torch.dtype, **kwargs: Any
    ) -> None:
        """Slices of a bucket, `(owners, slice, fp32 output or None)`, that one process group reduces."""
        flat_N = self._gradmix_capture_and_weigh_once()
        if not self.gradmix.exchanges:
            super().allreduce_and_scatter(bucket, communication_data_type, **kwargs)
            return
        reduction = self.gradmix.reduction_over(kwargs["process_group"])
        rank = reduction.workers.rank
        begin = flat_N.storage_offset()
        slices = [(part.storage_offset() - begin, part.numel(), min(owners)) for owners, part, _ in bucket]
        within = self._gradmix_within(kwargs["process_group"])
        spans, done = self.gradmix.remaining(within), self.gradmix.combined(within)
        outputs: list[Tensor] = []
        for owners, part, out in bucket:
            if rank in owners and out is not None:
                if _contains(done, part.storage_offset() - begin):
                    out.add_(part.to(out.dtype))
                else:
                    outputs.append(out)
        # What is combined in float32 gains nothing from gradients that were widened before they were sent.
        wire = min(flat_N.dtype, communication_data_type, key=lambda dtype: dtype.itemsize)
        result = wire
        if self._use_compact_grad_partition_buffer(0) and communication_data_type.itemsize > wire.itemsize:
            result = communication_data_type  # sums over micro-steps are kept in float32, and asked for in it
        reduction.exchange(
            flat_N,
            spans,
            lambda: list(self._gradmix_pieces(spans, slices)),
            CommDtypes(wire, result),
            outputs,
        )
        if self.cpu_offload:  # accumulates whole gradients: what others own must not look like an overflow
            others = [part for owners, part, _ in bucket if rank not in owners]
            if others:
                torch._foreach_zero_(others)
        if self.overlap_comm and not get_accelerator().resolves_data_dependency():
            # A parameter larger than the bucket is reduced in its own gradient, which is freed after this.
            flat_N.record_stream(self.reduction_stream)

    def allreduce_no_retain(self, *args: Any, **kwargs: Any) -> None:
        """The slices of one owner, with `use_multi_rank_bucket_allreduce: false`."""
        self._gradmix_capture_and_weigh_once()
        super().allreduce_no_retain(*args, **kwargs)

    def _gradmix_capture_and_weigh_once(self) -> Tensor:
        """What comes before any reduction of a bucket; the bucket."""
        if self._gradmix_bucket is None:
            return self._gradmix_flat
        flat_N, spans = self._gradmix_bucket
        self._gradmix_flat, self._gradmix_bucket = flat_N, None
        if not self._gradmix_added_up:
            self.gradmix.add_up([flat_N])
        self.gradmix.capture(spans, flat_N, boundary=bool(self.is_gradient_accumulation_boundary()))
        if not self.gradmix.is_stock and not self.gradmix.exchanges:
            for group in self._gradmix_groups():
                within = self._gradmix_within(group)
                if within:
                    self.gradmix.reduction_over(group).weigh(flat_N, self.gradmix.remaining(within))
            self.gradmix.keep_once(spans, flat_N)
        return flat_N

    def _gradmix_groups(self) -> list[Any]:
        experts = self.expert_dp_process_group.values() if self.has_moe_layers else ()
        return [self.dp_process_group, *experts]

    def _gradmix_within(self, group: Any) -> list[ParamSpan]:
        """The gradients of the bucket that a process group reduces."""
        if not self.has_moe_layers:
            return list(self._gradmix_spans)
        return [span for span in self._gradmix_spans if self._gradmix_group_of(span.parameter) is group]

    def _gradmix_group_of(self, index: int) -> Any:
        p = self.param_dict[index]
        return self.expert_dp_process_group[p.group_name] if is_moe_param(p) else self.dp_process_group

    def _gradmix_pieces(
        self, spans: Sequence[ParamSpan], slices: Sequence[tuple[int, int, int]]
    ) -> Iterator[Piece]:
        """Where the borders of gradients and of owners' slices (start, elements, owner) cut the bucket."""
        remaining = iter(slices)
        first, length, owner = next(remaining, (0, 0, 0))
        for parameter, span in enumerate(spans):
            group = self._gradmix_param_group_of(span.parameter)
            start, end = span.start, span.start + span.length
            while start < end:
                while first + length <= start:
                    first, length, owner = next(remaining)
                part = min(first + length, end) - start
                home = self.grad_partition_insertion_offset[group][owner][span.parameter]
                home += start - span.start - self.grad_start_offset[group][owner][span.parameter]
                yield Piece(start, part, owner, parameter, group, int(home))
                start += part

    def _gradmix_param_group_of(self, index: int) -> int:
        return next(i for i, parameters in self.param_to_partition_ids.items() if index in parameters)

    # --- one backward ---

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """ZeRO-1, at the end of a step: all gradients are there, in a bucket or not."""
        parameters = [(self.get_param_id(p), p) for group in self.bit16_groups for p in group]
        found = [(index, self.get_gradient_for_reduction(p)) for index, p in parameters]
        present = [(index, grad) for index, grad in found if grad is not None and grad.numel()]
        dtypes = [self.communication_data_type, *(grad.dtype for _, grad in present[:1])]
        wire = min(dtypes, key=lambda dtype: dtype.itemsize)
        self.gradmix.begin()
        if self.gradmix.awaits_the_model:
            self.gradmix.add_up([grad.detach() for _, grad in present])
            self._gradmix_added_up = True
        self.gradmix.prepare(present, CommDtypes(wire, wire))
        super().reduce_gradients(pipeline_parallel)
        self._gradmix_added_up = False

    def independent_gradient_partition_epilogue(self) -> None:
        """The end of a backward's reductions."""
        super().independent_gradient_partition_epilogue()
        # Where DeepSpeed averages, it has divided by the number of replicas before we see the gradient.
        replicas = self.gradmix.place.workers.num_replicas
        self.gradmix.end_backward(
            boundary=bool(self.is_gradient_accumulation_boundary()),
            gradient_scale=float(self.loss_scale) / (replicas if self.gradient_average else 1),
        )

    # --- one step ---

    def step(self, closure: Any = None) -> None:
        """Take the optimizer step, or skip it if no worker agreed: then by the way DeepSpeed skips an
        overflow.
        """
        self._gradmix_skips = self.gradmix.finish()
        with self._gradmix_discarding() if self._gradmix_skips else contextlib.nullcontext():
            super().step(closure)
        self.gradmix.settle(taken=not self.overflow)

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

    # --- the look-ahead point ---

    def _gradmix_look_ahead(self) -> None:
        found = {
            self.get_param_id(p): (group, int(offset), p.numel())
            for group, params in enumerate(self.round_robin_bit16_groups)
            for p, offset in zip(params, self.round_robin_bit16_offsets[group], strict=True)
        }
        self.gradmix.look_ahead(
            self.bit16_groups_flat,
            [found[index] for index in range(len(found))],
            lambda: [float(group["lr"]) for group in self.optimizer.param_groups],
            accumulates=bool(self.partition_gradients) and self.gradient_accumulation_steps > 1,
        )

    def refresh_fp32_params(self) -> None:
        """Master weights anew from the parameters, which must not hold an offset then."""
        if self.gradmix.lookahead is not None:
            self.gradmix.lookahead.drop()
        super().refresh_fp32_params()

    def update_lp_params(self) -> None:
        """Parameters anew from the master weights: without an offset, until the next step."""
        super().update_lp_params()
        if self.gradmix.lookahead is not None:
            self.gradmix.lookahead.forget()

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """DeepSpeed's, and ours under a key of its own."""
        return {**super().state_dict(), checkpoint.KEY: self.gradmix.state_dict()}

    def load_state_dict(
        self, state_dict_list: Any, load_optimizer_states: bool = True, **kwargs: Any
    ) -> None:
        """DeepSpeed's, and ours if it is there and fits."""
        super().load_state_dict(state_dict_list, load_optimizer_states=load_optimizer_states, **kwargs)
        if not load_optimizer_states:
            return
        saved, why = None, "a universal checkpoint does not hold it"
        if state_dict_list is not None:
            saved = state_dict_list[self.gradmix.place.workers.rank].get(checkpoint.KEY)
            why = "it was made without a gradmix block"
        self.gradmix.load(saved, why)

    def _gradmix_layout(self) -> int:
        """A number for where each parameter lies in the partitions."""
        return fingerprint_of(
            [
                f"{self.param_names.get(p)} {p.numel()} {offset}"
                for group, offsets in zip(
                    self.round_robin_bit16_groups, self.round_robin_bit16_offsets, strict=True
                )
                for p, offset in zip(group, offsets, strict=True)
            ]
        )


def _contains(spans: Sequence[ParamSpan], place: int) -> bool:
    return any(span.start <= place < span.start + span.length for span in spans)
