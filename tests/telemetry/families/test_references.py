"""Swapped and hidden references, against samples that are built with the other voice, and without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.batches import Position, Sample, Voices, reference_codes, with_reference_of
from support.waiting import Watch
from torch import Tensor

from telemetry.families import AudioView, HiggsAudioV2Family, find_family
from telemetry.families.references import swap_references

LENGTHS = (4, 7, 2)
NOBODY = [None, None, None]


def samples_of(voices: Voices, lengths: tuple[int | None, ...] = LENGTHS) -> list[Sample]:
    words = ("ship", "boat", "grey ferry")
    return [
        voices.conversation(length, target=3 + row, seed=row, words=words[row]) for row, length in enumerate(lengths)
    ]


def audio_of(model: Any, inputs: dict[str, Tensor]) -> AudioView:
    view = HiggsAudioV2Family(model).view(inputs)
    assert view is not None
    assert view.audio is not None
    return view.audio


def frames_of(inputs: dict[str, Any]) -> Tensor:
    return inputs["audio_input_ids"] * inputs["audio_input_ids_mask"].unsqueeze(-1)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("frames_left", [False, True])
def test_a_swapped_batch_is_the_batch_built_with_the_other_references(
    higgs: Any, voices: Voices, left: bool, frames_left: bool
) -> None:
    samples = voices.pad(samples_of(voices), left=left)
    inputs = voices.batch(samples, frame_padding=2, frames_left=frames_left)
    swap = swap_references(audio_of(higgs, inputs), NOBODY)
    assert swap.swapped.tolist() == swap.present.tolist() == [True] * 3
    swapped = HiggsAudioV2Family(higgs).swap_reference(inputs, swap.codes)
    expected = [with_reference_of(sample, samples[(row + 1) % 3], voices.config) for row, sample in enumerate(samples)]
    assert torch.equal(frames_of(swapped), frames_of(voices.batch(expected, 2, frames_left)))
    assert torch.equal(swapped["input_ids"], inputs["input_ids"])
    assert not torch.equal(frames_of(swapped), frames_of(inputs))


def test_several_clips_are_filled_one_after_the_other(higgs: Any, voices: Voices) -> None:
    two = [*voices.spoken(voices.clip(3, 5)), *voices.text("and"), *voices.spoken(voices.clip(4, 6))]
    first = [*voices.turn("user", two), *voices.spoken(voices.clip(3, 7, target=True))]
    second = voices.conversation(5, seed=9)
    inputs = voices.batch(voices.pad([first, second]))
    codes = swap_references(audio_of(higgs, inputs), [None, None]).codes
    clips = [reference_codes(part, voices.config) for part in (second, first)]
    special = (voices.config.audio_stream_bos_id, voices.config.audio_stream_eos_id)
    at = audio_of(higgs, inputs).reference
    for k in range(voices.config.num_codebooks):
        for row, length in ((0, 7), (1, 5)):
            placed = [code for code in codes[row, at[row], k].tolist() if code not in special]
            assert placed == [clips[row][k][n % len(clips[row][k])] for n in range(length)]


def test_targets_and_everything_else_stay(higgs: Any, voices: Voices) -> None:
    inputs = voices.batch(voices.pad(samples_of(voices)))
    audio = audio_of(higgs, inputs)
    codes = swap_references(audio, NOBODY).codes
    assert torch.equal(codes[~audio.reference], audio.codes[~audio.reference])


@pytest.mark.parametrize(
    ("speakers", "partners"),
    [
        (["ann", "bob", "cid"], [1, 2, 0]),
        (["ann", "ann", "bob"], [2, 2, 0]),
        (["ann", "bob", "bob"], [1, 0, 0]),
        (["ann", "ann", "ann"], [None, None, None]),
        (["ann", None, "ann"], [1, 2, 1]),
    ],
)
def test_the_next_sample_of_another_speaker_lends_its_reference(
    higgs: Any, voices: Voices, speakers: list[str | None], partners: list[int | None]
) -> None:
    samples = voices.pad(samples_of(voices))
    inputs = voices.batch(samples)
    swap = swap_references(audio_of(higgs, inputs), speakers)
    assert swap.swapped.tolist() == [partner is not None for partner in partners]
    expected = [
        sample if partner is None else with_reference_of(sample, samples[partner], voices.config)
        for sample, partner in zip(samples, partners, strict=True)
    ]
    assert torch.equal(swap.codes, audio_of(higgs, voices.batch(expected)).codes)


def test_the_same_codes_are_nobody_elses(higgs: Any, voices: Voices) -> None:
    same = [voices.conversation(4, seed=3, words=words) for words in ("ship", "boat")]
    inputs = voices.batch(voices.pad(same))
    for speakers in ([None, None], ["ann", "bob"]):
        assert swap_references(audio_of(higgs, inputs), speakers).swapped.tolist() == [False, False]


def test_samples_without_a_reference_neither_lend_nor_get_one(higgs: Any, voices: Voices) -> None:
    inputs = voices.batch(voices.pad(samples_of(voices, (4, None, 2))))
    swap = swap_references(audio_of(higgs, inputs), NOBODY)
    assert swap.present.tolist() == [True, False, True]
    assert swap.swapped.tolist() == [True, False, True]
    alone = voices.batch(voices.pad(samples_of(voices, (None, None, 2))))
    assert swap_references(audio_of(higgs, alone), NOBODY).swapped.tolist() == [False] * 3


def test_a_single_sample_stays_as_it_is(higgs: Any, voices: Voices) -> None:
    inputs = voices.batch([voices.conversation()])
    swap = swap_references(audio_of(higgs, inputs), [None])
    assert swap.swapped.tolist() == [False]
    assert torch.equal(swap.codes, audio_of(higgs, inputs).codes)


def runs(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(**inputs).logits
    return logits


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_nothing_reads_a_hidden_reference(higgs: Any, voices: Voices, left: bool, implementation: str) -> None:
    higgs.set_attn_implementation(implementation)
    samples = voices.pad(samples_of(voices), left=left)
    others = [with_reference_of(sample, samples[(row + 1) % 3], voices.config) for row, sample in enumerate(samples)]
    family = HiggsAudioV2Family(higgs)
    logits = []
    for built in (samples, others):
        inputs = voices.batch(built)
        audio = audio_of(higgs, inputs)
        elsewhere = inputs["attention_mask"].bool() & ~audio.reference  # padding reads whatever it likes
        own = runs(higgs, family.swap_reference(inputs, None))[elsewhere]
        hidden = runs(higgs, family.hide_reference(inputs, audio.reference))[elsewhere]
        logits.append((own, hidden))
    assert not torch.equal(logits[0][0], logits[1][0])
    assert torch.equal(logits[0][1], logits[1][1])


def test_hiding_nothing_changes_nothing(higgs: Any, voices: Voices) -> None:
    inputs = voices.batch(voices.pad(samples_of(voices), left=True))
    family = HiggsAudioV2Family(higgs)
    own = runs(higgs, family.swap_reference(inputs, None))
    nothing = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    assert torch.equal(runs(higgs, family.hide_reference(inputs, nothing)), own)


def test_what_stands_behind_a_hidden_reference_does_not_move_up(higgs: Any, voices: Voices) -> None:
    inputs = voices.batch([voices.conversation()])
    positions = audio_of(higgs, inputs).reference
    family = HiggsAudioV2Family(higgs)
    hidden = family.hide_reference(inputs, positions)
    assert hidden["position_ids"].tolist() == [list(range(inputs["input_ids"].shape[1]))]
    shifted = inputs | {"position_ids": hidden["position_ids"] + 5}
    assert torch.equal(family.hide_reference(shifted, positions)["position_ids"], shifted["position_ids"])
    del inputs["attention_mask"]
    assert torch.equal(family.hide_reference(inputs, positions)["attention_mask"], (~positions).long())


def test_a_mask_that_cannot_hide_positions_is_refused(higgs: Any, voices: Voices) -> None:
    inputs = voices.batch([voices.conversation()])
    positions = audio_of(higgs, inputs).reference
    inputs["attention_mask"] = torch.ones(1, 1, 3, 3)
    with pytest.raises(ValueError, match="cannot be hidden"):
        HiggsAudioV2Family(higgs).hide_reference(inputs, positions)


def test_no_run_computes_a_loss_or_keeps_a_cache(higgs: Any, voices: Voices) -> None:
    inputs: dict[str, Any] = {**voices.batch(voices.pad(samples_of(voices))), "num_items_in_batch": torch.tensor(3)}
    family = HiggsAudioV2Family(higgs)
    audio = audio_of(higgs, inputs)
    for run in (
        family.swap_reference(inputs, None),
        family.swap_reference(inputs, audio.codes),
        family.hide_reference(inputs, audio.target),
    ):
        output = higgs(**run)
        assert output.loss is None
        assert output.past_key_values is None


def test_frames_without_a_mask(higgs: Any, voices: Voices) -> None:
    samples = [voices.conversation(4, seed=row) for row in range(2)]
    inputs = voices.batch(samples)
    del inputs["audio_input_ids_mask"]
    swap = swap_references(audio_of(higgs, inputs), [None, None])
    swapped = HiggsAudioV2Family(higgs).swap_reference(inputs, swap.codes)["audio_input_ids"]
    expected = [with_reference_of(samples[row], samples[1 - row], voices.config) for row in range(2)]
    assert torch.equal(swapped, voices.batch(expected)["audio_input_ids"])


def test_nothing_waits_for_the_device(higgs: Any, voices: Voices) -> None:
    inputs = voices.batch(voices.pad(samples_of(voices)), 2)
    audio = audio_of(higgs, inputs)
    family = HiggsAudioV2Family(higgs)
    with Watch() as watch:
        swap = swap_references(audio, ["ann", None, "bob"])
        family.swap_reference(inputs, swap.codes)
        family.hide_reference(inputs, audio.reference)
    assert watch.operations
    assert watch.waits == []


def test_models_whose_references_cannot_be_changed(llama: Any, higgs: Any) -> None:
    of_text, of_speech = find_family(llama), find_family(torch.nn.Sequential(higgs))
    assert of_text is not None
    assert of_speech is not None
    assert not of_text.swaps_references
    assert of_speech.swaps_references


def test_the_slow_reference_reads_every_code(voices: Voices) -> None:
    """It is no comparison of nothing with nothing."""
    sample = voices.conversation(4, seed=1)
    assert [len(codes) for codes in reference_codes(sample, voices.config)] == [4] * voices.config.num_codebooks
    assert all(isinstance(position, Position) for position in sample)
