"""On the training thread telemetry launches device work and waits for none of it, and takes no random number."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import speech_models
from support.batches import Voices
from support.references import differing, measured_records
from support.speech_models import taught
from support.steps import Steps, gradients_of
from support.waiting import Watch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from telemetry.backends.memory import MemoryBackend
from telemetry.callbacks.questions import COMPONENTS
from telemetry.callbacks.trainer import StrategicCallback
from telemetry.families import HiggsAudioV2Family, Stream, causal_lm, find_family
from telemetry.probes.forward import watched_aside


def watched(callback: StrategicCallback, watch: Watch) -> StrategicCallback:
    """A callback whose measures run under ``watch``."""

    def under(measure: Any) -> Any:
        def measured(*args: Any) -> None:
            with watch:
                measure(*args)

        return measured

    for instrument in callback.instruments:
        for verb in ("inputs", "outputs", "gradients", "finish"):
            setattr(instrument, verb, under(getattr(instrument, verb)))
    return callback


def batches(voices: Voices) -> list[dict[str, Tensor]]:
    left = voices.pad([voices.conversation(reference=None, seed=3), voices.conversation(target=9)], left=True)
    return [voices.batch(voices.pad([voices.conversation(), voices.conversation(target=None)]), 2), voices.batch(left)]


@pytest.mark.parametrize("name", COMPONENTS)
def test_no_measure_waits_for_the_device(name: str, higgs: Any, voices: Voices, tmp_path: Path) -> None:
    watch = Watch()
    backend = MemoryBackend()
    forward = higgs.forward

    def unwatched(**inputs: Any) -> Any:
        with watch.asleep():
            return forward(**inputs)

    higgs.forward = unwatched
    with Steps(higgs, [watched(COMPONENTS[name](1, [backend]), watch)], tmp_path, voices.tokenizer) as run:
        run.step(batches(voices))
    assert measured_records(backend)  # it did measure
    assert watch.operations
    assert watch.waits == []


def test_reading_a_batch_waits_for_nothing(higgs: Any, voices: Voices) -> None:
    family = HiggsAudioV2Family(higgs)
    for inputs in batches(voices):
        with Watch() as watch:
            family.view(inputs)
        assert watch.operations
        assert watch.waits == []


@pytest.mark.parametrize("sample", [4, 1024])
def test_reading_a_fused_loss_waits_for_nothing(
    sample: int, llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal_lm, "SAMPLE", sample)
    watch, backend, forward, streams = Watch(), MemoryBackend(), llama.forward, causal_lm.CausalLMFamily.streams

    def fused(**inputs: Any) -> Any:
        with watch.asleep():
            return CausalLMOutputWithPast(loss=forward(**inputs).loss)

    def read(*args: Any) -> Any:
        with watch:
            return list(streams(*args))

    monkeypatch.setattr(causal_lm.CausalLMFamily, "streams", read)
    llama.forward = fused
    ids = torch.arange(1, 13).view(2, 6)
    callback = watched(COMPONENTS["outputs"](1, [backend]), watch)
    with Steps(llama, [callback], tmp_path, loss=lambda model, batch: model(**batch).loss) as run:
        run.step([{"input_ids": ids, "labels": ids}])
    assert backend.scalars("outputs/loss/text")
    assert watch.operations
    assert watch.waits == []


SPEECH: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Tensor]]]] = {
    "csm, waveforms": (
        speech_models.csm,
        lambda: speech_models.csm_waveforms(
            [(3, 4, taught(4)), (2, 3, taught(3, 2))], [(5, 2, [-100] * 3), (2, 5, taught(5))]
        ),
    ),
    "csm, codes": (speech_models.csm, lambda: speech_models.csm_codes((2, 3), (0, 5))),
    "dia": (speech_models.dia, lambda: speech_models.dia_batch((4, 2, 3), (6, 0, 4))),
    "moshi": (speech_models.moshi, lambda: speech_models.moshi_batch(5, 3)),
}


@pytest.mark.parametrize("kind", SPEECH)
def test_reading_what_other_speech_models_predict_waits_for_nothing(kind: str) -> None:
    make, batch = SPEECH[kind]
    model, inputs = make(), {**batch(), "num_items_in_batch": torch.tensor(9)}
    family = find_family(model)
    assert family is not None
    with torch.no_grad(), watched_aside(family, None) as seen:
        outputs = model(**inputs)
        with Watch() as watch:
            family.view(inputs)
            declared = list(family.streams(inputs, outputs, seen))
            streams = [one for one in declared if isinstance(one, Stream)]
            assert [one.fault() for one in streams] == [""] * (1 if kind == "dia" else 2)
            assert [one.predicted.shape for one in streams]
    assert watch.operations
    assert watch.waits == []


WAYS_OF_WAITING = {
    "boolean indexing": lambda values, mask: values[mask],
    "boolean assignment": lambda values, mask: values.clone().__setitem__(mask, values[:2]),
    "item": lambda values, mask: values.sum().item(),
    "float": lambda values, mask: float(values.sum()),
    "bool": lambda values, mask: bool(mask.any()),
    "nonzero": lambda values, mask: mask.nonzero(),
    "masked_select": lambda values, mask: values.masked_select(mask),
    "unique": lambda values, mask: values.unique(),
    "equal": lambda values, mask: torch.equal(values, values),
    "tolist": lambda values, mask: values.tolist(),
    "numpy": lambda values, mask: values.numpy(),
    "array": lambda values, mask: np.asarray(values),
    "cpu": lambda values, mask: values.cpu(),
}


@pytest.mark.parametrize("way", WAYS_OF_WAITING)
def test_the_watch_sees_what_waits(way: str) -> None:
    values, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    read = WAYS_OF_WAITING[way]
    with Watch() as watch:
        values.sum()
    assert watch.waits == []
    with Watch() as watch:
        read(values, mask)
    assert watch.waits
    read(values, mask)
    assert len(watch.waits) <= 2  # what is read outside is nobody's business


@pytest.mark.parametrize("name", COMPONENTS)
def test_no_random_number_is_taken_and_no_mode_changed(name: str, higgs: Any, voices: Voices, tmp_path: Path) -> None:
    with Steps(higgs, [COMPONENTS[name](1, [MemoryBackend()])], tmp_path, voices.tokenizer) as run:
        before = torch.get_rng_state(), pickle.dumps(np.random.get_state()), random.getstate()  # noqa: NPY002  # the one watched
        modes = [module.training for module in higgs.modules()]
        run.step(batches(voices))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert pickle.dumps(np.random.get_state()) == before[1]  # noqa: NPY002
    assert random.getstate() == before[2]
    assert [module.training for module in higgs.modules()] == modes


def test_loss_and_gradients_are_the_same_bits_with_everything_watching(
    make_higgs: Any, voices: Voices, tmp_path: Path
) -> None:
    gradients = []
    for kinds in ([], list(COMPONENTS.values())):
        model = make_higgs()
        with Steps(model, [kind(1, [MemoryBackend()]) for kind in kinds], tmp_path, voices.tokenizer) as run:
            loss = run.step(batches(voices))
        gradients.append((loss, gradients_of(model)))
    (loss, plain), (watched_loss, seen) = gradients
    assert watched_loss == loss
    assert differing(plain, seen) == []
