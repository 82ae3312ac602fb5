"""ZeRO-1 and ZeRO-2: the seam to `DeepSpeedZeroOptimizer`, which hands each bucket to the rules before it is
reduced.

`average_tensor` cuts a bucket into slices by owner, on the stream that `overlap_comm` asks for, and calls
`allreduce_and_scatter` (or `allreduce_no_retain`). These are overridden, so stream handling stays
DeepSpeed's. Its own division by the number of workers is switched off where weights replace it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from ds_gradmix import checkpoint
from ds_gradmix.config import Block, ConfigError
from ds_gradmix.layout import Piece
from ds_gradmix.log import logger
from ds_gradmix.lookahead import LookAhead
from ds_gradmix.reduction import Reduction
from ds_gradmix.transit import Wire
from ds_gradmix.workers import Workers, fingerprint_of


class GradmixZeroOptimizer(DeepSpeedZeroOptimizer):
    """`DeepSpeedZeroOptimizer` with a gradmix block.

    Args:
        gradmix_block: the rules.
        gradmix_hosts: gloo group of all ranks, for `Workers.agree`.
        gradmix_step: tells the optimizer steps taken so far, skipped ones included.
        gradmix_report: is told after each step what the rules decided in it.
    """

    check_grad_overflow: bool
    overflow: bool

    def __init__(
        self,
        *args: Any,
        gradmix_block: Block,
        gradmix_hosts: torch.distributed.ProcessGroup,
        gradmix_step: Callable[[], int],
        gradmix_report: Callable[[Mapping[str, float]], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._gradmix_refuse()
        names = [
            self.param_names.get(self.param_dict[i], f"parameter {i}") for i in range(len(self.param_dict))
        ]
        device = self.bit16_groups_flat[0].device if self.bit16_groups_flat else torch.device("cpu")
        owned = [int(size) for size in self.partition_size]
        workers = Workers(self.dp_process_group, gradmix_hosts)
        self.gradmix = Reduction(gradmix_block, workers, names, owned, device)
        self.gradmix_lookahead = self._gradmix_lookahead(gradmix_block)
        self._gradmix_step = gradmix_step
        self._gradmix_report = gradmix_report
        self._gradmix_bucket: tuple[Tensor, tuple[tuple[int, int], ...]] | None = None
        self._gradmix_skips = False
        self.gradmix_loads = 0  # checkpoints loaded with optimizer states
        if not self.gradmix.is_stock:
            self.gradient_average = False  # weights sum to 1
        if self.gradmix.exchanges:
            self.use_multi_rank_bucket_allreduce = True  # one call with all of a bucket's slices

    def _gradmix_refuse(self) -> None:
        """What is seen only now: settings as DeepSpeed took them, and parallelism that the script set up."""
        wrong = {
            "contiguous_gradients: false": not self.contiguous_gradients,
            "reduce_scatter: false": not self.reduce_scatter,
            "sequence parallelism": self.sequence_parallel_size != 1,
            "model parallelism": torch.distributed.get_world_size(self.dp_process_group)
            != torch.distributed.get_world_size(),
            "mixture of experts": self.has_moe_layers,
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
        bucket = self.ipg_buckets[communication_data_type]
        gradients = tuple((index, self.param_dict[index].numel()) for _, _, index in bucket.params)
        self.gradmix.step = self._gradmix_step()
        if self.gradmix.awaits_the_model:
            self._decide_for_model()
        self.gradmix.agree(gradients, "gradient reduction")
        self._gradmix_bucket = (tensor, gradients)
        super().average_tensor(tensor, communication_data_type)
        self._gradmix_bucket = None

    def allreduce_and_scatter(
        self, bucket: Sequence[Any], communication_data_type: torch.dtype, **kwargs: Any
    ) -> None:
        """All slices of a bucket, `(owners, slice, fp32 output or None)`."""
        if not self.gradmix.exchanges:
            self._capture_and_weigh_once()
            super().allreduce_and_scatter(bucket, communication_data_type, **kwargs)
            return
        assert self._gradmix_bucket is not None
        flat_N, gradients = self._gradmix_bucket
        self._capture(flat_N, gradients)
        slices = [(next(iter(owners)), part.numel()) for owners, part, _ in bucket]
        mine = [(part, out) for owners, part, out in bucket if self.gradmix.workers.rank in owners]
        outputs = [out for _, out in mine if out is not None]
        assert len(outputs) in (0, len(mine))
        # What is combined in float32 gains nothing from gradients that were widened before they were sent.
        wire = min(flat_N.dtype, communication_data_type, key=lambda dtype: dtype.itemsize)
        result = wire
        if self._use_compact_grad_partition_buffer(0) and communication_data_type.itemsize > wire.itemsize:
            result = communication_data_type  # sums over micro-steps are kept in float32, and asked for in it
        self.gradmix.exchange(
            flat_N, gradients, lambda: list(self._pieces(gradients, slices)), Wire(wire, result), outputs
        )
        if self.cpu_offload:  # accumulates whole gradients: what others own must not look like an overflow
            others = [part for owners, part, _ in bucket if self.gradmix.workers.rank not in owners]
            if others:
                torch._foreach_zero_(others)
        if self.overlap_comm and not get_accelerator().resolves_data_dependency():
            # A parameter larger than the bucket is reduced in its own gradient, which is freed after this.
            flat_N.record_stream(self.reduction_stream)

    def allreduce_no_retain(self, *args: Any, **kwargs: Any) -> None:
        """The slices of one owner, with `use_multi_rank_bucket_allreduce: false`."""
        self._capture_and_weigh_once()
        super().allreduce_no_retain(*args, **kwargs)

    def _capture_and_weigh_once(self) -> None:
        if self._gradmix_bucket is not None:
            self._capture(*self._gradmix_bucket)
            if not self.gradmix.is_stock:
                self.gradmix.weigh(*self._gradmix_bucket)
        self._gradmix_bucket = None

    def _capture(self, flat_N: Tensor, gradients: tuple[tuple[int, int], ...]) -> None:
        if self.gradmix_lookahead is not None:
            self.gradmix_lookahead.capture(
                gradients, flat_N, boundary=self.is_gradient_accumulation_boundary()
            )

    def _pieces(
        self, gradients: Sequence[tuple[int, int]], slices: Sequence[tuple[int, int]]
    ) -> Iterator[Piece]:
        """The bucket cut at the borders of parameters and of owners' slices."""
        owners = iter(slices)
        owner, left = next(owners, (0, 0))
        start = 0
        for parameter, (index, elements) in enumerate(gradients):
            group = self._gradmix_group_of(index)
            done = 0
            while done < elements:
                while left == 0:
                    owner, left = next(owners)
                length = min(left, elements - done)
                home = self.grad_partition_insertion_offset[group][owner][index]
                home += done - self.grad_start_offset[group][owner][index]
                yield Piece(start, length, owner, parameter, group, int(home))
                start, done, left = start + length, done + length, left - length

    def _gradmix_group_of(self, index: int) -> int:
        return next(i for i, parameters in self.param_to_partition_ids.items() if index in parameters)

    # --- one backward ---

    def _decide_for_model(self) -> None:
        """ZeRO-1, before its first bucket: all gradients are there, in the bucket or not."""
        parameters = [(self.get_param_id(p), p) for group in self.bit16_groups for p in group]
        found = [(index, self.get_gradient_for_reduction(p)) for index, p in parameters]
        present = [(index, grad) for index, grad in found if grad is not None and grad.numel()]
        gradients = tuple((index, grad.numel()) for index, grad in present)
        self.gradmix.agree(gradients, "gradient reduction for the model")
        if present:
            grads = [grad.detach() for _, grad in present]
            wire = min(grads[0].dtype, self.communication_data_type, key=lambda dtype: dtype.itemsize)
            self.gradmix.decide_for_model(grads, Wire(wire, wire))

    def independent_gradient_partition_epilogue(self) -> None:
        """The end of a backward's reductions: all ranks must have come to it."""
        super().independent_gradient_partition_epilogue()
        self.gradmix.agree((), "end of the backward pass")
        self.gradmix.end_backward()
        if self.gradmix_lookahead is not None:
            boundary = bool(self.is_gradient_accumulation_boundary())
            # Where DeepSpeed averages, it has divided by the number of workers before we see the gradient.
            scale = float(self.loss_scale) / (self.gradmix.workers.size if self.gradient_average else 1)
            self.gradmix_lookahead.end_backward(boundary=boundary, gradient_scale=scale)

    # --- one step ---

    def step(self, closure: Any = None) -> None:
        """Take the optimizer step, or skip it if no worker agreed: then by the way DeepSpeed skips an
        overflow.
        """
        self.gradmix.agree((), "optimizer step")
        self._gradmix_skips = self.gradmix.finish()
        with self._discarding_gradients() if self._gradmix_skips else contextlib.nullcontext():
            super().step(closure)
        self.gradmix.settle(taken=not self.overflow)
        if self.gradmix_lookahead is not None:
            self.gradmix_lookahead.end_step()
            if self.overflow or self.gradmix.numbers.get("dropped_workers", 0.0) > 0:
                self.gradmix_lookahead.drop()
        self._gradmix_report(self.gradmix.numbers)

    @contextlib.contextmanager
    def _discarding_gradients(self) -> Iterator[None]:
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

    def _gradmix_lookahead(self, block: Block) -> LookAhead | None:
        if block.extrapolation is None:
            return None
        found = {
            self.get_param_id(p): (group, int(offset), p.numel())
            for group, params in enumerate(self.round_robin_bit16_groups)
            for p, offset in zip(params, self.round_robin_bit16_offsets[group], strict=True)
        }
        return LookAhead(
            block.extrapolation,
            self.bit16_groups_flat,
            [found[index] for index in range(len(found))],
            (block.seed, torch.distributed.get_rank(self.dp_process_group)),
            accumulates=bool(self.partition_gradients) and self.gradient_accumulation_steps > 1,
        )

    def gradmix_go_ahead(self) -> None:
        """Training is about to use the parameters."""
        if self.gradmix_lookahead is not None:
            rates = [float(group["lr"]) for group in self.optimizer.param_groups]
            self.gradmix_lookahead.go_ahead(self._gradmix_step(), rates)

    def refresh_fp32_params(self) -> None:
        """Master weights anew from the parameters, which must not hold an offset then."""
        if self.gradmix_lookahead is not None:
            self.gradmix_lookahead.drop()
        super().refresh_fp32_params()

    def update_lp_params(self) -> None:
        """Parameters anew from the master weights: without an offset, until the next step."""
        super().update_lp_params()
        if self.gradmix_lookahead is not None:
            self.gradmix_lookahead.forget()

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """DeepSpeed's, and ours under a key of its own."""
        return {
            **super().state_dict(),
            checkpoint.KEY: checkpoint.save(self.gradmix, self.gradmix_lookahead, self._gradmix_layout()),
        }

    def load_state_dict(
        self, state_dict_list: Any, load_optimizer_states: bool = True, **kwargs: Any
    ) -> None:
        """DeepSpeed's, and ours if it is there and fits."""
        super().load_state_dict(state_dict_list, load_optimizer_states=load_optimizer_states, **kwargs)
        if not load_optimizer_states:
            return
        saved, why = None, "a universal checkpoint does not hold it"
        if state_dict_list is not None:
            saved = state_dict_list[self.gradmix.workers.rank].get(checkpoint.KEY)
            why = "it was made without a gradmix block"
        self.gradmix_load(saved, why)

    def gradmix_load(self, saved: dict[str, Any] | None, why: str) -> None:
        """Take over our state from a checkpoint, or start afresh with one warning; `why` there is none."""
        self.gradmix_loads += 1
        warning = checkpoint.load(self.gradmix, self.gradmix_lookahead, saved, self._gradmix_layout(), why)
        if warning and self.gradmix.workers.rank == 0:
            logger.warning(f"ds_gradmix: {warning}")

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
