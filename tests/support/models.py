"""The models that tests train: a regression of layers of awkward sizes, and a small language model in every
form of parallelism, with which part of which weight a rank holds.

The language model's weights are drawn by their name, so all forms start alike.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

WORDS, WIDTH, HEADS, INNER, BLOCKS = 22, 12, 4, 26, 2
SEQUENCE, BATCH = 6, 4
NAN = -1  # a target whose loss is NaN


class Regression(torch.nn.Module):
    """Layers of awkward sizes, one frozen, one unused, and, if `empty`, one parameter without elements, which
    ZeRO-3 cannot gather.
    """

    def __init__(self, empty: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = torch.nn.Linear(13, 31)
        self.frozen = torch.nn.Linear(31, 31)
        self.second = torch.nn.Linear(31, 29)
        self.unused = torch.nn.Linear(5, 3)
        if empty:
            self.empty = torch.nn.Parameter(torch.zeros(0, 4))
        self.last = torch.nn.Linear(29, 3, bias=False)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.frozen(torch.tanh(self.first(x))))
        return self.last(torch.tanh(self.second(hidden))) * self.scale


def numbers(step: int, micro: int, data: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch for the regression, float64, and its targets."""
    random = torch.Generator().manual_seed(10_000 * step + 100 * micro + data)
    x = torch.randn(BATCH, 13, generator=random, dtype=torch.float64)
    target = torch.stack([x[:, :3].sum(1), x[:, 3] * x[:, 4], x[:, 5].sin()], dim=1)
    return x, target + 0.5 * torch.randn(BATCH, 3, generator=random, dtype=torch.float64)


class Plain:
    """The layers of a model that is on one rank; experts may be spread over several."""

    def __init__(self, expert_ranks: int = 1) -> None:
        self.column = self.row = self.head = torch.nn.Linear
        self.attention: Any = lambda: Attention()
        self.expert_ranks = expert_ranks

    def experts(self, expert: torch.nn.Module, count: int) -> torch.nn.Module:
        """Each word goes to one expert; none is dropped, and nothing is drawn."""
        from deepspeed.moe.layer import MoE

        return MoE(
            WIDTH, expert, count, self.expert_ranks, k=1, min_capacity=0, drop_tokens=False, use_rts=False
        )

    def vocabulary(self) -> torch.nn.Module:
        return Vocabulary(WORDS, WIDTH)


class Vocabulary(torch.nn.Embedding):
    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight)


