"""Verification that you can hear: the model speaks freely at every evaluation, and what it says is measured."""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from telemetry.delivery.recorder import Emitter, Recorder
from telemetry.families.speech import Prompt, Speaker, Speech
from telemetry.instruments.base import Instrument, Step, training_precision
from telemetry.instruments.clip_numbers import NEEDS_ENCODER, NEEDS_SCORER, NEEDS_TRANSCRIBER, HeardClip, Listener
from telemetry.instruments.clip_records import Baseline, MeasuredClip, baseline, metrics, save, shown
from telemetry.once import Once
from telemetry.probes.lockstep import can_keep_company, in_company
from telemetry.probes.quiet import set_aside
from telemetry.records import Clip
from telemetry.speech.base import OpinionScorer, SpeakerEncoder, Transcriber
from telemetry.speech.loading import load_opinion_scorer, load_speaker_encoder, load_transcriber

logger = logging.getLogger(__name__)

DEFAULT_CLIPS = 4
MAX_NEW_TOKENS = 1500
MAX_SECONDS = 120.0
LENGTH_RATIO = 2.0
_SEED = 0


@dataclass(frozen=True)
class _Sample:
    """One of the fixed samples: its prompt, and what the data set says of it."""

    prompt: Prompt
    metadata: Mapping[str, Any]
    sample_id: str


_Spoken = tuple[_Sample, Speech, Tensor]
"""A sample, what the model has made of it, and what it says with the target's past given."""


class ClipInstrument(Instrument):
    """Lets the model speak the first samples of this rank's evaluation data.

    The same samples at every evaluation, and before the first step: prompted with everything up to the target audio,
    with the model's own generation settings and a fixed seed. Beside it the reference, the target, and what the model
    says with the target's past given (teacher-forced). All on the training thread, between steps, leaving no trace.

    Args:
        clips: samples a rank; 0 turns it off.
        speaker_encoder: an object, ``resemblyzer``, or directory or hub id of an x-vector model; None leaves
            ``speaker_similarity`` out.
        transcriber: an object, ``pocketsphinx``, or directory or hub id of a speech recognition model; None leaves
            ``wer``, ``cer`` and ``reference_leak`` out.
        max_new_tokens: frames of codes of one clip at most; a clip may also be no more than twice as long as its
            target.
        max_seconds: wall time that the clips of one evaluation may take, at most half of it for generating. A clip for
            which no time is left is left out.
        opinion_scorer: an object, or ``dnsmos``; None leaves ``opinion_score`` out.

    Raises:
        ValueError: when a number is out of range, or what listens cannot be loaded.
    """

    def __init__(
        self,
        clips: int = DEFAULT_CLIPS,
        speaker_encoder: SpeakerEncoder | str | None = None,
        transcriber: Transcriber | str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        max_seconds: float = MAX_SECONDS,
        opinion_scorer: OpinionScorer | str | None = None,
    ) -> None:
        if clips < 0 or max_new_tokens < 1 or not max_seconds > 0:
            raise ValueError(
                f"clips must be at least 0, max_new_tokens at least 1 and max_seconds above 0, got {clips}, "
                f"{max_new_tokens} and {max_seconds}"
            )
        self.clips = clips
        self._encoder = load_speaker_encoder(speaker_encoder) if isinstance(speaker_encoder, str) else speaker_encoder
        self._transcriber = load_transcriber(transcriber) if isinstance(transcriber, str) else transcriber
        self._scorer = load_opinion_scorer(opinion_scorer) if isinstance(opinion_scorer, str) else opinion_scorer
        self.max_new_tokens = max_new_tokens
        self.max_seconds = max_seconds
        self._forget()

    def evaluation(self, step: Step, batches: Iterable[Mapping[str, Any]]) -> None:
        """An evaluation has ended, or training is about to begin: let the model speak and record what it says."""
        if not self.clips or not self._first_at_this_step(step):
            return
        speaker = step.family.speaker if step.family is not None else None
        codec = getattr(step.processor, "audio_tokenizer", None)
        codec = speaker.codec if codec is None and speaker is not None else codec
        with contextlib.ExitStack() as aside:
            for module in (step.model, codec):
                if isinstance(module, nn.Module):
                    aside.enter_context(set_aside(module))
            if speaker is None or codec is None:
                missing = "telemetry knows no way to make this model speak" if speaker is None else "there is no codec"
                step.recorder.absent("zero_shot/clips", f"{missing} (the processor's audio_tokenizer)")
                return
            _Evaluation(step, speaker, codec, self).run(self._fixed_samples(step, speaker, batches))

    def lacks(self, tag: str) -> str:
        """Say what a number of the clips needs that was not given; "" for nothing."""
        name = tag.rpartition("/")[2]
        listeners = (
            ("speaker encoder", NEEDS_ENCODER, self._encoder),
            ("transcriber", NEEDS_TRANSCRIBER, self._transcriber),
            ("opinion scorer", NEEDS_SCORER, self._scorer),
        )
        return next((f"no {what} was given" for what, names, one in listeners if name in names and not one), "")

    def listener(self, recorder: Recorder) -> Listener:
        """What measures, and says once what it cannot."""
        for name in (*NEEDS_ENCODER, *NEEDS_TRANSCRIBER, *NEEDS_SCORER):
            if reason := self.lacks(name):
                recorder.absent(f"zero_shot/{name}", reason)
        return Listener(
            self._encoder,
            self._transcriber,
            lambda name, reason: recorder.say_once(f"clip:{name}", "zero_shot/%s of a clip: %s", name, reason),
            self._scorer,
        )

    def __getstate__(self) -> dict[str, Any]:
        """A copy knows of no run yet."""
        return vars(self) | {"_run": None}

    def _forget(self) -> None:
        self._run: weakref.ref[Recorder] | None = None
        self._samples: list[_Sample] | None = None
        self._last_step = -1
        self.before: Baseline = {}
        self.once = Once(logger)

    def _first_at_this_step(self, step: Step) -> bool:
        """Once a step, whatever the number of evaluation sets; a new training (another recorder) begins anew."""
        if self._run is None or self._run() is not step.recorder:
            self._forget()
            self._run = weakref.ref(step.recorder)
        first, self._last_step = step.number != self._last_step, step.number
        return first

    def _fixed_samples(self, step: Step, speaker: Speaker, batches: Iterable[Mapping[str, Any]]) -> list[_Sample]:
        """Never raises: a rank without samples keeps the others company."""
        try:
            if self._samples is None:
                with training_precision(step):  # waveforms are encoded as in training
                    self._samples = list(_cut(speaker, batches, self.clips))
            if not self._samples:
                step.recorder.absent("zero_shot/clips", "no evaluation sample has target audio")
        except Exception:
            logger.exception("evaluation samples could not be read; training goes on without clips")
        return self._samples or []


