"""Checks of a data set, once, before training: does every clip sound as it should, and belong to its sample?"""

from __future__ import annotations

import hashlib
import logging
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from telemetry.delivery.recorder import Emitter
from telemetry.health.history import History
from telemetry.health.rules import Level
from telemetry.health.setup_rules import DATA_RULES
from telemetry.instruments.asked import FirstStep
from telemetry.instruments.base import Step
from telemetry.measures.audio import (
    clipping_fraction,
    ends_abruptly,
    level_db,
    narrow_band,
    silence_fraction,
    spectral_flatness,
)
from telemetry.records import Scalar
from telemetry.speech.base import SpeakerEncoder, Transcriber
from telemetry.speech.text import character_errors, normalize

SECONDS = 60.0
VOICES, TRANSCRIPTS = 200, 12  # samples whose voices are compared, and whose words are listened to
NAMED = 3
TAG = "setup/data"
KINDS = ("reference", "target")

_SILENT_DB, _SILENT, _CLIPPED, _FLAT = -60.0, 0.95, 0.005, 0.15

logger = logging.getLogger(__name__)

Metadata = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a data set.

    Attributes:
        fault: what.
        evidence: the numbers that say so, with the names of samples.
        advice: what to do.
        failing: whether it is sure to spoil a training; else it is a warning.
    """

    fault: str
    evidence: str
    advice: str
    failing: bool


class DataReport(FirstStep):
    """What was found in a data set. As an instrument it shows that on the first due step, under ``setup/data/``.

    Attributes:
        values: tag → value.
        named: tag → the samples that a share is made of.
    """

    def __init__(self, values: Mapping[str, float], named: Mapping[str, str]) -> None:
        super().__init__()
        self.values, self.named = dict(values), dict(named)

    @property
    def findings(self) -> list[Finding]:
        """What is wrong, judged as ``setup/checks`` judges it; the worst first."""
        history = History()
        history.add(0, self._scalars())
        judged = [(rule, rule.judge(history, rule.limits)) for rule in DATA_RULES]
        bad = [(rule, verdict) for rule, verdict in judged if verdict is not None and verdict.level]
        return [
            Finding(rule.fault, verdict.evidence, rule.advice, verdict.level == Level.FAILING)
            for rule, verdict in sorted(bad, key=lambda pair: -pair[1].level)
        ]

    def finish(self, step: Step) -> None:
        """Show what was found."""
        if not self.looks or not step.is_main:
            return

        def build(_host: Any, emit: Emitter) -> None:
            for scalar in self._scalars():
                emit.record(scalar)

        step.recorder.show({}, build)

    def _scalars(self) -> list[Scalar]:
        return [Scalar(tag, value, self.named.get(tag, "")) for tag, value in self.values.items()]


@dataclass
class _Shares:
    """Of how many samples something was asked, and of which it holds."""

    asked: Counter[str] = field(default_factory=Counter)
    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, sample: str, holds: bool) -> None:
        self.asked[name] += 1
        if holds:
            self.found.setdefault(name, []).append(sample)

    def values(self) -> Iterator[tuple[str, float, str]]:
        for name, count in self.asked.items():
            found = self.found.get(name, [])
            yield name, len(found) / count, _samples(found)


def check_data(
    samples: Sequence[Metadata],
    speaker_encoder: SpeakerEncoder | None = None,
    transcriber: Transcriber | None = None,
    seconds: float = SECONDS,
    show_progress: bool = True,
) -> DataReport:
    """Go through a data set, and say what is found.

    Args:
        samples: what is known of each: the keys of :class:`telemetry.probes.forward.Microbatch`. In random order, as
            many are listened to as there is time for.
        speaker_encoder: compares voices, of 200 samples at most.
        transcriber: listens to a dozen samples.
        seconds: of wall time that listening may take.
        show_progress: whether there is a progress bar.
    """
    ids = [one.get("sample_id") for one in samples]
    names = [f"number {at}" if one is None else str(one) for at, one in enumerate(ids)]
    order = list(range(len(samples)))
    random.Random(0).shuffle(order)
    until = time.monotonic() + seconds
    shares, ratios, voices = _Shares(), [], _Voices(speaker_encoder)
    heard: dict[str, list[str]] = {kind: [] for kind in KINDS}
    words = _Words(transcriber)
    with tqdm(order, desc="checking the data", unit="sample", disable=not show_progress, dynamic_ncols=True) as bar:
        for at in bar:
            if time.monotonic() > until:
                break
            sample, name = samples[at], names[at]
            clips = {kind: clip for kind in KINDS if (clip := _clip(sample, kind, name)) is not None}
            for kind, (sound, rate, file_rate) in clips.items():
                _listen(shares, kind, name, sound, rate, file_rate)
                heard[kind].append(hashlib.sha256(sound.tobytes()).hexdigest())
            if clips.keys() == set(KINDS):
                shares.add("equal_fraction", name, heard["reference"][-1] == heard["target"][-1])
                ratios += [(ratio, name)] if (ratio := _rate_ratio(sample, clips)) is not None else []
                voices.add(name, sample, clips)
            words.add(name, sample, clips)
    looked_at = max(map(len, heard.values()))
    values = {"samples": float(len(samples)), "looked_at": float(looked_at)}
    named: dict[str, str] = {}
    for tag, value, said in (*shares.values(), *voices.values(), *words.values()):
        values[tag], named[tag] = value, said
    values |= dict(_commonest(samples, heard))
    if len(ratios) >= NAMED:
        values["rate_ratio"] = statistics.median(ratio for ratio, _ in ratios)
        farthest = sorted(ratios, key=lambda pair: -abs(math.log(pair[0])))[:NAMED]
        named["rate_ratio"] = f"farthest: samples {', '.join(name for _, name in farthest)}"
    return DataReport({f"{TAG}/{tag}": value for tag, value in values.items()},
                      {f"{TAG}/{tag}": said for tag, said in named.items()})  # fmt: skip


_Clip = tuple[np.ndarray, int, int]


def _clip(sample: Metadata, kind: str, name: str) -> _Clip | None:
    """The first clip of a kind: samples, their rate, and the file's; None where there is none that can be read."""
    source = next(iter(sample.get(kind) or ()), None)
    if source is None:
        return None
    try:
        sound, rate = np.asarray(source.samples, dtype=np.float32), int(source.sampling_rate)
        return (sound, rate, int(getattr(source, "file_sampling_rate", rate))) if len(sound) else None
    except Exception as error:  # noqa: BLE001  (one file must not hide the others)
        logger.warning("the %s audio of %s cannot be read, and is not checked: %s", kind, name, error)
        return None


