"""``zero_shot/conditioning/``: about zero for a model that ignores references, clearly above for one that uses them."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.batches import IGNORED, Sample, Voices, with_reference_of
from support.steps import Steps
from torch import Tensor
from transformers import (
    HiggsAudioV2Config,
    HiggsAudioV2ForConditionalGeneration,
)

from telemetry.backends.memory import MemoryBackend
from telemetry.callbacks.questions import ZeroShotVerificationLoggerCallback

SECTION = "zero_shot/conditioning"
VOICES = 6
STEPS = 60
Metadata = Sequence[Mapping[str, Any]]


def measured(
    model: Any,
    directory: Path,
    microbatches: Sequence[Mapping[str, Tensor]],
    metadata: Sequence[Metadata] = (),
    every: int = 1,
    steps: int = 1,
) -> MemoryBackend:
    """What the callback shows of some steps, each of the same microbatches."""
    backend = MemoryBackend()
    callback = ZeroShotVerificationLoggerCallback(1, [backend], conditioning_every=every)
    told = [{"metadata": rows} for rows in metadata] or [{}] * len(microbatches)
    with Steps(model, [callback], directory) as run:
        for _ in range(steps):
            run.step([{**batch, **rows} for batch, rows in zip(microbatches, told, strict=True)])
    return backend


def named(*speakers: str | None) -> Metadata:
    return [{"sample_id": str(row), "speaker": speaker} for row, speaker in enumerate(speakers)]


def scalars_of(backend: MemoryBackend, step: int, section: str) -> dict[str, float]:
    """Tag behind the section → value."""
    found = {tag: backend.scalars(tag).get(step) for tag in backend.tags() if tag.startswith(f"{section}/")}
    return {tag.removeprefix(f"{section}/"): value for tag, value in found.items() if value is not None}


def gains_of(backend: MemoryBackend) -> dict[str, float]:
    """Tag behind the section → value at step 1."""
    return scalars_of(backend, 1, SECTION)


# -- known answers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task(tokenizer: Any, higgs_config: HiggsAudioV2Config) -> Voices:
    """Two codebooks of six codes: a voice is one code, over and over."""
    values = {**higgs_config.to_dict(), "hidden_size": 32, "intermediate_size": 32, "num_codebooks": 2}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 4, "codebook_size": VOICES + 2}
    values |= {"audio_stream_bos_id": VOICES, "audio_stream_eos_id": VOICES + 1}
    return Voices(tokenizer, HiggsAudioV2Config(**values))


def in_voice(sample: Sample, given: int, asked: int) -> Sample:
    """The sample with one code for the reference and one for the target."""
    spoken: Sample = []
    for position in sample:
        if position.codes is not None and position.code_labels is not None:
            voice = given if position.kind == "reference" else asked
            codes = tuple(voice if code < VOICES else code for code in position.codes)
            labels = zip(position.code_labels, codes, strict=True)
            position = replace(
                position,
                codes=codes,
                code_labels=tuple(IGNORED if label == IGNORED else code for label, code in labels),
            )
        spoken.append(position)
    return spoken


def task_batches(voices: Voices, seed: int, matching: bool) -> Iterator[dict[str, Tensor]]:
    """Batches of samples whose target speaks with the voice of the reference, or with any."""
    generator = torch.Generator().manual_seed(seed)
    sample = [
        *voices.spoken(voices.clip(2, 0)),
        *voices.text("say"),
        *voices.spoken(voices.clip(1, 1, target=True, ends=False)),
    ]
    while True:
        asked = torch.randint(VOICES, (8,), generator=generator).tolist()
        given = asked if matching else torch.randint(VOICES, (8,), generator=generator).tolist()
        yield voices.batch([in_voice(sample, *pair) for pair in zip(given, asked, strict=True)])


def trained(voices: Voices, matching: bool) -> HiggsAudioV2ForConditionalGeneration:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = HiggsAudioV2ForConditionalGeneration(voices.config, use_text_head=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _, batch in zip(range(STEPS), task_batches(voices, 1, matching)):  # noqa: B905
        model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def gains_on_fresh_batches(voices: Voices, matching: bool, directory: Path) -> dict[str, list[float]]:
    model = trained(voices, matching)
    found = defaultdict(list)
    for _, batch in zip(range(5), task_batches(voices, 2, matching)):  # noqa: B905
        for tag, value in gains_of(measured(model, directory, [batch])).items():
            found[tag].append(value)
    return found


def test_a_model_trained_on_matching_references_gains_from_them(task: Voices, tmp_path: Path) -> None:
    found = gains_on_fresh_batches(task, True, tmp_path)
    for tag in ("gain", "gain_without", "codebook_0/gain"):
        assert min(found[tag]) > 1.0, tag
    # It says the same code one frame later, and can read it off the first codebook.
    assert max(found["codebook_1/gain"]) < 0.2 * min(found["codebook_0/gain"])
    assert max(found["loss_own"]) < 0.2
    # Another voice is worse than none: the model is sure of it.
    assert min(found["loss_swapped"]) > max(found["loss_none"])


def test_a_model_trained_on_shuffled_references_gains_nothing(task: Voices, tmp_path: Path) -> None:
    found = gains_on_fresh_batches(task, False, tmp_path)
    for tag in ("gain", "gain_without", "codebook_0/gain", "codebook_1/gain"):
        values = torch.tensor(found[tag])
        assert values.abs().max() < 0.02, tag
        assert values.mean().abs() < 3 * values.std() / math.sqrt(len(values)) + 1e-3, tag
        assert values.abs().max() > 0, tag
    assert min(found["loss_own"]) > 0.5


# -- against a slow reference ------------------------------------------------------------------------------------------


def code_losses(model: Any, voices: Voices, sample: Sample, hides: bool = False) -> list[list[float]]:
    """By codebook, the loss of every supervised code of one sample, which is run by itself."""
    inputs = voices.batch([sample])
    if hides:
        inputs["attention_mask"] = torch.tensor([[int(position.kind != "reference") for position in sample]])
    with torch.no_grad():
        logits = model.eval()(**{name: value for name, value in inputs.items() if "labels" not in name}).logits[0]
    logits = logits.double().reshape(len(sample), voices.config.num_codebooks, -1)
    return [
        [
            -torch.log_softmax(logits[at - 1, k], dim=-1)[position.code_labels[k]].item()
            for at, position in enumerate(sample)
            if position.code_labels is not None and position.code_labels[k] != IGNORED
        ]
        for k in range(voices.config.num_codebooks)
    ]


def slow_values(
    model: Any, voices: Voices, samples: Sequence[Sample], partners: Sequence[int | None]
) -> dict[str, float]:
    by_name: dict[str, list[list[float]]] = {}
    for name in ("own", "swapped", "none"):
        streams: list[list[float]] = [[] for _ in range(voices.config.num_codebooks)]
        for sample, partner in zip(samples, partners, strict=True):
            if partner is not None:
                given = with_reference_of(sample, samples[partner], voices.config) if name == "swapped" else sample
                for stream, losses in zip(streams, code_losses(model, voices, given, name == "none"), strict=True):
                    stream += losses
        by_name[name] = streams
    means = {name: sum(map(sum, streams)) / sum(map(len, streams)) for name, streams in by_name.items()}
    of_codebook = {name: [sum(stream) / len(stream) for stream in streams] for name, streams in by_name.items()}
    values = {f"loss_{name}": mean for name, mean in means.items()}
    values |= {"gain": means["swapped"] - means["own"], "gain_without": means["none"] - means["own"]}
    return values | {
        f"codebook_{k}/gain": of_codebook["swapped"][k] - of_codebook["own"][k]
        for k in range(voices.config.num_codebooks)
    }


def slow_text_gain(model: Any, voices: Voices, samples: Sequence[Sample], partners: Sequence[int | None]) -> float:
    """Every sample that counts, run by itself with the next one's supervised words, again and again, in its own."""
    losses: dict[bool, list[float]] = {True: [], False: []}
    for number, (sample, partner) in enumerate(zip(samples, partners, strict=True)):
        if partner is None:
            continue
        following = samples[(number + 1) % len(samples)]
        words = itertools.cycle([one.token for one in following if one.kind == "text" and one.label != IGNORED])
        other = [
            replace(one, token=next(words)) if one.kind == "text" and one.label != IGNORED else one for one in sample
        ]
        for own, given in ((True, sample), (False, other)):
            losses[own] += [loss for stream in code_losses(model, voices, given) for loss in stream]
    return math.fsum(losses[False]) / len(losses[False]) - math.fsum(losses[True]) / len(losses[True])