class _Evaluation:
    """The clips of one evaluation."""

    def __init__(self, step: Step, speaker: Speaker, codec: Any, log: ClipInstrument) -> None:
        self._step = step
        self._speaker = speaker
        self._codec = codec
        self._log = log
        self._began = time.monotonic()

    def run(self, samples: Sequence[_Sample]) -> None:
        """Generate, listen, record."""
        clips = list(self._heard(self._spoken(samples)))
        for tag, value in metrics(clips):
            self._step.recorder.metric(tag, value)
        if clips:
            self._show(clips)

    def _spoken(self, samples: Sequence[_Sample]) -> list[_Spoken]:
        with self._in_step() as ready:
            if not ready:
                return []
            with training_precision(self._step):
                return list(self._generated(samples))

    @contextlib.contextmanager
    def _in_step(self) -> Iterator[bool]:
        """Whether the model may be run; where ranks wait for each other's forward passes, with all of them."""
        model, speaker, lockstep = self._step.model, self._speaker, self._step.lockstep
        if not lockstep.needed:
            yield True
            return
        able = speaker.model is model and can_keep_company(model, speaker.runs_always())
        if not lockstep.agree(able, what="clips"):
            self._step.recorder.absent("zero_shot/clips", "ranks cannot generate side by side with this sharding")
            yield False
            return

        def idle() -> None:
            with training_precision(self._step):
                speaker.idle()

        with in_company(model, lockstep, idle):
            yield True

    def _generated(self, samples: Sequence[_Sample]) -> Iterator[_Spoken]:
        until = self._began + self._log.max_seconds / 2
        for index, sample in enumerate(self._progress(samples, "generating clips")):
            left = until - time.monotonic()
            if left <= 0:
                self._out_of_time(sample.sample_id)
                continue
            with self._isolated(sample.sample_id, "generated"):
                limit = min(self._log.max_new_tokens, self._speaker.frames_for(sample.prompt, LENGTH_RATIO))
                speech = self._speaker.generate(sample.prompt, limit, left / (len(samples) - index), _SEED)
                yield sample, speech, self._speaker.teacher_forced(sample.prompt)

    def _heard(self, spoken: Sequence[_Spoken]) -> Iterator[MeasuredClip]:
        listener = self._log.listener(self._step.recorder)
        clips = []
        for one in spoken:
            with self._isolated(one[0].sample_id, "decoded"):
                clips.append(self._decoded(*one))
        for index, clip in enumerate(self._progress(clips, "listening to clips")):
            if time.monotonic() > self._began + self._log.max_seconds:
                self._out_of_time(clip.sample_id)
                continue
            with self._isolated(clip.sample_id, "measured"):
                other = clips[(index + 1) % len(clips)].target if len(clips) > 1 else None
                said = listener.transcript(clip)
                yield MeasuredClip(clip, said, dict(listener.measure(clip, said, other)))

    def _decoded(self, sample: _Sample, speech: Speech, teacher_forced: Tensor) -> HeardClip:
        prompt, known = sample.prompt, sample.metadata
        return HeardClip(
            sample_id=sample.sample_id,
            speaker=str(known.get("speaker") or ""),
            language=str(known.get("language") or ""),
            target_text=str(known.get("target_transcript") or ""),
            reference_text=str(known.get("ref_transcript") or ""),
            prompt=prompt,
            speech=speech,
            reference=self._own(known, "reference", prompt.reference),
            target=self._own(known, "target", prompt.target),
            generated=self._decode(speech.codes),
            teacher_forced=self._decode(teacher_forced),
        )

    def _own(self, known: Mapping[str, Any], kind: str, codes: Tensor | None) -> Clip:
        """The data set's clip; its codes decoded where there is no waveform."""
        waveforms = known.get(kind) or ()
        if waveforms:
            samples = np.asarray(waveforms[0].samples, dtype=np.float32)
            return Clip(samples, int(waveforms[0].sampling_rate))
        return self._decode(torch.empty(0, 0, dtype=torch.long) if codes is None else codes)

    def _decode(self, codes: Tensor) -> Clip:
        rate = _sampling_rate(self._codec)
        if not codes.numel():
            return Clip(np.zeros(0, dtype=np.float32), rate)
        values = _decoded(self._codec, codes[None].to(getattr(self._codec, "device", codes.device)))
        return Clip(values.float().cpu().numpy().reshape(-1), rate)

    def _show(self, clips: Sequence[MeasuredClip]) -> None:
        step, directory, heard = self._step, self._step.output_dir / "clips", self._step.sound.enabled
        before = self._log.before

        def show(_host: Mapping[str, Tensor], emit: Emitter) -> None:
            for record in shown(clips, before, with_media=heard):
                emit.record(record)
            if step.number == 0:  # a resumed training has not heard what was there before
                before.update(baseline(clips))

        if heard:
            own = [measured.clip for measured in clips]
            step.recorder.defer({}, lambda _host, _emit: save(own, directory, step.number, step.rank))
        if step.is_main:
            step.recorder.show({}, show)

    def _progress(self, items: Sequence[Any], doing: str) -> Iterable[Any]:
        shown = self._step.is_main and self._step.progress
        return tqdm(items, desc=doing, unit="clip", leave=False, disable=not shown)

    @contextlib.contextmanager
    def _isolated(self, sample_id: str, verb: str) -> Iterator[None]:
        """A clip that fails is left out, and said once with its traceback."""
        try:
            yield
        except Exception:  # noqa: BLE001  (said once, with its traceback)
            said = "clip %s could not be %s and is left out; training goes on"
            self._log.once.say(verb, said, sample_id, verb, level=logging.ERROR, traceback=True)

    def _out_of_time(self, sample_id: str) -> None:
        self._step.recorder.say_once(
            "clip:time",
            "no time is left for clip %s: an evaluation's may take %.0f s",
            sample_id,
            self._log.max_seconds,
        )


