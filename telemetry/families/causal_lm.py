"""Any language model of transformers that predicts text alone (Llama, Qwen, ...)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from telemetry.families.base import (
    DECODER_GROUPS,
    IGNORE_INDEX,
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
from telemetry.families.fused import SAMPLE, decoders_of, even_rows, head_fault, last_hidden_state, logits_of

_MODEL = "model"
# Of the code of a forward pass that hands the trainer's count on to its loss; the last three are fused losses.
_COUNTING = {
    "loss_function", "num_items_in_batch", "LigerForCausalLMLoss", "lce_maybe_trainable_lm_head", "apply_lce",
}  # fmt: skip


class CausalLMFamily(Family):
    """Reads models whose output embeddings give text logits, and whose loss is a cross-entropy over them.

    Labels are shifted by the loss but in encoder-decoders and masked language models. Experts' router losses are added
    where the model returns one. A loss that is fused with the head leaves no logits: they are computed again.
    """

    name = "causal_lm"
    groups: Sequence[tuple[str, str]] = (
        *(("lora_", "lora"), ("ia3_", "lora"), ("prompt_encoder", "lora")),  # what PEFT adds, whatever it is added to
        ("lm_head", "text_head"),
        *DECODER_GROUPS,
    )

    @classmethod
    def find(cls, model: nn.Module) -> CausalLMFamily | None:
        """The family of a model, wrapped or not; None where no module has a text head."""
        # One whose class has a head: wrappers (PEFT) pass on what they are asked for.
        own = (module for module in model.modules() if hasattr(type(module), "get_output_embeddings"))
        return next((cls(module) for module in own if cls.fits(module)), None)

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        """Whether it has a text head and says how large its vocabulary is."""
        get_head = getattr(model, "get_output_embeddings", None)
        known = callable(get_head) and isinstance(getattr(text_config(model), "vocab_size", None), int)
        return known and isinstance(get_head(), nn.Module)  # type: ignore[misc]

    def watched(self) -> Mapping[str, nn.Module]:
        """The model itself, whose labels a wrapper may have lengthened, and where it ends before its head."""
        return {_MODEL: self.model, **self._decoders}

    def streams(self, inputs: Mapping[str, Any], outputs: Any, seen: Seen) -> Iterable[Declared]:
        """The text, from the logits that the loss takes: after scaling and capping.

        Where the loss is fused with the head, from logits that are computed again of the last hidden state.
        """
        for call in seen.given.get(_MODEL, ()):
            inputs = {**inputs, **{name: value for name, value in call.items() if value is not None}}
        logits, labels = _logits(outputs), inputs.get("labels")
        shifted = inputs.get("shift_labels")
        alignment = self._alignment
        if isinstance(shifted, Tensor):
            labels, alignment = shifted, "given_shifted"
        items = inputs.get("num_items_in_batch") if self._counts else None
        if not isinstance(labels, Tensor):
            yield Absent("text", NO_LOGITS if logits is None else NO_LABELS, in_loss=False)
        elif logits is None:
            again = self._computed_again(labels, alignment, seen)
            yield replace(again, denominator=items) if isinstance(again, Stream) else again
        else:
            yield Stream("text", logits, labels, "text", alignment, denominator=items)
        router, weight = output(outputs, "aux_loss"), self._router_weight
        if labels is not None and isinstance(router, Tensor) and weight is not None:
            yield LossPart("router", router * weight)

    def _computed_again(self, labels: Tensor, alignment: Alignment, seen: Seen) -> Stream | Absent:
        """The text from logits that the model computed none of: all rows, or of many an even sample."""
        name, decoder = next(((name, one) for name, one in self._decoders.items() if name in seen.modules), ("", None))
        if decoder is None:
            return Absent("text", seen.missing)
        given = seen.modules[name]
        hidden, fault = last_hidden_state(given), head_fault(self.model, decoder)
        if hidden is None or fault:
            return Absent("text", fault or seen.missing)
        if hidden.shape[:2] != labels.shape:
            positions, expected = tuple(hidden.shape[:2]), tuple(labels.shape)
            return Absent(
                "text", f"the loss is fused, and the decoder gives {positions} positions for {expected} labels"
            )
        stream = Stream("text", hidden, labels, "text", alignment)
        rows, each = None, hidden.new_ones((), dtype=torch.float32)
        if labels.numel() > SAMPLE:
            rows, each = even_rows(stream.targets != IGNORE_INDEX, SAMPLE)
            hidden = hidden.flatten(0, 1)[rows][None]
        logits = logits_of(self.model, decoder, given, hidden, seen.autocast)
        if logits is None:
            return Absent("text", NO_LOGITS)
        return replace(stream, logits=logits if rows is None else logits[0], rows=rows, each=each)

    @functools.cached_property
    def _decoders(self) -> Mapping[str, nn.Module]:
        """What may give the last hidden state, the outermost first."""
        return {} if self._encodes else {f"decoder_{at}": one for at, one in enumerate(decoders_of(self.model))}

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
        known = [code for code in codes if code is not None]
        named = {name for code in known for name in (*code.co_names, *code.co_varnames, *code.co_consts)}
        return not named.isdisjoint(_COUNTING)

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
        config: Any = text_config(self.model)
        real = real_positions(inputs, input_ids, getattr(config, "pad_token_id", None), labels)
        if self._encodes or not isinstance(labels, Tensor) or labels.shape != input_ids.shape:
            labels = None
        text = real
        for placeholder in _placeholders(self.model.config):  # of images and sound, which are put there
            text = text & (input_ids != placeholder)
        return BatchView(input_ids, real, text, labels, int(config.vocab_size))


def text_config(model: Any) -> Any:
    """The configuration of the part that predicts text, of a model that has others beside it."""
    config = getattr(model, "config", None)
    get = getattr(config, "get_text_config", None)
    return get(decoder=True) if callable(get) else config


def _placeholders(config: Any) -> list[int]:
    """Ids that stand for what is no text."""
    named = (f"{kind}_token_{end}" for kind in ("image", "audio", "video") for end in ("id", "index"))
    return sorted({one for name in named if isinstance(one := getattr(config, name, None), int)})


def _logits(outputs: Any) -> Tensor | None:
    """Logits by their name or, of a tuple, the first floats ``[batch, sequence, ...]``: its loss has no dimension.

    None where there are none: in their place a fused loss may put something that is empty.
    """
    if not isinstance(outputs, tuple):
        logits = output(outputs, "logits")
        return logits if isinstance(logits, Tensor) and logits.numel() else None
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
