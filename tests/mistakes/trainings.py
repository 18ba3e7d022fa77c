"""A tiny Higgs Audio v2 fine-tuning on the demonstration's data, and what telemetry finds in it."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trainer as _trainer  # noqa: F401  (first: repairs what transformers imports)

# isort: split
import numpy as np
import soundfile
import torch
from torch import nn
from transformers import TrainingArguments, set_seed

from telemetry import DataReport, StrategicTelemetry, check_data
from telemetry.backends.memory import MemoryBackend
from telemetry.health import RULES
from telemetry.records import Scalar
from telemetry.speech.loading import load_speaker_encoder, load_transcriber
from trainer.chatml import Sample, load_samples
from trainer.code_cache import CodeCache
from trainer.collator import VoiceCloningCollator
from trainer.dataset import Example, VoiceCloningDataset
from trainer.demo.prepare import prepare
from trainer.higgs_trainer import HiggsAudioTrainer
from trainer.model import load_model
from trainer.processing import codec_of, load_processor

BASE_STEPS = 60
STEPS = 40
DUE = 5
EVALUATED = 20
LEARNING_RATE = 5e-4

Batch = dict[str, Any]


def as_it_is(anything: Any) -> Any:
    """Change nothing."""
    return anything


@dataclass(frozen=True)
class Planted:
    """A training, and what is wrong with it.

    Attributes:
        name: of the mistake, or of a healthy training.
        rules: parts of tags, ``health/<rule>`` or ``setup/<check>``, that name its cause; none for a healthy one.
        kind: what people would say that it is about.
        samples: what becomes of the data set's samples.
        examples: what becomes of those of a batch, before they are padded.
        batch: what becomes of a batch.
        trainer: what becomes of the trainer before it trains: model, optimizer, loss.
        kind_of_trainer: its class.
        arguments: of ``TrainingArguments``.
        fresh: whether the model begins untrained.
        model: which one: ``higgs``, ``csm``, ``codec_tokens``, or ``text`` on TRL's trainer.
    """

    name: str
    rules: tuple[str, ...] = ()
    kind: str = ""
    samples: Callable[[list[Sample]], list[Sample]] = as_it_is
    examples: Callable[[list[Example]], list[Example]] = as_it_is
    batch: Callable[[Batch], Batch] = as_it_is
    trainer: Callable[[HiggsAudioTrainer], None] = as_it_is
    kind_of_trainer: type[HiggsAudioTrainer] = HiggsAudioTrainer
    arguments: Mapping[str, Any] = field(default_factory=dict)
    fresh: bool = False
    model: str = "higgs"


@dataclass(frozen=True)
class Finding:
    """A rule or check that has fired: its tag, and the first step at which it did."""

    tag: str
    step: int
    level: int


@dataclass(frozen=True)
class Outcome:
    """What telemetry has found, and what a loss curve shows."""

    findings: list[Finding]
    losses: dict[int, float]
    error: str = ""

    def named(self, planted: Planted) -> Finding | None:
        """The first finding that names the right cause."""
        return next((one for one in self.findings if one.tag in planted.rules), None)


@functools.cache
def laboratory() -> Laboratory:
    """The demonstration's parts, prepared once in a process."""
    return Laboratory(Path(tempfile.mkdtemp(prefix="mistakes-")))


@functools.cache
def laboratory_of(model: str) -> Any:
    """Where a model's trainings are made."""
    if model == "higgs":
        return laboratory()
    from mistakes.speech_models import SpeechLaboratory, TextLaboratory

    return TextLaboratory() if model == "text" else SpeechLaboratory(model)


