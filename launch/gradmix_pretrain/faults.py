"""Faults for drills: one replica trains on something wrong from a step on, as `pretrain.py --fault` says.

    KIND:rank=R:from=STEP[:until=STEP][:scale=FACTOR][:of=RANK]

Steps are counted as in the log, from 1, and `until` is the last faulty one. Ranks are global ones. A fault
of the data hits the replica that the rank belongs to; one of the gradients hits the rank alone, in a pipeline
thus one stage.

Gradients are replaced by hooks on the parameters. Autograd calls them before it accumulates a gradient, thus
before anything that DeepSpeed does with it, whichever way it reduces: all of its own hooks come after
accumulation. Each micro-step's gradient is replaced by itself.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from gradmix_pretrain.tokens import TrainingWindows

DATA_KINDS = ("shuffled", "tokens", "duplicate")
GRADIENT_KINDS = ("noise", "negative", "zero", "nan", "scale", "stuck", "stale")
KINDS = GRADIENT_KINDS + DATA_KINDS
DEFAULT_SCALES = {"noise": "1", "scale": "1000"}


@dataclass(frozen=True)
class Training:
    """What a fault must fit: the number of steps, the ranks, and what they share."""

    num_steps: int
    num_ranks: int
    tensor_parallel: int = 1
    pipeline_stages: int = 1
    fp16: bool = False

    @property
    def num_replicas(self) -> int:
        return self.num_ranks // (self.tensor_parallel * self.pipeline_stages)

    def replica(self, rank: int) -> int:
        """The replica of a global rank: those of AutoTP are neighbours, those of a pipeline are apart."""
        return rank // self.tensor_parallel if self.pipeline_stages == 1 else rank % self.num_replicas


@dataclass(frozen=True)
class Fault:
    """One --fault, checked."""

    text: str
    kind: str
    rank: int
    replica: int
    first: int
    last: float  # a step, or infinity
    scale: float
    read_replica: int  # whose data a duplicate reads

    def active(self, step: int) -> bool:
        return self.first <= step <= self.last

    def generator(
        self, seed: int, step: int, *more: int, device: torch.device | str = "cpu"
    ) -> torch.Generator:
        """For random draws of a step, the same ones in a run that is begun again or resumed."""
        (state,) = np.random.SeedSequence((seed, step, self.rank, *more)).generate_state(1, np.uint64)
        return torch.Generator(device).manual_seed(int(state))


def parse_fault(text: str, training: Training) -> Fault:
    """A fault from the command line; ValueError that says what is allowed."""
    kind, *pairs = text.split(":")
    if kind not in KINDS:
        raise ValueError(f"--fault {text}: kinds are {', '.join(KINDS)}")
    optional = ["until"] + ["scale"] * (kind in DEFAULT_SCALES) + ["of"] * (kind == "duplicate")
    values = {name: value for name, equals, value in (pair.partition("=") for pair in pairs) if equals}
    if not {"rank", "from"} <= values.keys() <= {"rank", "from", *optional} or len(values) < len(pairs):
        raise ValueError(
            f"--fault {text}: {kind} takes rank=R:from=STEP, optionally {', '.join(optional)}, each once"
        )
    last_rank = training.num_ranks - 1
    rank = whole(text, "rank", values["rank"], 0, last_rank)
    first = whole(text, "from", values["from"], 1, training.num_steps)
    last = whole(text, "until", values["until"], first) if "until" in values else math.inf
    scale = positive(text, values.get("scale", DEFAULT_SCALES.get(kind, "1")))
    replica = training.replica(rank)
    read_replica = (replica + 1) % training.num_replicas
    if "of" in values:
        read_replica = training.replica(whole(text, "of", values["of"], 0, last_rank))
    fault = Fault(text, kind, rank, replica, first, last, scale, read_replica)
    check_sense(fault, training)
    return fault


def whole(text: str, name: str, value: str, least: int, most: int | None = None) -> int:
    """The number that a value of an option is; ValueError if it is out of its range."""
    if value.isdecimal() and least <= int(value) and (most is None or int(value) <= most):
        return int(value)
    allowed = f"{least} or more" if most is None else f"one of {least} to {most}"
    raise ValueError(f"--fault {text}: {name} is a whole number, {allowed}")


def positive(text: str, value: str) -> float:
    """The factor of `scale=`."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"--fault {text}: scale is a number above 0")
    return number


def check_sense(fault: Fault, training: Training) -> None:
    """Refuse what would do nothing, or something else than its name says."""
    if fault.kind == "duplicate" and fault.read_replica == fault.replica:
        raise ValueError(
            f"--fault {fault.text}: of is a rank of another replica than rank {fault.rank}'s, "
            f"and there must be one; there are {training.num_replicas}"
        )
    if fault.kind in GRADIENT_KINDS and training.tensor_parallel > 1:
        # Each of the ranks steps its own copy of the weights that are not split.
        raise ValueError(
            f"--fault {fault.text}: with tensor parallelism kinds are {', '.join(DATA_KINDS)}; by others, "
            "the weights that a replica's ranks have in common would come to differ"
        )
    if fault.kind in ("stuck", "stale") and training.fp16:
        raise ValueError(
            f"--fault {fault.text}: with fp16 a kept gradient has the loss scale of its own step; "
            "take another kind, or bf16"
        )


