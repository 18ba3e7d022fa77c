"""Whether text and audio pull the shared attention the same way: their losses' gradients, taken aside from training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from telemetry.families.base import IGNORE_INDEX, BatchView, Family, shift_labels
from telemetry.measures.gradients import cosine
from telemetry.probes.forward import Microbatch
from telemetry.probes.quiet import set_aside


def text_audio_cosine(
    model: nn.Module, family: Family, microbatch: Microbatch, parameters: Sequence[nn.Parameter]
) -> Tensor | None:
    """Cosine between the gradients of a microbatch's text loss and of its audio loss.

    The text loss is the mean over its supervised tokens, the audio loss the sum over codebooks of each one's mean, as
    they are trained. Costs a forward pass with its activations kept and two backward passes down to the lowest of the
    parameters. The model runs in eval mode, and nothing of it is left: no ``.grad`` is touched and no hook of a
    gradient accumulator (DDP's) runs. A conflict of gradients as in Yu et al., "Gradient Surgery for Multi-Task
    Learning" (2020), is a negative cosine.

    Args:
        model: without its DDP wrapper, its parameters whole; no hook of a due step may be on it.
        family: names the heads.
        microbatch: its tensors on the model's device.
        parameters: what the gradients are taken of, as one vector.

    Returns:
        As :func:`telemetry.measures.gradients.cosine`: not measured where nothing is supervised of a modality. None
        where the batch has not both, or the model computes no logits of one.
    """
    view = microbatch.view
    if view is None or view.audio is None or view.text_labels is None:
        return None
    with set_aside(model), torch.enable_grad():
        logits = _logits(model, family, microbatch)
        if logits.keys() != {"text", "audio"}:
            return None
        losses = [_text_loss(logits["text"], view.text_labels), _audio_loss(logits["audio"], view)]
        text, audio = (
            torch.autograd.grad(loss, list(parameters), retain_graph=at == 0, allow_unused=True)
            for at, loss in enumerate(losses)
        )
    return cosine(text, audio)


def _logits(model: nn.Module, family: Family, microbatch: Microbatch) -> dict[str, Tensor]:
    """By modality, as the heads compute them, since outputs may lack those of text. Labels make the text head run."""
    caught: dict[str, Tensor] = {}

    def catch(modality: str) -> Any:
        return lambda _module, _args, output: caught.__setitem__(modality, output)

    handles = [head.module.register_forward_hook(catch(head.modality)) for head in family.heads()]
    try:
        model(**microbatch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return caught


def _text_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return _sum_of_means(logits.unsqueeze(2), shift_labels(labels).unsqueeze(2))


def _audio_loss(logits: Tensor, view: BatchView) -> Tensor:
    assert view.audio is not None
    labels = shift_labels(view.audio.labels)
    return _sum_of_means(logits.reshape(*labels.shape, -1), labels)


def _sum_of_means(logits: Tensor, targets: Tensor) -> Tensor:
    """Of ``[batch, sequence, streams, vocabulary]`` and ``[batch, sequence, streams]``, each stream over its tokens."""
    losses = cross_entropy(
        logits.float().flatten(0, 2), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    ).view(targets.shape)
    counts = (targets != IGNORE_INDEX).sum((0, 1)).clamp(min=1)
    return (losses.sum((0, 1)) / counts).sum()
