"""Any language model of transformers that predicts text alone (Llama, Qwen, ...)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from telemetry.families.base import (
    DECODER_GROUPS,
    NO_LABELS,
    NO_LOGITS,
    Absent,
    Alignment,
    BatchView,
    Declared,
    Family,
    FeedForward,
    Layer,
    LossPart,
    Seen,
    Stream,
    decoder_layers,
    output,
    real_positions,
)


class CausalLMFamily(Family):
    """Reads models whose output embeddings give text logits, and whose loss is a cross-entropy over them.

    Labels are shifted by the loss but in encoder-decoders and masked language models. Experts' router losses are added
    where the model returns one.
    """

    name = "causal_lm"
    groups = (("lora_", "lora"), ("lm_head", "text_head"), *DECODER_GROUPS)

    @classmethod
    def find(cls, model: nn.Module) -> CausalLMFamily | None:
        """The family of a model, wrapped or not; None where no module has a text head."""
        return next((cls(module) for module in model.modules() if cls.fits(module)), None)

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        """Whether it has a text head and says how large its vocabulary is."""
        get_head, config = getattr(model, "get_output_embeddings", None), getattr(model, "config", None)
        known = callable(get_head) and isinstance(getattr(config, "vocab_size", None), int)
        return known and isinstance(get_head(), nn.Module)  # type: ignore[misc]

    def streams(self, inputs: Mapping[str, Any], outputs: Any, seen: Seen) -> Iterable[Declared]:
        """The text, from the logits that the loss takes: after scaling and capping."""
        logits, labels = _logits(outputs), inputs.get("labels")
        shifted = inputs.get("shift_labels")
        items = inputs.get("num_items_in_batch") if self._counts else None
        if logits is None:
            yield Absent("text", NO_LOGITS, in_loss=labels is not None)
        elif isinstance(shifted, Tensor):
            yield Stream("text", logits, shifted, "text", "given_shifted", denominator=items)
        elif isinstance(labels, Tensor):
            yield Stream("text", logits, labels, "text", self._alignment, denominator=items)
        else:
            yield Absent("text", NO_LABELS, in_loss=False)
        router, weight = output(outputs, "aux_loss"), self._router_weight
        if labels is not None and isinstance(router, Tensor) and weight is not None:
            yield LossPart("router", router * weight)

    @property
    def _alignment(self) -> Alignment:
        aligned = self._encodes or getattr(self.model, "loss_type", None) == "ForMaskedLM"
        return "aligned" if aligned else "shifted"

    @functools.cached_property
    def _counts(self) -> bool:
        """Whether its loss is divided by what the trainer has counted, where it counts.

        Many models take that number among the arguments of their forward pass and do nothing with it: those that pass
        on none to ``loss_function``.
        """
        forwards = (vars(kind).get("forward") for kind in type(self.model).__mro__)
        codes = (getattr(inspect.unwrap(forward), "__code__", None) for forward in forwards if forward is not None)
        named = {name for code in codes if code is not None for name in (*code.co_names, *code.co_varnames)}
        return not named.isdisjoint({"loss_function", "num_items_in_batch"})

    @property
    def _encodes(self) -> bool:
        """Whether labels are another sequence than the token ids."""
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    @property
    def _router_weight(self) -> float | None:
        holders: tuple[Any, ...] = (self.model, self.model.config, getattr(self.model.config, "text_config", None))
        known = (getattr(holder, "router_aux_loss_coef", None) for holder in holders)
        return next((weight for weight in known if weight is not None), None)

    def layers(self) -> Sequence[Layer]:
        """Every decoder layer, with its one feed-forward network."""
        get_decoder = getattr(self.model, "get_decoder", None)
        layers = decoder_layers(get_decoder() if callable(get_decoder) and not self._encodes else None)
        return [Layer(index, layer.self_attn, _networks(layer)) for index, layer in enumerate(layers)]

    def served(self, view: BatchView) -> Mapping[str, Tensor]:
        """The one network is given every position."""
        return {"text_ffn": torch.ones_like(view.real)}

    def view(self, inputs: Mapping[str, Any]) -> BatchView | None:
        """Text positions and labels."""
        input_ids = inputs.get("input_ids")
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
            return None
        labels = inputs.get("labels")
        real = real_positions(inputs, input_ids, getattr(self.model.config, "pad_token_id", None), labels)
        if self._encodes or not isinstance(labels, Tensor) or labels.shape != input_ids.shape:
            labels = None
        return BatchView(input_ids, real, real, labels, int(self.model.config.vocab_size))


def _logits(outputs: Any) -> Tensor | None:
    """Logits by their name or, of a tuple, the first floats ``[batch, sequence, ...]``: its loss has no dimension."""
    if not isinstance(outputs, tuple):
        return output(outputs, "logits")
    floats = (part for part in outputs if isinstance(part, Tensor) and part.is_floating_point())
    return next((part for part in floats if part.dim() == 3), None)


def _networks(layer: Any) -> dict[str, FeedForward]:
    """The feed-forward network of a layer, wherever the architecture puts its norms."""
    module = getattr(layer, "mlp", None)
    if not isinstance(module, nn.Module):
        return {}
    after = getattr(layer, "post_feedforward_layernorm", None)
    before = getattr(layer, "pre_feedforward_layernorm", None)
    if before is not None or after is not None:  # Gemma 2 and 3; OLMo 2 has none before
        return {"text_ffn": FeedForward(module, after or module, before or module)}
    scaled = hasattr(layer, "residual_multiplier")  # Granite: what is added is not the network's output
    residual = None if scaled else getattr(layer, "post_attention_layernorm", None)
    return {"text_ffn": FeedForward(module, module, residual)}
