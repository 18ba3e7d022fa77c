"""Any text-only causal language model of transformers (Llama, Qwen, ...)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from telemetry.families.base import BatchView, Head, real_positions

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

    def group_of(self, parameter_name: str) -> str:
        """Group of a parameter by its name in the model."""
        return next((group for part, group in _GROUPS if part in parameter_name), "other")

    def view(self, inputs: Mapping[str, Any]) -> BatchView | None:
        """Text positions and labels."""
        input_ids = inputs.get("input_ids")
        if not isinstance(input_ids, Tensor):
            return None
        real = real_positions(inputs, input_ids)
        return BatchView(input_ids, real, real, inputs.get("labels"), self._vocabulary)
