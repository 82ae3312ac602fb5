"""A transformers model as the layers of a DeepSpeed pipeline, of which each rank keeps those of its stage.

Layers pass one tensor on, the hidden states. Every decoder layer runs inside a base model of the same class
that has no other layer, so that masks and rotary embeddings are computed by transformers. A check at the
start compares the output of all layers with that of the ordinary model.
"""

import contextlib
import copy
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch.nn import functional
from transformers import AutoModelForCausalLM, PretrainedConfig

BASE_PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")


class Embed(torch.nn.Module):
    """Token ids [B, T] to hidden states [B, T, D]."""

    def __init__(self, embedding: torch.nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        return self.embedding(ids_BT)


def tied_head(embed: Embed, hidden_BTD: torch.Tensor) -> torch.Tensor:
    """Hidden states to logits [B, T, V] by the weight of the embedding."""
    return functional.linear(hidden_BTD, embed.embedding.weight)


class Head(torch.nn.Module):
    """Hidden states to logits [B, T, V]."""

    def __init__(self, lm_head: torch.nn.Module) -> None:
        super().__init__()
        self.lm_head = lm_head

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden_BTD)


class Block(torch.nn.Module):
    """One decoder layer; the last one applies the final norm as well."""

    def __init__(self, base: torch.nn.Module, index: int) -> None:
        super().__init__()
        config = copy.deepcopy(base.config)
        config.num_hidden_layers = 1
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = [config.layer_types[index]]
        with torch.device("meta"):  # only its forward is used: all of its modules are replaced below
            self.base = type(base)(config)
        self.base.embed_tokens = None
        self.base.layers = torch.nn.ModuleList([base.layers[index]])
        self.base.rotary_emb = base.rotary_emb
        self.base.norm = base.norm if index == len(base.layers) - 1 else torch.nn.Identity()

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return self.base(inputs_embeds=hidden_BTD, use_cache=False).last_hidden_state


def missing_parts(config: PretrainedConfig) -> list[str]:
    """The names of the modules that a pipeline needs and a model of this config does not have."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    base = model.base_model
    missing = [f"{model.base_model_prefix}.{name}" for name in BASE_PARTS if not hasattr(base, name)]
    return missing if hasattr(model, "lm_head") else [*missing, "lm_head"]


class Layers:
    """A model as the layers of a pipeline, and its loss.

    Every rank initializes the full model, as without a pipeline, so that the weights are equal;
    `on_this_stage` releases the layers of other stages.

    Raises:
        ValueError: if the layers, one after another, do not compute what the model computes.
    """

    def __init__(self, model: Any) -> None:
        self._loss = partial(model.loss_function, vocab_size=model.config.vocab_size)
        base, embedding, head = model.base_model, model.get_input_embeddings(), model.lm_head
        blocks = [LayerSpec(Block, base, index) for index in range(len(base.layers))]
        if head.weight is embedding.weight:
            tied = partial(TiedLayerSpec, "embedding", Embed, embedding, tied_weight_attr="embedding.weight")
            self._specs = [tied(), *blocks, tied(forward_fn=tied_head)]
        else:
            self._specs = [LayerSpec(Embed, embedding), *blocks, LayerSpec(Head, head)]
        self._check_against(model)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """The logits that all stages together compute."""
        hidden = ids_BT
        for spec in self._specs:
            forward_fn = getattr(spec, "forward_fn", None) or torch.nn.Module.__call__
            hidden = forward_fn(spec.build(), hidden)
        return hidden

    def loss(self, logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        """The model's own loss."""
        return self._loss(logits=logits_BTV, labels=labels_BT)

    @torch.no_grad()
    def _check_against(self, model: Any) -> None:
        model.eval()
        ids_BT = torch.arange(16, device=model.device).remainder(model.config.vocab_size)[None]
        logits_BTV = self.forward(ids_BT)
        expected = model(input_ids=ids_BT, labels=ids_BT)
        model.train()
        # The operations are equal, and a soft cap changes the small logits of new weights by 1e-5 or less.
        difference = (logits_BTV - expected.logits).abs().max() / expected.logits.abs().max()
        same_loss = torch.isclose(self.loss(logits_BTV, ids_BT), expected.loss, rtol=1e-6)
        used = {parameter for spec in self._specs for parameter in spec.build().parameters()}
        if used != set(model.parameters()) or difference > 1e-6 or not same_loss:
            raise ValueError(
                f"--pipeline-stages: model_type {model.config.model_type!r} computes something else besides "
                f"{', '.join(BASE_PARTS[:-1])} and lm_head"
            )

    def on_this_stage(self, num_stages: int) -> PipelineModule:
        """The pipeline module with the layers of this rank's stage."""
        # PipelineModule prints its partition, and autograd warns about its broadcast of tied weights.
        with contextlib.redirect_stdout(None), torch.no_grad():
            # DeepSpeed reduces gradient norms over stages once for each parameter group, and hangs if stages
            # have different groups: so every stage gets a decoder layer, which has matrices and vectors.
            module = PipelineModule(
                self._specs, num_stages, loss_fn=self.loss, partition_method=f"type:{Block.__name__}"
            )
        for spec in self._specs:
            spec.module_args = ()
        return module


def train_batch(engine: Any, micro_batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Take one optimizer step; returns the mean loss over micro-batches and pipelines, on every rank."""
    return engine.train_batch((batch_BT, batch_BT) for batch_BT in micro_batches)


def evaluate(engine: Any, batches: list[torch.Tensor]) -> torch.Tensor:
    """The mean loss over batches and pipelines, on every rank."""
    pairs = ((batch_BT, batch_BT) for batch_BT in batches)
    return engine.eval_batch(pairs, num_micro_batches=len(batches))
