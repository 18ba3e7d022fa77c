"""Do text and audio pull the shared attention the same way? Their losses' gradients, taken aside from training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from telemetry.families.base import IGNORE_INDEX, Family, Stream
from telemetry.instruments.base import LastMicrobatchInstrument, Step, probed_layers
from telemetry.measures.gradients import cosine
from telemetry.probes.forward import Microbatch, streams_of, watched_aside
from telemetry.probes.quiet import set_aside
from telemetry.probes.sharding import forwards_are_collective
from telemetry.records import Mean

COSINE = "gradients/text_audio_cosine"
SPREAD = "its parameters are spread over ranks: a pass of one rank alone would wait for the others"
NOT_TRAINED = "nothing of the attention of the first, middle and last layer is trained"
ONE_MODALITY = "the batch has no text or no audio to learn, or the model computes no logits of it"


class TextAudioCosine(LastMicrobatchInstrument):
    """Measures ``gradients/text_audio_cosine`` on a due step's last microbatch, with the weights after the step.

    Not before: only then are the hooks of the due step gone and the graph of training freed. Costs a forward pass with
    its activations kept and two backward passes down to the lowest attention that is looked into.
    """

    def look(self, step: Step, microbatch: Microbatch | None) -> None:
        """Run the last microbatch once more, aside."""
        if step.family is None or microbatch is None:
            return
        if forwards_are_collective(step.model):
            step.recorder.absent(COSINE, SPREAD)
            return
        layers = probed_layers(step, None, COSINE)
        trained = [one for layer in layers for one in layer.attention.parameters() if one.requires_grad]
        if not trained:
            step.recorder.absent(COSINE, NOT_TRAINED)
            return
        found = _cosine(step.model, step.family, microbatch, trained)
        if found is None:
            step.recorder.absent(COSINE, ONE_MODALITY)
        else:
            step.recorder.metric(COSINE, Mean(found[0], found[1]))


def _cosine(
    model: nn.Module, family: Family, microbatch: Microbatch, parameters: Sequence[nn.Parameter]
) -> Tensor | None:
    """Return the cosine between the gradients of a microbatch's text loss and of its audio loss.

    Each is the sum over its streams of each one's mean over its supervised tokens, as they are trained. The model runs
    in eval mode, and nothing of it is left: no ``.grad`` is touched and no hook of a gradient accumulator (DDP's) runs.
    A conflict of gradients as in Yu et al., "Gradient Surgery for Multi-Task Learning" (2020), is a negative cosine.

    Args:
        model: without its DDP wrapper, its parameters whole; no hook of a due step may be on it.
        family: declares the streams.
        microbatch: its tensors on the model's device.
        parameters: what the gradients are taken of, as one vector.

    Returns:
        As :func:`telemetry.measures.gradients.cosine`: not measured where nothing is supervised of a modality. None
        where the batch has not both, or the model computes no logits of one.
    """
    with set_aside(model), torch.enable_grad(), watched_aside(family, microbatch.view) as seen:
        outputs = model(**microbatch.inputs)
        losses: dict[str, Tensor] = {}
        for stream in streams_of(family, microbatch.known, outputs, seen):
            losses[stream.group] = losses.get(stream.group, torch.zeros(())) + _sum_of_means(stream)
        if losses.keys() != {"text", "audio"}:
            return None
        text, audio = (
            torch.autograd.grad(losses[group], list(parameters), retain_graph=group == "text", allow_unused=True)
            for group in ("text", "audio")
        )
    return cosine(text, audio)


def _sum_of_means(stream: Stream) -> Tensor:
    """Of every sequence of a stream the mean loss of its supervised tokens, weighted and summed: a 0-d tensor."""
    targets = stream.predicted.reshape(-1, len(stream.names))
    losses = cross_entropy(
        stream.logits.float().reshape(targets.numel(), -1),
        targets.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    ).view(targets.shape)
    counts = (targets != IGNORE_INDEX).sum(0).clamp(min=1)
    return stream.weight * (losses.sum(0) / counts).sum()