def noise(grad: torch.Tensor, scale: float, generator: torch.Generator) -> torch.Tensor:
    """Gaussian noise, `scale` times as long as a gradient."""
    drawn = torch.randn(grad.shape, generator=generator, device=grad.device)
    return (drawn * (scale * grad.float().norm() / drawn.norm())).to(grad.dtype)


class GradientFault:
    """A fault of this rank's gradients.

    `stuck` and `stale` keep gradients in memory, one and two for each parameter: means over a step's
    micro-steps. Before there is one to return (the first step of `stuck`, and of `stale` if no step was
    trained before it in this process), the gradient stays as it is.
    """

    def __init__(self, fault: Fault, seed: int, accumulation_steps: int) -> None:
        self.fault = fault
        self._seed, self._accumulation_steps = seed, accumulation_steps
        self._step = 0
        self._calls: dict[int, int] = {}  # of each parameter's hook, in this step
        self._recorded: dict[int, torch.Tensor] = {}
        self._returned: dict[int, torch.Tensor] = {}

    def attach(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Have the gradients of these replaced, in the steps that `begin` announces."""
        for index, parameter in enumerate(parameters):
            if parameter.requires_grad:
                parameter.register_hook(partial(self.replaced, index))

    def begin(self, step: int) -> None:
        """Called before every step, in order."""
        self._step = step
        self._calls.clear()
        if self.fault.kind == "stale" or not self._returned:
            self._returned, self._recorded = self._recorded, {}
        if step > self.fault.last:
            self._returned = {}

    def replaced(self, index: int, grad: torch.Tensor) -> torch.Tensor | None:
        """The gradient to take instead of a parameter's, once in every micro-step; None leaves it."""
        if self._records():
            mean = grad / self._accumulation_steps
            self._recorded[index] = self._recorded[index] + mean if index in self._recorded else mean
        if not self.fault.active(self._step):
            return None
        match self.fault.kind:
            case "negative":
                return -grad
            case "zero":
                return torch.zeros_like(grad)
            case "nan":
                return torch.full_like(grad, math.nan)
            case "scale":
                return grad * self.fault.scale
            case "noise":
                return self._noise(index, grad)
        if not self._returned:
            return None
        kept = self._returned.get(index)  # none: the parameter had no gradient in that step
        return torch.zeros_like(grad) if kept is None else kept.clone()

    def _records(self) -> bool:
        if self.fault.kind == "stale":
            return self.fault.first - 1 <= self._step < self.fault.last
        return self.fault.kind == "stuck" and self.fault.active(self._step) and not self._returned

    def _noise(self, index: int, grad: torch.Tensor) -> torch.Tensor:
        call = self._calls[index] = self._calls.get(index, 0) + 1
        generator = self.fault.generator(self._seed, self._step, call, index, device=grad.device)
        return noise(grad, self.fault.scale, generator)


@dataclass
class FaultyWindows(TrainingWindows):
    """Training windows of a replica whose data has faults."""

    faults: Sequence[Fault] = ()
    vocab_size: int = 0

    def batch(self, step: int, micro_step: int) -> torch.Tensor:
        """As of TrainingWindows, where steps are counted from 0."""
        batch_BT = super().batch(step, micro_step)
        for fault in self.faults:
            if fault.active(step + 1):
                batch_BT = self._wrong(fault, batch_BT, step, micro_step)
        return batch_BT

    def _wrong(self, fault: Fault, batch_BT: torch.Tensor, step: int, micro_step: int) -> torch.Tensor:
        if fault.kind == "duplicate":
            return replace(self, rank=fault.read_replica, faults=()).batch(step, micro_step)
        generator = fault.generator(self.seed, step + 1, micro_step + 1)
        if fault.kind == "tokens":
            return torch.randint(self.vocab_size, batch_BT.shape, generator=generator)
        order = torch.randperm(batch_BT.numel(), generator=generator)
        return batch_BT.flatten()[order].view_as(batch_BT)


def with_faults(windows: TrainingWindows, faults: Sequence[Fault], vocab_size: int) -> TrainingWindows:
    """The windows of this replica, those of the faults that are its own applied."""
    own = [fault for fault in faults if fault.kind in DATA_KINDS and fault.replica == windows.rank]
    return FaultyWindows(**vars(windows), faults=own, vocab_size=vocab_size) if own else windows


class Drill:
    """Says on rank 0 when faults begin and end, and on the rank of each, replaces its gradients.

    Several faults of a rank act in the order given.
    """

    def __init__(self, faults: Sequence[Fault], rank: int) -> None:
        self._faults = [fault for fault in faults if fault.rank == rank]
        self._told = dict.fromkeys(faults, False) if rank == 0 else {}  # and whether it has begun
        self._gradients: list[GradientFault] = []

    def attach(self, module: torch.nn.Module, seed: int, accumulation_steps: int) -> None:
        """Call it when DeepSpeed's engine is built, since tensor parallelism makes new parameters."""
        for fault in self._faults:
            if fault.kind in GRADIENT_KINDS:
                self._gradients.append(GradientFault(fault, seed, accumulation_steps))
                self._gradients[-1].attach(module.parameters())

    def begin(self, step: int) -> None:
        """Called before every step, counted from 1."""
        for fault, begun in self._told.items():
            if fault.active(step) != begun:
                self._told[fault] = not begun
                happens = "has ended" if begun else "begins"
                tqdm.write(f"step {step}: fault {fault.text} {happens}", file=sys.stderr)
        for gradients in self._gradients:
            gradients.begin(step)
