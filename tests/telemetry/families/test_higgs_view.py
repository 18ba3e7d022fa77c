"""How the Higgs Audio v2 family reads a batch, against positions known by construction and the model's own scatter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.batches import IGNORED, Sample, Voices
from torch import Tensor
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from telemetry.families import AudioView, BatchView, HiggsAudioV2Family

Read = Callable[[dict[str, Any]], BatchView]


@pytest.fixture(scope="module")
def read(higgs_config: HiggsAudioV2Config) -> Read:
    model = HiggsAudioV2ForConditionalGeneration(higgs_config, use_text_head=True)
    family = HiggsAudioV2Family(model)

    def call(inputs: dict[str, Any]) -> BatchView:
        view = family.view(inputs)
        assert view is not None
        return view

    return call


def audio_of(view: BatchView) -> AudioView:
    assert view.audio is not None
    return view.audio


def assert_reads_as(view: BatchView, samples: list[Sample]) -> None:
    """Every field of the view, position by position."""
    audio = audio_of(view)
    for row, sample in enumerate(samples):
        frames = sum(position.codes is not None for position in sample)
        assert int(audio.frames[row]) == frames
        assert int(audio.placeholders[row]) == frames
        for at, position in enumerate(sample):
            here = {
                "real": bool(view.real[row, at]),
                "text": bool(view.text[row, at]),
                "reference": bool(audio.reference[row, at]),
                "target": bool(audio.target[row, at]),
                "starts": bool(audio.starts[row, at]),
                "codes": audio.codes[row, at].tolist(),
                "labels": audio.labels[row, at].tolist(),
            }
            codebooks = audio.codebooks
            assert here == {
                "real": position.kind != "padding",
                "text": position.kind == "text",
                "reference": position.kind == "reference",
                "target": position.kind == "target",
                "starts": position.begins,
                "codes": list(position.codes or [0] * codebooks),
                "labels": list(position.code_labels or [IGNORED] * codebooks),
            }, f"row {row}, position {at}"


def assert_partition(view: BatchView) -> None:
    """Text, reference, target and padding: every position is exactly one of them."""
    audio = audio_of(view)
    kinds = torch.stack([view.text, audio.reference, audio.target, ~view.real]).long().sum(dim=0)
    assert kinds.tolist() == torch.ones_like(kinds).tolist()


@st.composite
def sample_plans(draw: st.DrawFn) -> list[tuple[str, int]]:
    """Parts of a sequence in order: text, reference and target clips of some length."""
    kinds = st.sampled_from(["text", "reference", "target"])
    return draw(st.lists(st.tuples(kinds, st.integers(1, 5)), min_size=0, max_size=5))


def build(voices: Voices, plan: list[tuple[str, int]], seed: int) -> Sample:
    sample: Sample = []
    for index, (kind, length) in enumerate(plan):
        if kind == "text":
            sample += voices.text("a " * length, supervised=index % 2 == 0)
        else:
            sample += voices.clip(length, seed + index, target=kind == "target", ends=length % 2 == 0)
    return sample or voices.text("a")


@settings(max_examples=60)
@given(
    plans=st.lists(sample_plans(), min_size=1, max_size=4),
    left=st.booleans(),
    frame_padding=st.integers(0, 3),
    frames_left=st.booleans(),
)
def test_every_position_is_read_as_it_was_built(
    read: Read,
    voices: Voices,
    plans: list[list[tuple[str, int]]],
    left: bool,
    frame_padding: int,
    frames_left: bool,
) -> None:
    """Batch sizes, paddings on either side, no reference, no target, clips right behind each other, no audio at all."""
    samples = voices.pad([build(voices, plan, 10 * row) for row, plan in enumerate(plans)], left)
    view = read(voices.batch(samples, frame_padding, frames_left))
    assert_reads_as(view, samples)
    assert_partition(view)


@settings(max_examples=60)
@given(data=st.data())
def test_labels_and_codes_lie_where_the_model_scatters_them(
    read: Read, higgs_config: HiggsAudioV2Config, data: st.DataObject
) -> None:
    """Placeholders anywhere, masked ones too: the model counts them all when it hands out its frames."""
    batch, length, codebooks = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12)), higgs_config.num_codebooks
    tokens = st.sampled_from([1, 40, higgs_config.audio_token_id, higgs_config.audio_delay_token_id])
    input_ids = torch.tensor([[data.draw(tokens) for _ in range(length)] for _ in range(batch)])
    attention_mask = torch.tensor([[int(data.draw(st.booleans())) for _ in range(length)] for _ in range(batch)])
    audio_token_mask = (input_ids == higgs_config.audio_token_id) | (input_ids == higgs_config.audio_delay_token_id)
    per_row = audio_token_mask.sum(dim=1)
    frames = int(per_row.max()) + data.draw(st.integers(0, 2))
    mask = torch.zeros(batch, frames, dtype=torch.bool)
    for row in range(batch):
        for frame in data.draw(st.permutations(range(frames)))[: int(per_row[row])]:
            mask[row, frame] = True
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    codes = torch.randint(0, higgs_config.codebook_size, (batch, frames, codebooks), generator=generator)
    audio_labels = torch.where(torch.rand(codes.shape, generator=generator) < 0.5, codes, IGNORED)

    view = read(
        {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "audio_input_ids": codes,
            "audio_input_ids_mask": mask,
            "audio_labels": audio_labels,
        }
    )

    labels_expanded = torch.full((batch, length, codebooks), IGNORED)
    labels_expanded[audio_token_mask] = audio_labels[mask]  # transformers' own line
    codes_expanded = torch.zeros(batch, length, codebooks, dtype=torch.long)
    codes_expanded[audio_token_mask] = codes[mask]
    assert audio_of(view).labels.tolist() == labels_expanded.tolist()
    assert audio_of(view).codes.tolist() == codes_expanded.tolist()
    assert_partition(view)


def scattered_in_a_loop(frames: Tensor, mask: Tensor, is_audio: Tensor, fill: int) -> list[list[list[int]]]:
    """Valid frames handed out one by one to the audio positions; ``fill`` when they have run out."""
    valid = [
        frames[row, frame].tolist()
        for row in range(mask.shape[0])
        for frame in range(mask.shape[1])
        if bool(mask[row, frame])
    ]
    empty = [fill] * frames.shape[-1]
    return [[valid.pop(0) if bool(here) and valid else empty for here in row] for row in is_audio]


@settings(max_examples=60)
@given(
    placeholders=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    frames=st.integers(0, 6),
    kept=st.integers(0, 63),
    labelled=st.booleans(),
)
def test_more_or_fewer_frames_than_placeholders_do_not_raise(
    read: Read, higgs_config: HiggsAudioV2Config, placeholders: list[int], frames: int, kept: int, labelled: bool
) -> None:
    length, codebooks = 8, higgs_config.num_codebooks
    ids = [[higgs_config.audio_token_id] * count + [40] * (length - count) for count in placeholders]
    mask = torch.tensor([[bool(kept >> frame & 1) for frame in range(frames)] for _ in placeholders], dtype=torch.bool)
    mask = mask.reshape(len(placeholders), frames)
    codes = torch.arange(len(placeholders) * frames * codebooks).reshape(len(placeholders), frames, codebooks) % 10
    inputs = {"input_ids": torch.tensor(ids), "audio_input_ids": codes, "audio_input_ids_mask": mask}
    if labelled:
        inputs["audio_labels"] = codes

    view = read(inputs)

    audio = audio_of(view)
    is_audio = inputs["input_ids"] == higgs_config.audio_token_id
    assert audio.codes.tolist() == scattered_in_a_loop(codes, mask, is_audio, 0)
    labels = codes if labelled else torch.full_like(codes, IGNORED)
    assert audio.labels.tolist() == scattered_in_a_loop(labels, mask, is_audio, IGNORED)
    assert audio.placeholders.tolist() == placeholders
    assert audio.frames.tolist() == [sum(bool(kept >> frame & 1) for frame in range(frames))] * len(placeholders)
    assert_partition(view)


def test_all_labels_masked_makes_every_clip_a_reference(read: Read, voices: Voices) -> None:
    samples = voices.pad([voices.conversation(), voices.conversation(reference=None, seed=3)])
    inputs = voices.batch(samples)
    inputs["audio_labels"] = torch.full_like(inputs["audio_labels"], IGNORED)
    audio = audio_of(read(inputs))
    assert not audio.target.any()
    spoken = [[position.codes is not None for position in sample] for sample in samples]
    assert audio.reference.tolist() == spoken


def test_one_labelled_code_makes_its_whole_clip_a_target_and_no_other(read: Read, voices: Voices) -> None:
    first, second, third = (voices.clip(length, seed=length) for length in (3, 1, 4))
    sample = [*first, *second, *third]  # right behind each other: only the delay tokens part them
    inputs = voices.batch([sample])
    inputs["audio_labels"][0, len(first) + 1, 2] = 7
    audio = audio_of(read(inputs))
    kinds = [0] * len(first) + [1] * len(second) + [0] * len(third)
    assert audio.target.long().tolist() == [kinds]
    assert audio.reference.long().tolist() == [[1 - kind for kind in kinds]]


def test_without_mask_every_frame_counts_and_without_attention_mask_every_position(read: Read, voices: Voices) -> None:
    sample = voices.conversation()
    inputs = voices.batch([sample])
    del inputs["audio_input_ids_mask"], inputs["attention_mask"]
    assert_reads_as(read(inputs), [sample])


def test_masks_of_integers_and_floats_are_masks(read: Read, voices: Voices) -> None:
    samples = voices.pad([voices.conversation(), voices.conversation(reference=2, target=1)], left=True)
    inputs = voices.batch(samples, frame_padding=2)
    inputs["audio_input_ids_mask"] = inputs["audio_input_ids_mask"].long()
    inputs["attention_mask"] = inputs["attention_mask"].float()
    assert_reads_as(read(inputs), samples)


def test_text_alone_has_no_audio(read: Read, voices: Voices) -> None:
    sample = voices.conversation(reference=None, target=None)
    inputs = voices.batch([sample])
    view = read({name: inputs[name] for name in ("input_ids", "attention_mask", "labels")})
    assert view.audio is None
    assert view.text.all()
    assert view.text_labels is not None
    assert view.text_labels.tolist() == [[position.label for position in sample]]


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0), (0, 0)])
def test_empty_batches_are_read(read: Read, higgs_config: HiggsAudioV2Config, batch: int, length: int) -> None:
    view = read(
        {
            "input_ids": torch.zeros(batch, length, dtype=torch.long),
            "audio_input_ids": torch.zeros(batch, 0, higgs_config.num_codebooks, dtype=torch.long),
            "audio_input_ids_mask": torch.zeros(batch, 0, dtype=torch.bool),
        }
    )
    assert audio_of(view).codes.shape == (batch, length, higgs_config.num_codebooks)
    assert_partition(view)


def test_a_batch_without_token_ids_has_no_view(higgs: HiggsAudioV2ForConditionalGeneration) -> None:
    family = HiggsAudioV2Family(higgs)
    assert family.view({"inputs_embeds": torch.zeros(1, 3, 16)}) is None
    assert family.view({"input_ids": [[1, 2]]}) is None


def test_reading_changes_no_input(read: Read, voices: Voices) -> None:
    inputs = voices.batch(voices.pad([voices.conversation(), voices.conversation(target=None)], left=True), 1)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    read(inputs)
    for name, tensor in inputs.items():
        assert torch.equal(tensor, before[name]), name


def test_every_codebook_is_delayed_by_one_frame_more(read: Read, voices: Voices) -> None:
    assert audio_of(read(voices.batch([voices.conversation()]))).delay == (0, 1, 2)
