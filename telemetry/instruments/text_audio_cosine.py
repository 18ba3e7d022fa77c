"""Do text and audio pull the shared attention the same way?"""

from __future__ import annotations

from telemetry.instruments.base import Instrument, Step
from telemetry.instruments.probed_layers import probed_layers
from telemetry.probes.forward import Microbatch
from telemetry.probes.modality_gradients import text_audio_cosine
from telemetry.probes.sharding import forwards_are_collective
from telemetry.records import Mean

COSINE = "gradients/text_audio_cosine"
SPREAD = "its parameters are spread over ranks: a pass of one rank alone would wait for the others"
NOT_TRAINED = "nothing of the attention of the first, middle and last layer is trained"
ONE_MODALITY = "the batch has no text or no audio to learn, or the model computes no logits of it"


class TextAudioCosine(Instrument):
    """Measures ``gradients/text_audio_cosine`` on a due step's last microbatch, with the weights after the step.

    Not before: only then are the hooks of the due step gone and the graph of training freed.
    """

    def __init__(self) -> None:
        self._last: Microbatch | None = None

    def begin(self, step: Step) -> None:
        """A due step begins."""
        self._last = None

    def inputs(self, step: Step, microbatch: Microbatch) -> None:
        """A microbatch is about to run: the last one counts."""
        self._last = microbatch

    def finish(self, step: Step) -> None:
        """The due step has ended: run its last microbatch once more, aside."""
        microbatch, self._last = self._last, None
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
        found = text_audio_cosine(step.model, step.family, microbatch, trained)
        if found is None:
            step.recorder.absent(COSINE, ONE_MODALITY)
        else:
            step.recorder.metric(COSINE, Mean(found[0], found[1]))
