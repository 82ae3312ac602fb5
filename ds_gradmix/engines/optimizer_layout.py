"""Where an engine has put the parameters of an optimizer with trust ratios: in flat partitions, or in copies.

After a step's first sweep the sums of squares, `[2, P]` for the P parameters of a param group, are added over
the ranks that have other partitions of it: one all-reduce of 16 P bytes. Tensor-parallel ranks add the parts
of a parameter, a replica is counted once, and the sum is taken by one rank and sent to the others, so that it
is the same bit for bit. Of a weight that several pipeline stages keep, the first stage's sums are copied.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from ds_gradmix.comm.groups import RankGroup, TiedParameter
from ds_gradmix.engines.deepspeed_api import check_attributes
from ds_gradmix.engines.parallel_groups import is_partitioned, tensor_group, tied_parameters
from ds_gradmix.engines.reporting import announce_optimizer
from ds_gradmix.engines.zero3 import slice_of
from ds_gradmix.optim.layerwise import LayerwiseOptimizer
from ds_gradmix.optim.layout import GroupLayout, Part, whole_parameters

_KINDS: Sequence[type] = (
    DeepSpeedZeroOptimizer,
    DeepSpeedZeroOptimizer_Stage3,
    BF16_Optimizer,
    FP16_UnfusedOptimizer,
)


@dataclass(frozen=True)
class _SumOverRanks:
    """Adds sums over the ranks that have other parts of the parameters."""

    partitions: RankGroup | None  # with other partitions of the same flat tensor
    tensor: RankGroup | None  # with other parts of the same parameters
    tied: Sequence[tuple[int, TiedParameter]]  # by their position in the param group

    def __call__(self, sums_2P: Tensor) -> None:
        """Add them in place."""
        if self.partitions is None and self.tensor is None and not self.tied:
            return
        there_2P = sums_2P.to(get_accelerator().current_device_name())  # partitions may be offloaded
        for group in (self.partitions, self.tensor):
            if group is not None and self.tensor is not None:
                group.all_reduce_identical(there_2P)
            elif group is not None and group.num_ranks > 1:
                group.all_reduce(there_2P)
        for position, copies in self.tied:
            column_2 = there_2P[:, position].contiguous()
            copies.copy(column_2)
            there_2P[:, position] = column_2
        sums_2P.copy_(there_2P)


def tell_layouts(engine: Any) -> None:
    """Tell the engine's optimizer, if it is one with trust ratios, what it steps on."""
    optimizer = engine.basic_optimizer
    if isinstance(optimizer, LayerwiseOptimizer):
        for kind in _KINDS:
            if isinstance(engine.optimizer, kind):
                check_attributes(engine.optimizer, kind.__name__)
        optimizer.use_layouts(list(_layouts_of(engine)))
        announce_optimizer(engine)


def _layouts_of(engine: Any) -> Iterator[tuple[Tensor, GroupLayout]]:
    found = tensor_group(engine)
    tensor = None if found is None else RankGroup(found)
    tied = tied_parameters(engine.module) if isinstance(engine.module, PipelineModule) else []
    # DeepSpeed's wrappers drop gradients after a step, but keep the buffer of an offloaded partition's.
    is_wrapped = engine.optimizer is not engine.basic_optimizer
    offloads = any(getattr(engine.optimizer, name, False) for name in ("cpu_offload", "offload_optimizer"))
    is_in_turns = isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3)
    for stepped, params, partitions, parts in _groups_of(engine):
        shapes = [getattr(p, "ds_shape", p.shape) for p in params]
        plain = [len(shape) <= 1 for shape in shapes]
        parts = whole_parameters(stepped, params).parts if parts is None else parts
        counted = [tensor is None or tensor.is_first or is_partitioned(p) for p in params]
        positions = {id(p): i for i, p in enumerate(params)}
        here = [(positions[id(p)], copies) for p, copies in tied if id(p) in positions]
        add = _SumOverRanks(partitions, tensor, here)
        spends = is_wrapped and not offloads
        yield stepped[0], GroupLayout(parts, plain, counted, add, spends, is_in_turns)


_Group = tuple[Sequence[Tensor], Sequence[Tensor], RankGroup | None, Sequence[Part] | None]


def _groups_of(engine: Any) -> Iterator[_Group]:
    """Of every param group: the tensors that are stepped on, the model's parameters, the ranks with other
    partitions, and the parts that lie in this rank's; None for these where they are no partitions.
    """
    wrapper: Any = engine.optimizer
    if isinstance(wrapper, DeepSpeedZeroOptimizer):
        for i, flat in enumerate(wrapper.single_partition_of_fp32_groups):
            group = RankGroup(wrapper.real_dp_process_group[i])
            params, offsets = wrapper.round_robin_bit16_groups[i], wrapper.round_robin_bit16_offsets[i]
            yield [flat], params, group, _parts_of(params, offsets, group.rank * flat.numel(), flat.numel())
    elif isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        for i, flat in enumerate(wrapper.fp32_partitioned_groups_flat):
            group, params, parts = RankGroup(wrapper.sub_group_process_groups[i]), wrapper.fp16_groups[i], []
            for position, p in enumerate(params):
                _, offset, _ = wrapper.grad_position[wrapper.get_param_id(p)]
                length = slice_of(p.ds_numel, group.rank, group.num_ranks).length
                parts += [Part(0, int(offset), length, position)] * (length > 0)
            yield [flat], params, group, parts
    elif isinstance(wrapper, BF16_Optimizer):
        for i, flat in enumerate(wrapper.fp32_groups_flat_partition):
            group, params, offsets = RankGroup(wrapper.real_dp_process_group[i]), wrapper.bf16_groups[i], [0]
            for p in params:
                offsets.append(offsets[-1] + p.numel())
            yield [flat], params, group, _parts_of(params, offsets, group.rank * flat.numel(), flat.numel())
    elif isinstance(wrapper, FP16_UnfusedOptimizer):
        for copies, params in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
            yield copies, params, None, None
    else:
        for param_group in engine.basic_optimizer.param_groups:
            yield param_group["params"], param_group["params"], None, None


def _parts_of(params: Sequence[Tensor], offsets: Sequence[int], begin: int, size: int) -> list[Part]:
    """The parts of parameters, at these offsets, in the partition of `size` elements from `begin`."""
    parts = []
    for i, p in enumerate(params):
        first = max(int(offsets[i]), begin)
        last = min(int(offsets[i]) + p.numel(), begin + size)
        if first < last:
            parts.append(Part(0, first - begin, last - first, i))
    return sorted(parts)