def _listen(shares: _Shares, kind: str, name: str, sound: np.ndarray, rate: int, file_rate: int) -> None:
    silent = level_db(sound) < _SILENT_DB or (silence_fraction(sound, rate) or 0) > _SILENT
    shares.add(f"{kind}/silent_fraction", name, silent)
    shares.add(f"{kind}/clipped_fraction", name, (clipping_fraction(sound) or 0) > _CLIPPED)
    if silent:  # of whose spectrum nothing can be said
        return
    shares.add(f"{kind}/narrow_fraction", name, file_rate <= 8000 or narrow_band(sound, rate))
    shares.add(f"{kind}/noisy_fraction", name, spectral_flatness(sound, rate) > _FLAT)
    shares.add(f"{kind}/cut_fraction", name, ends_abruptly(sound, rate))


def _text(sample: Metadata, kind: str) -> str:
    said = sample.get("ref_transcript" if kind == "reference" else "target_transcript")
    return normalize(said) if isinstance(said, str) else ""


def _rate_ratio(sample: Metadata, clips: Mapping[str, _Clip]) -> float | None:
    """Characters a second of the target over those of the reference."""
    rates = []
    for kind in ("target", "reference"):
        sound, rate, _ = clips[kind]
        rates.append(len(_text(sample, kind)) / (len(sound) / rate))
    return rates[0] / rates[1] if all(rates) else None