def _cut(speaker: Speaker, batches: Iterable[Mapping[str, Any]], count: int) -> Iterator[_Sample]:
    rows = ((batch, row) for batch in batches for row in range(len(batch.get("input_ids", ()))))
    for index, (batch, row) in enumerate(islice(rows, count)):
        prompt, metadata = speaker.prompt(batch, row), batch.get("metadata") or ()
        known = metadata[row] if row < len(metadata) else {}
        if prompt is not None:
            yield _Sample(prompt, known, str(known.get("sample_id") or f"sample {index}"))


def _sampling_rate(codec: Any) -> int:
    """Of a codec, whatever it calls it."""
    holders = (getattr(codec, "config", None), codec)
    known = (getattr(holder, name, None) for holder in holders for name in ("sample_rate", "sampling_rate"))
    return int(next(rate for rate in known if rate is not None))


def _decoded(codec: Any, codes: Tensor) -> Tensor:
    """What a codec makes of codes ``[1, C, frames]``, whatever it calls them, and whatever it wraps the sound in."""
    named = "audio_codes" in inspect.signature(codec.decode).parameters  # which is not DAC's first argument
    made = codec.decode(audio_codes=codes) if named else codec.decode(codes)
    values = getattr(made, "audio_values", made)
    return values if isinstance(values, Tensor) else values[0]