def uneven(voices: Voices) -> list[Sample]:
    return [
        voices.conversation(4, target=3, seed=1),
        voices.conversation(7, target=6, seed=2, words="grey ferry"),
        voices.conversation(None, target=4, seed=3),
        voices.conversation(2, target=5, seed=4, words="boat"),
    ]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    ("speakers", "partners"),
    [
        ([], [1, 3, None, 0]),
        (["ann", "bob", "bob", "bob"], [1, 0, None, 0]),
        (["ann", "ann", "bob", None], [3, 3, None, 0]),
    ],
)
def test_every_value_is_that_of_samples_run_one_by_one(
    higgs: Any, voices: Voices, tmp_path: Path, left: bool, speakers: list[str], partners: list[int | None]
) -> None:
    samples = uneven(voices)
    batch = voices.batch(voices.pad(samples, left=left), frame_padding=1)
    if left:  # as samples alone are counted
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    backend = measured(higgs, tmp_path, [batch], [named(*speakers)] if speakers else ())
    found = gains_of(backend)
    expected = slow_values(higgs, voices, samples, partners)
    assert found.keys() == expected.keys()
    words = slow_text_gain(higgs, voices, samples, partners)
    assert backend.scalars("zero_shot/text_gain")[1] == pytest.approx(words, abs=2e-5)
    assert abs(words) > 1e-4
    assert found == pytest.approx(expected, abs=2e-5)
    assert abs(found["gain"]) > 1e-3


