"""Any text-only causal language model of transformers (Llama, Qwen, ...)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from telemetry.families.base import BatchView, FeedForward, Head, Layer, decoder_layers, real_positions

_GROUPS = (
    ("lora_", "lora"),
    ("embed_tokens", "text_embedding"),
    ("lm_head", "text_head"),
    ("self_attn", "shared_attention"),
    (".mlp.", "text_ffn"),
    ("norm", "norms"),
)


class CausalLMFamily:
    """Reads batches of a model whose output embeddings give text logits."""

    name = "causal_lm"

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        self._model = model
        self._head = head
        self._vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr,arg-type]

    @classmethod
    def find(cls, model: nn.Module) -> CausalLMFamily | None:
        """The family of a model, wrapped or not; None where no module has a text head."""
        for module in model.modules():
            get_head = getattr(module, "get_output_embeddings", None)
            config = getattr(module, "config", None)
            if callable(get_head) and isinstance(getattr(config, "vocab_size", None), int):
                head = get_head()
                if isinstance(head, nn.Module):
                    return cls(module, head)
        return None

    def heads(self) -> Sequence[Head]:
        """The language model head."""
        return [Head(self._head, "text")]

    def output_logits(self, outputs: Any) -> Sequence[tuple[Head, Tensor]]:
        """The text logits."""
        logits = getattr(outputs, "logits", None)
        return [(self.heads()[0], logits)] if isinstance(logits, Tensor) else []

    def rows(self, view: BatchView, head: Head, logits: Tensor) -> Tensor | None:
        """None: every position has its logits."""
        return None

    def group_of(self, parameter_name: str) -> str:
        """Group of a parameter by its name in the model."""
        return next((group for part, group in _GROUPS if part in parameter_name), "other")

    def layers(self) -> Sequence[Layer]:
        """Every decoder layer, with its one feed-forward network."""
        get_decoder = getattr(self._model, "get_decoder", None)
        layers = decoder_layers(get_decoder() if callable(get_decoder) else None)
        return [Layer(index, layer.self_attn, _networks(layer)) for index, layer in enumerate(layers)]

    def served(self, view: BatchView) -> Mapping[str, Tensor]:
        """The one network is given every position."""
        return {"text_ffn": torch.ones_like(view.real)}

    def view(self, inputs: Mapping[str, Any]) -> BatchView | None:
        """Text positions and labels."""
        input_ids = inputs.get("input_ids")
        if not isinstance(input_ids, Tensor):
            return None
        real = real_positions(inputs, input_ids)
        return BatchView(input_ids, real, real, inputs.get("labels"), self._vocabulary)


def _networks(layer: Any) -> dict[str, FeedForward]:
    """The feed-forward network of a layer, wherever the architecture puts its norms."""
    module = getattr(layer, "mlp", None)
    if not isinstance(module, nn.Module):
        return {}
    behind = getattr(layer, "post_feedforward_layernorm", None)
    before = getattr(layer, "pre_feedforward_layernorm", None)
    if before is not None or behind is not None:  # Gemma 2 and 3; OLMo 2 has none before
        return {"text_ffn": FeedForward(module, behind or module, before or module)}
    scaled = hasattr(layer, "residual_multiplier")  # Granite: what is added is not the network's output
    residual = None if scaled else getattr(layer, "post_attention_layernorm", None)
    return {"text_ffn": FeedForward(module, module, residual)}
