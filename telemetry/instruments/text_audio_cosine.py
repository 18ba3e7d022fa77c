"""Do text and audio pull the shared attention the same way?"""

from __future__ import annotations

from telemetry.instruments.probed_layers import probed_layers
from telemetry.probes.forward import Microbatch
from telemetry.probes.lockstep import forwards_are_collective
from telemetry.probes.modality_gradients import text_audio_cosine
from telemetry.records import Mean
from telemetry.session import Session

COSINE = "gradients/text_audio_cosine"
SPREAD = "its parameters are spread over ranks: a pass of one rank alone would wait for the others"
NOT_TRAINED = "nothing of the attention of the first, middle and last layer is trained"
ONE_MODALITY = "the batch has no text or no audio to learn, or the model computes no logits of it"


class CosineLog:
    """Measures ``gradients/text_audio_cosine`` on a due step's last microbatch, with the weights after the step.

    Not before: only then are the hooks of the due step gone and the graph of training freed.
    """

    def __init__(self) -> None:
        self._session: Session | None = None
        self._last: Microbatch | None = None

    def begin(self, session: Session) -> None:
        """A due step begins."""
        self._session, self._last = session, None

    def observe_inputs(self, microbatch: Microbatch) -> None:
        """A microbatch is about to run: the last one counts."""
        self._last = microbatch

    def finish(self) -> None:
        """The due step has ended: run its last microbatch once more, aside."""
        session, microbatch = self._session, self._last
        self._session = self._last = None
        if session is None or session.family is None or microbatch is None:
            return
        if forwards_are_collective(session.model):
            session.recorder.absent(COSINE, SPREAD)
            return
        layers = probed_layers(session, None, COSINE)
        trained = [one for layer in layers for one in layer.attention.parameters() if one.requires_grad]
        if not trained:
            session.recorder.absent(COSINE, NOT_TRAINED)
            return
        found = text_audio_cosine(session.model, session.family, microbatch, trained)
        if found is None:
            session.recorder.absent(COSINE, ONE_MODALITY)
        else:
            session.recorder.metric(COSINE, Mean(found[0], found[1]))