def test_samples_that_cannot_be_swapped_count_in_no_loss(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    """The first has the codes of the second and the speaker of the third."""
    samples = [voices.conversation(4, target=row + 3, seed=seed) for row, seed in enumerate((1, 1, 2))]
    batch = voices.batch(voices.pad(samples))
    found = gains_of(measured(higgs, tmp_path, [batch], [named("ann", None, "ann")]))
    assert found == pytest.approx(slow_values(higgs, voices, samples, [None, 2, 1]), abs=2e-5)


def test_the_last_microbatch_is_measured(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    batches = [voices.batch(voices.pad([voices.conversation(seed=s), voices.conversation(seed=s + 1)])) for s in (1, 5)]
    both, last = measured(higgs, tmp_path, batches), measured(higgs, tmp_path, batches[1:])
    assert gains_of(both) == gains_of(last)
    assert gains_of(both) != gains_of(measured(higgs, tmp_path, batches[:1]))


def test_gradient_checkpointing_dropout_and_text_labels_do_not_matter(
    make_higgs: Callable[..., Any], voices: Voices, tmp_path: Path
) -> None:
    batch = voices.batch(voices.pad(uneven(voices)))
    expected = gains_of(measured(make_higgs(), tmp_path, [batch]))
    noisy = make_higgs().train()
    noisy.config.attention_dropout = 0.5
    for layer in noisy.model.layers:
        layer.self_attn.attention_dropout = 0.5
    noisy.gradient_checkpointing_enable({"use_reentrant": False})
    assert gains_of(measured(noisy, tmp_path, [batch])) == expected


# -- when --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4, 5]), (2, [1, 3, 5]), (5, [1]), (0, [])])
def test_every_so_many_due_steps(higgs: Any, voices: Voices, tmp_path: Path, every: int, steps: list[int]) -> None:
    batch = voices.batch(voices.pad(uneven(voices)))
    backend = measured(higgs, tmp_path, [batch], every=every, steps=5)
    assert list(backend.scalars(f"{SECTION}/gain")) == steps


def test_a_negative_cadence_is_refused() -> None:
    with pytest.raises(ValueError, match="conditioning_every"):
        ZeroShotVerificationLoggerCallback(conditioning_every=-1)


# -- absent ------------------------------------------------------------------------------------------------------------

ABSENT: dict[str, tuple[Callable[[Voices], Sequence[Sample]], Sequence[str | None], str]] = {
    "one sample": (lambda v: [v.conversation()], [], "a batch of one sample"),
    "one speaker": (
        lambda v: [v.conversation(seed=1), v.conversation(seed=2)],
        ["ann", "ann"],
        "all samples of the batch have one speaker",
    ),
    "no reference": (
        lambda v: [v.conversation(None, seed=1), v.conversation(None, seed=2)],
        ["ann", "bob"],
        "no sample of the batch has reference audio",
    ),
    "one voice": (
        lambda v: [v.conversation(seed=1), v.conversation(seed=1, words="boat")],
        [],
        "no sample of the batch has another speaker's reference",
    ),
    "one reference": (
        lambda v: [v.conversation(seed=1), v.conversation(None, seed=2)],
        ["ann", "bob"],
        "no sample of the batch has another speaker's reference",
    ),
}


@pytest.mark.parametrize("name", ABSENT)
def test_what_cannot_be_swapped_is_absent_and_said_once(
    higgs: Any, voices: Voices, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture, name: str
) -> None:
    make, speakers, reason = ABSENT[name]
    batch = voices.batch(voices.pad(make(voices)))
    backend = measured(higgs, tmp_path, [batch], [named(*speakers)] if speakers else (), steps=2)
    assert not [tag for tag in backend.tags() if tag.startswith(SECTION)]
    said = [record.message for record in telemetry_log.records if SECTION in record.message]
    assert len(said) == 1
    assert said[0].startswith(f"no {SECTION}/gain: {reason}")
    assert "failed" not in telemetry_log.text


def test_models_without_audio_are_said(llama: Any, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture) -> None:
    backend = MemoryBackend()
    callback = ZeroShotVerificationLoggerCallback(1, [backend], conditioning_every=1)
    with Steps(llama, [callback], tmp_path) as run, run.taken():
        llama(input_ids=torch.tensor([[1, 2], [3, 4]]))
    assert "references of this kind of model cannot be changed" in telemetry_log.text
    assert "failed" not in telemetry_log.text


def test_it_is_said_how_speakers_were_told_apart(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    batch = voices.batch(voices.pad(uneven(voices)))
    notes = []
    for metadata in ([named("a", "b", "c", "d")], []):
        backend = measured(higgs, tmp_path, [batch], metadata)
        [(_, record)] = backend.records[f"{SECTION}/gain"]
        notes.append(record.note)  # type: ignore[union-attr]
    assert notes[0] == ""
    assert "does not name all speakers" in notes[1]


def test_a_loss_that_is_not_finite_is_shown_as_that(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    with torch.no_grad():
        higgs.audio_lm_head.weight[0] = math.nan
    backend = measured(higgs, tmp_path, [voices.batch(voices.pad(uneven(voices)))])
    assert math.isnan(backend.scalars(f"{SECTION}/gain")[1])
    assert math.isfinite(backend.scalars(f"{SECTION}/codebook_1/gain")[1])


# -- evaluation --------------------------------------------------------------------------------------------------------


class Reading:
    """An evaluation loader that draws random numbers, as shuffling ones and augmenting data sets do."""

    def __init__(self, batches: Sequence[Mapping[str, Any]]) -> None:
        self.batches = batches
        self.read = 0

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self.batches:
            torch.rand(3)
            self.read += 1
            yield batch


def evaluate(model: Any, directory: Path, loader: Any, every: int = 5) -> MemoryBackend:
    """The first look, before training, and the one after an evaluation at step 3."""
    backend = MemoryBackend()
    callback = ZeroShotVerificationLoggerCallback(100, [backend], conditioning_every=every)
    with Steps(model, [callback], directory, eval_dataloader=loader) as run:
        with run.taken():
            pass
        run.state.global_step = 3
        run.tell("on_evaluate")
    return backend


def test_every_evaluation_measures_its_first_batch(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    samples = uneven(voices)
    first = {**voices.batch(voices.pad(samples)), "metadata": named("ann", "bob", "bob", "bob")}
    loader = Reading([first, {"input_ids": torch.zeros(1, 1)}])
    before = torch.get_rng_state()
    modes = [module.training for module in higgs.train().modules()]
    backend = evaluate(higgs, tmp_path, loader)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in higgs.modules()] == modes
    assert loader.read == 2  # one batch each time
    expected = slow_values(higgs, voices, samples, [1, 0, None, 0])
    for step in (0, 3):
        assert scalars_of(backend, step, f"{SECTION}/eval") == pytest.approx(expected, abs=2e-5)
    assert not backend.scalars(f"{SECTION}/gain")


@pytest.mark.parametrize("batches", [[], [{"labels": torch.zeros(2, 3)}]])
def test_evaluations_without_audio_are_said(
    higgs: Any, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture, batches: list[Any]
) -> None:
    backend = evaluate(higgs, tmp_path, batches)
    assert not [tag for tag in backend.tags() if tag.startswith(SECTION)]
    assert telemetry_log.text.count(f"no {SECTION}/eval/gain: the batch has no audio") == 1
    assert "failed" not in telemetry_log.text


def test_turned_off_it_reads_nothing(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    loader = Reading([voices.batch(voices.pad(uneven(voices)))])
    backend = evaluate(higgs, tmp_path, loader, every=0)
    assert not [tag for tag in backend.tags() if tag.startswith(SECTION)]