def _commonest(samples: Sequence[Metadata], heard: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, float]]:
    """Shares of the commonest reference, of several speakers, and of the commonest target."""
    speakers = {one.get("speaker") for one in samples if one.get("speaker")}
    for kind in KINDS:
        if len(heard[kind]) > NAMED and (kind == "target" or len(speakers) > 1):
            count = Counter(heard[kind]).most_common(1)[0][1]
            yield f"commonest_{kind}_fraction", count / len(heard[kind])


class _Voices:
    """Compares the voice of targets with their own references and with those of others."""

    def __init__(self, encoder: SpeakerEncoder | None) -> None:
        self._encoder = encoder
        self._known: list[tuple[str, str, np.ndarray, np.ndarray]] = []

    def add(self, name: str, sample: Metadata, clips: Mapping[str, _Clip]) -> None:
        if self._encoder is None or len(self._known) >= VOICES:
            return
        try:
            target, reference = (self._encoder.embed(*clips[kind][:2]) for kind in ("target", "reference"))
        except ValueError:  # too short to tell
            return
        unit = [vector / max(float(np.linalg.norm(vector)), 1e-12) for vector in (target, reference)]
        self._known.append((name, str(sample.get("speaker") or name), unit[0], unit[1]))

    def values(self) -> Iterator[tuple[str, float, str]]:
        """Which share of other speakers' references is nearer to a target than its own: the mean, 0.5 by chance."""
        if len({speaker for _, speaker, _, _ in self._known}) < 2:
            return
        references = np.stack([reference for *_, reference in self._known])
        speakers = np.array([speaker for _, speaker, _, _ in self._known])
        shares = []
        for at, (name, speaker, target, _) in enumerate(self._known):
            near = references @ target
            shares.append((float(np.mean(near[speakers != speaker] > near[at])), name))
        yield "other_voices_nearer", *_mean_and_worst(shares)


class _Words:
    """Listens to a few clips: are their words nearer to their own text than to another's?"""

    def __init__(self, transcriber: Transcriber | None) -> None:
        self._transcriber = transcriber
        self._heard: dict[str, list[tuple[str, str, str]]] = {kind: [] for kind in KINDS}

    def add(self, name: str, sample: Metadata, clips: Mapping[str, _Clip]) -> None:
        for kind, (sound, rate, _) in clips.items():
            text = _text(sample, kind)
            if self._transcriber is None or not text or len(self._heard[kind]) >= TRANSCRIPTS:
                continue
            try:
                said = self._transcriber.transcribe(sound, rate, sample.get("language"))
            except ValueError:  # a language that it does not know
                continue
            self._heard[kind].append((name, said, text))

    def values(self) -> Iterator[tuple[str, float, str]]:
        """Which share of others' texts is nearer to what a clip says than its own, by characters: 0.5 by chance."""
        for kind, heard in self._heard.items():
            texts = {text for *_, text in heard}
            if len(texts) <= NAMED:
                continue
            shares = []
            for name, said, text in heard:
                own, others = _errors(said, text), [_errors(said, other) for other in texts - {text}]
                nearer = [(error < own) + (error == own) / 2 for error in others]
                shares.append((statistics.mean(nearer), name))
            yield f"{kind}/other_texts_nearer", *_mean_and_worst(shares)


def _errors(said: str, text: str) -> float:
    errors = character_errors(said, text)
    return errors.rate if errors is not None else 1.0


def _mean_and_worst(shares: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The mean, and the samples of which at least half is nearer."""
    return statistics.mean(share for share, _ in shares), _samples([name for share, name in shares if share >= 0.5])


def _samples(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"samples {', '.join(names[:NAMED])}{more}" if names else ""
