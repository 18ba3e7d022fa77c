"""Catches what the attention of a few layers is computed from, where transformers calls the attention function."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from telemetry.families.base import Layer
from telemetry.measures.attention_masks import (
    RowMask,
    given_mask_rows,
    ruled_mask_rows,
    segments_of_lengths,
    segments_of_positions,
)
from telemetry.probes.watch import Watch

Kernel = Literal["eager", "sdpa", "flash"]
# What changes the logits or the softmax in ways that are not worked out here.
_UNKNOWN = {
    "s_aux": "its softmax has learned sinks",
    "position_bias": "its logits have a position bias",
    "cache": "its keys lie in a paged cache",
}


class UnmeasurableError(ValueError):
    """Attention that cannot be worked out again exactly; the message is the reason."""


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function, as its kernel was given it.

    Attributes:
        layer: index of the decoder layer.
        query: ``[batch, heads, queries, size]``, rotated.
        key: ``[batch, key heads, keys, size]``.
        mask: as the kernel takes it, or None.
        module: the attention module.
        kernel: what the function computes; None for one that is not known.
        options: further keyword arguments.
        across: whether its keys are an encoder's, and not those of its queries.
    """

    layer: int
    query: Tensor
    key: Tensor
    mask: Tensor | None
    module: nn.Module
    kernel: Kernel | None
    options: Mapping[str, Any] = field(default_factory=dict)
    across: bool = False

    @property
    def scaling(self) -> float:
        """Factor of the dot products.

        Raises:
            UnmeasurableError: when only the function knows it.
        """
        given = self.options.get("scaling")
        if given is not None:
            return float(given)
        if self.kernel == "eager":
            raise UnmeasurableError("it does not say how it scales its logits")
        return float(self.query.shape[-1] ** -0.5)

    @property
    def softcap(self) -> float | None:
        """Bound of the logits, or None."""
        given = self.options.get("softcap")
        return None if given is None else float(given)

    def row_mask(self, rows: Tensor) -> RowMask:
        """What the queries at ``rows`` ``[batch, rows]`` see.

        Raises:
            UnmeasurableError: when that cannot be told exactly.
        """
        self._check()
        if self.kernel == "flash":
            return self._flash_mask(rows)
        if self.mask is None:
            # sdpa is told to be causal where there is no mask; the eager function is not.
            return ruled_mask_rows(rows, self.key.shape[2], self.kernel == "sdpa" and self._is_causal())
        if not isinstance(self.mask, Tensor) or self.mask.shape[-2:] != (self.query.shape[2], self.key.shape[2]):
            raise UnmeasurableError("its mask is not one of queries by keys")
        try:
            return given_mask_rows(self.mask, rows)
        except ValueError as error:
            raise UnmeasurableError(f"its mask is {error}") from error

    def _check(self) -> None:
        if self.kernel is None:
            raise UnmeasurableError("its attention function is not one that is known (eager, sdpa, flash attention)")
        for name, reason in _UNKNOWN.items():
            if self.options.get(name) is not None:
                raise UnmeasurableError(reason)
        if self.query.shape[2] != self.key.shape[2] and not self.across:
            raise UnmeasurableError("it has other keys than those of its queries (a cache, or a learned prefix)")
        if self.query.shape[-1] != self.key.shape[-1] or self.query.shape[1] % self.key.shape[1]:
            raise UnmeasurableError("its queries and keys do not fit each other")

    def _is_causal(self) -> bool:
        given = self.options.get("is_causal")
        causal = getattr(self.module, "is_causal", True) if given is None else given
        return bool(causal) and self.query.shape[2] > 1

    def _flash_mask(self, rows: Tensor) -> RowMask:
        keys = self.key.shape[2]
        if self.mask is not None and self.mask.shape != (self.key.shape[0], keys):
            raise UnmeasurableError("its mask is not one of padding")
        real = None if self.mask is None else self.mask.bool()
        segments = self._segments() if real is None else None
        window = self.options.get("sliding_window")
        return ruled_mask_rows(rows, keys, self._is_causal(), real, window, segments)

    def _segments(self) -> Tensor | None:
        """The packed sequences, as flash attention is told of them."""
        keys = self.key.shape[2]
        lengths = [
            self.options.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        ]
        positions = self.options.get("position_ids")
        if all(length is not None for length in lengths):
            if self.key.shape[0] != 1:
                raise UnmeasurableError("it packs sequences across the samples of a batch")
            return segments_of_lengths(lengths[1], keys)  # type: ignore[arg-type]
        if self.key.shape[0] != 1 or not isinstance(positions, Tensor):
            return None
        if positions.shape != (1, keys):
            raise UnmeasurableError("its position ids do not say which sequences are packed")
        return segments_of_positions(positions)