class Attention(torch.nn.Module):
    """Causal attention of (batch, position, head, element)."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(later, -1e4).softmax(-1), v)


class Mlp(torch.nn.Module):
    def __init__(self, parts: Any) -> None:
        super().__init__()
        self.up = parts.column(WIDTH, INNER)
        self.down = parts.row(INNER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x)))


class Block(torch.nn.Module):
    """Attention, then an MLP or experts."""

    def __init__(self, parts: Any, experts: int = 0) -> None:
        super().__init__()
        self.norm1 = torch.nn.LayerNorm(WIDTH)
        self.query, self.value = parts.column(WIDTH, WIDTH), parts.column(WIDTH, WIDTH)
        self.key = parts.column(WIDTH, WIDTH, bias=False)  # a bias here would have no gradient, only noise
        self.attention = parts.attention()
        self.out = parts.row(WIDTH, WIDTH)
        self.norm2 = torch.nn.LayerNorm(WIDTH)
        self.experts = experts
        self.mlp = parts.experts(Mlp(parts), experts) if experts else Mlp(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = (z.unflatten(-1, (-1, WIDTH // HEADS)) for z in (self.query(y), self.key(y), self.value(y)))
        x = x + self.out(self.attention(q, k, v).flatten(-2))
        y = self.norm2(x)
        return x + (self.mlp(y)[0] if self.experts else self.mlp(y))


class Language(torch.nn.Module):
    """Predicts words, from those before them."""

    def __init__(self, parts: Any, tied: bool = False, experts: int = 0) -> None:
        super().__init__()
        self.embed = parts.vocabulary()
        self.blocks = torch.nn.ModuleList(Block(parts, experts if at else 0) for at in range(BLOCKS))
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.head = None if tied else parts.head(WIDTH, WORDS)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.embed(words)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.embed.logits(x) if self.head is None else self.head(x)


def pipeline_layers(parts: Any, tied: bool) -> list[Any]:
    """The same model for a PipelineModule."""
    from deepspeed.pipe import LayerSpec, TiedLayerSpec

    embed = [LayerSpec(_Embed, parts)]
    head = [LayerSpec(_HeadOf, parts)]
    if tied:
        embed = [TiedLayerSpec("embed", _Embed, parts, tied_weight_attr="inner.weight")]
        head = [TiedLayerSpec("embed", _Embed, parts, forward_fn=_logits, tied_weight_attr="inner.weight")]
    blocks = [LayerSpec(Block, parts) for _ in range(BLOCKS)]
    return [*embed, *blocks, LayerSpec(torch.nn.LayerNorm, WIDTH), *head]


class _Embed(torch.nn.Module):
    def __init__(self, parts: Any) -> None:
        super().__init__()
        self.inner = parts.vocabulary()

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.inner(words)


class _HeadOf(torch.nn.Module):
    def __init__(self, parts: Any) -> None:
        super().__init__()
        self.inner = parts.head(WIDTH, WORDS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def _logits(module: _Embed, x: torch.Tensor) -> torch.Tensor:
    return module.inner.logits(x)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """In float32 or float64; NaN where the targets say so."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if targets[0, 0] == NAN:
        return logits.sum() * float("nan")
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def words(step: int, micro: int, data: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch for the language model and what follows its words, the same for ranks that share a batch."""
    random = torch.Generator().manual_seed(10_000 * step + 100 * micro + data)
    given = torch.randint(WORDS, (BATCH, SEQUENCE), generator=random)
    targets = (given + 3 * given.roll(1, dims=1)) % WORDS
    noise = torch.randint(WORDS, targets.shape, generator=random)
    return given, torch.where(torch.rand(targets.shape, generator=random) < 0.2, noise, targets)


@dataclass(frozen=True)
class Piece:
    """The part of a weight that a rank holds: the `index`-th of `count` along `dim`."""

    name: str
    dim: int = 0
    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return self.name if self.count == 1 else f"{self.name}[{self.index}/{self.count}]"


COLUMNS = ("query.weight", "query.bias", "key.weight", "value.weight", "value.bias")
COLUMNS += ("up.weight", "up.bias", "embed.weight", "head.weight", "head.bias")
ROWS = ("out.weight", "down.weight")


def piece_of(
    name: str, tensor_rank: int, tensor_size: int, first_expert: int, whole: tuple[str, ...]
) -> Piece:
    """What a parameter is, by its name in whatever form of the model; those in `whole` are not split."""
    name = _plain_name(name)
    found = re.fullmatch(r"(.*)\.mlp\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(.*)", name)
    if found:
        name = f"{found[1]}.experts.{int(found[2]) + first_expert}.{found[3]}"
    name = name.replace("mlp.deepspeed_moe.gate.wg", "gate")
    if tensor_size == 1 or name.endswith(whole):
        return Piece(name)
    if name.endswith(COLUMNS):
        return Piece(name, 0, tensor_rank, tensor_size)
    return Piece(name, 1, tensor_rank, tensor_size) if name.endswith(ROWS) else Piece(name)


def _plain_name(name: str) -> str:
    """`1.norm1.weight` of a pipeline is `blocks.0.norm1.weight`."""
    name = name.replace("tied_modules.embed.inner", "embed")
    found = re.fullmatch(r"(\d+)\.(?:inner\.)?(.*)", name)
    if not found:
        return name
    layer = int(found[1])
    places = ["embed", *(f"blocks.{at}" for at in range(BLOCKS)), "norm", "head"]
    return f"{places[layer]}.{found[2]}"


def fill(p: torch.Tensor, piece: Piece) -> None:
    """Write a parameter's part of the initial weight."""
    shape = list(p.shape)
    shape[piece.dim] *= piece.count
    random = torch.Generator().manual_seed(zlib.crc32(piece.name.encode()))
    full = torch.randn(shape, generator=random)
    full = full * shape[-1] ** -0.5 if len(shape) > 1 else 0.1 * full
    if "norm" in piece.name and piece.name.endswith("weight"):
        full = 1 + full
    with torch.no_grad():
        p.copy_(full.chunk(piece.count, piece.dim)[piece.index])


def assemble(parts: dict[Piece, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """Whole weights from their pieces."""
    whole = {}
    for name in sorted({piece.name for piece in parts}):
        pieces = sorted((piece for piece in parts if piece.name == name), key=lambda piece: piece.index)
        count, dim = pieces[0].count, pieces[0].dim
        assert [piece.index for piece in pieces] == list(range(count)), f"{name}: parts are missing"
        whole[name] = (
            np.concatenate([parts[piece] for piece in pieces], axis=dim) if count > 1 else parts[pieces[0]]
        )
    return whole