class Laboratory:
    """Everything that trainings share: data, codes, processor, and a base model that has been trained a little."""

    options: Mapping[str, Any] = {"zero_shot": {"max_new_tokens": 120}}
    family = None

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.demo = prepare(directory, show_progress=False)
        self.processor: Any = load_processor(str(self.demo.model))
        self.samples = load_samples(self.demo.train_file, show_progress=False)
        self.eval_samples = load_samples(self.demo.eval_file, show_progress=False)
        every = self.samples + self.eval_samples
        paths = [path for one in every for path in (*one.references, *one.targets)]
        self._cache = CodeCache(codec_of(self.processor), directory / "codes")
        self.codes = self._cache.encode(paths)
        self._untrained: Any = load_model(str(self.demo.model))

    def sound(self, path: Path, name: str, change: Callable[[np.ndarray, int], tuple[np.ndarray, int]]) -> Path:
        """A clip's sound changed, as a file of its own whose codes are known."""
        made = self.directory / name / path.name
        if made not in self.codes:
            made.parent.mkdir(exist_ok=True)
            samples, rate = soundfile.read(path, dtype="float32")
            soundfile.write(made, *change(samples, rate))
            with quiet():
                self.codes |= self._cache.encode([made])
        return made

    @functools.cached_property
    def _listeners(self) -> tuple[Any, Any]:
        return load_speaker_encoder("resemblyzer"), load_transcriber("pocketsphinx")

    @functools.cached_property
    def _unchanged(self) -> DataReport:
        return self.report(list(self.samples))

    def report(self, samples: list[Sample]) -> DataReport:
        """What is found in the data before training."""
        dataset = VoiceCloningDataset(samples, self.processor, self.codes)
        known = [dataset.metadata(at) for at in range(len(dataset))]
        return check_data(known, *self._listeners, show_progress=False)

    def instruments(self, planted: Planted) -> list[Any]:
        """Beside those of telemetry's own."""
        if planted.samples is as_it_is:
            return [DataReport(self._unchanged.values, self._unchanged.named)]
        return [self.report(planted.samples(list(self.samples)))]

    @functools.cached_property
    def base(self) -> nn.Module:
        """A model after some healthy steps."""
        healthy = self.trainer(Planted("base", fresh=True, arguments={"max_steps": BASE_STEPS, "seed": 1}), [])
        with quiet():
            healthy.train()
        return healthy.model

    def trainer(self, planted: Planted, callbacks: Sequence[Any]) -> HiggsAudioTrainer:
        """A trainer that makes the mistake."""
        set_seed(0)
        model = copy.deepcopy(self._untrained if planted.fresh else self.base)
        collator = VoiceCloningCollator(self.processor.tokenizer.pad_token_id, self.processor.audio_stream_eos_id)
        made = planted.kind_of_trainer(
            model=model,
            args=arguments(Path(tempfile.mkdtemp(prefix="mistake-")), **planted.arguments),
            data_collator=lambda examples: planted.batch(collator(planted.examples(list(examples)))),
            train_dataset=VoiceCloningDataset(planted.samples(list(self.samples)), self.processor, self.codes),
            eval_dataset=VoiceCloningDataset(self.eval_samples[:8], self.processor, self.codes),
            processing_class=self.processor,
            callbacks=list(callbacks),
        )
        planted.trainer(made)
        return made


def arguments(directory: Path, **given: Any) -> TrainingArguments:
    """Of a short training on the CPU."""
    usual = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": EVALUATED,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
        "label_names": ["labels", "audio_labels"],
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(directory), **{**usual, **given})


def observe(planted: Planted, clips: int = 2, listened: bool = True) -> Outcome:
    """Train, and return what telemetry has found of it; ``listened``: after its data were gone through."""
    backend = MemoryBackend()
    where = laboratory_of(planted.model)
    options = {**where.options, "zero_shot": {"clips": clips, **where.options.get("zero_shot", {})}}
    more = where.instruments(planted) if listened and hasattr(where, "instruments") else ()
    watching = StrategicTelemetry(
        logging_steps=DUE, backends=[backend], options=options, family=where.family, instruments=more
    )
    made = where.trainer(planted, [watching])
    error = ""
    with quiet():
        try:
            made.train()
        except Exception as raised:  # noqa: BLE001  (a mistake may end a training)
            error = f"{type(raised).__name__}: {raised}"
    return Outcome(findings(backend), backend.scalars("train/loss"), error)


def findings(backend: MemoryBackend) -> list[Finding]:
    """Every verdict that is not well, at the first step at which it is as bad as it gets to be called."""
    found, known = [], {rule.tag for rule in RULES}
    for tag, held in backend.records.items():
        if tag in known:
            bad = [(step, one.value) for step, one in held if isinstance(one, Scalar) and one.value > 0]
            if bad:
                found.append(Finding(tag, bad[0][0], int(max(value for _, value in bad))))
    return sorted(found, key=lambda one: (one.step, -one.level))


@contextlib.contextmanager
def quiet() -> Any:
    """Keep what trainings say to themselves."""
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def supervised_audio(batch: Batch) -> torch.Tensor:
    """bool ``[batch, frames]``: frames of target clips."""
    return (batch["audio_labels"] != -100).any(-1)