Sink = Callable[[AttentionCall], None]


def watch_attention(watch: Watch, owner: Any, layers: Sequence[Layer], sink: Sink) -> None:
    """Have ``sink`` told of every call of the attention function by some layers.

    Whatever kernel is used, its function is called with its own arguments, and what it gives goes on untouched.
    """
    indices = {layer.attention: (layer.index, False) for layer in layers}
    indices |= {one: (layer.index, True) for layer in layers if (one := layer.cross_attention) is not None}

    def observe(function: Callable[..., Any], eager: bool, arguments: tuple[Any, ...], options: Any) -> None:
        given = dict(zip(_PARAMETERS, arguments, strict=False)) | dict(options)
        module, query, key, _, mask = (given.pop(name, None) for name in _PARAMETERS)
        if isinstance(query, Tensor) and isinstance(key, Tensor):
            kernel = "eager" if eager else next((known for other, known in _KERNELS if other is function), None)
            layer, across = indices[module]
            sink(AttentionCall(layer, query, key, mask, module, kernel, given, across))

    def observed(*call: Any) -> None:
        watch.see(owner, observe, *call)

    # Not the owner's: one that fails within a pass, and is switched off, is no reason to leave it in place.
    watch.passes(
        _Interception,
        lambda _inputs: _Interception.begin(dict.fromkeys(indices, observed)),
        lambda _outputs: _Interception.end(indices),
    )


_PARAMETERS = ("module", "query", "key", "value", "attention_mask")
_KERNELS: tuple[tuple[Callable[..., Any], Kernel], ...] = (
    (sdpa_attention_forward, "sdpa"),
    (flash_attention_forward, "flash"),
)
_Observe = Callable[[Callable[..., Any], bool, tuple[Any, ...], Any], None]


class _Interception:
    """Stands where transformers looks an attention function up, while any probe watches a forward pass.

    Looking up is shared by all models and threads: calls for modules that nobody watches pass through.
    """

    _lock = threading.Lock()
    _watched: ClassVar[dict[nn.Module, _Observe]] = {}
    _original: ClassVar[Callable[..., Any] | None] = None

    @classmethod
    def begin(cls, watched: Mapping[nn.Module, _Observe]) -> None:
        with cls._lock:
            cls._watched.update(watched)
            if cls._original is None and cls._watched:
                cls._original = AttentionInterface.get_interface
                AttentionInterface.get_interface = _intercepting(cls._original, cls._watched)  # type: ignore[method-assign]

    @classmethod
    def end(cls, modules: Mapping[nn.Module, Any]) -> None:
        with cls._lock:
            for module in modules:
                cls._watched.pop(module, None)
            if cls._original is not None and not cls._watched:
                AttentionInterface.get_interface = cls._original  # type: ignore[method-assign]
                cls._original = None


def _intercepting(look_up: Callable[..., Any], watched: Mapping[nn.Module, _Observe]) -> Callable[..., Any]:
    @functools.wraps(look_up)
    def get_interface(interface: Any, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        function = look_up(interface, attn_implementation, default)

        @functools.wraps(function)
        def attend(*arguments: Any, **options: Any) -> Any:
            module = arguments[0] if arguments else options.get("module")
            observe = watched.get(module) if isinstance(module, nn.Module) else None
            if observe is not None:
                observe(function, function is default, arguments, options)
            return function(*arguments, **options)

        return attend

    return get_interface
