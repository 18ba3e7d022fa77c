"""A sample as tensors: what is supervised, where the codes stand, how samples are padded, how codes are cached."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import HiggsAudioV2Processor

import trainer.code_cache
from trainer.audio import read_audio
from trainer.chatml import Sample, load_samples
from trainer.code_cache import CodeCache, codec_key, default_cache_dir
from trainer.codec import codec_sampling_rate, load_audio_tokenizer
from trainer.collator import VoiceCloningCollator
from trainer.dataset import IGNORE_INDEX, Example, VoiceCloningDataset
from trainer.demo.prepare import Demonstration
from trainer.processing import load_processor

ARABIC = "مرحبا بالعالم، كيف حالك؟"
Loader = Callable[..., Example]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def audio(path: Path) -> dict[str, Any]:
    return {"type": "audio", "audio_url": str(path)}


def turn(role: str, *content: dict[str, Any]) -> dict[str, Any]:
    return {"role": role, "content": list(content)}


@pytest.fixture
def clips(demo_samples: list[Sample]) -> list[Path]:
    """Audio files of different lengths, whose codes are known."""
    return [sample.targets[0] for sample in demo_samples[:4]]


@pytest.fixture
def make(processor: HiggsAudioV2Processor, demo_codes: dict[Path, Tensor], tmp_path: Path) -> Loader:
    """The example of one sample, through a data file on disk."""

    def made(*messages: dict[str, Any], **more: Any) -> Example:
        file = tmp_path / "data.json"
        file.write_text(json.dumps([{"messages": messages, "misc": {"sample_id": "one"}, **more}]), encoding="utf-8")
        samples = load_samples(file, show_progress=False)
        return VoiceCloningDataset(samples, processor, demo_codes)[0]

    return made


def supervised_runs(labels: Tensor) -> list[list[int]]:
    """Stretches of labels without a gap."""
    groups = itertools.groupby(labels.tolist(), key=lambda label: label != IGNORE_INDEX)
    return [list(run) for is_label, run in groups if is_label]


def supervised_text(example: Example, processor: HiggsAudioV2Processor) -> list[str]:
    return [processor.tokenizer.decode(run) for run in supervised_runs(example.labels)]


def clip_slices(codes: Sequence[Tensor], codebooks: int) -> list[slice]:
    """Where each clip's frames stand: its codes, a start and an end of stream, and the last codebook's delay."""
    ends = list(itertools.accumulate(code.shape[1] + 2 + codebooks - 1 for code in codes))
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def assert_target(example: Example, where: slice, codes: Tensor, processor: HiggsAudioV2Processor) -> None:
    """Every codebook's labels are its codes and then one end of stream, each at the frame that shows it as input."""
    frames, labels = example.audio_input_ids[where], example.audio_labels[where]
    for codebook in range(codes.shape[0]):
        expected = [IGNORE_INDEX] * len(frames)
        for index, code in enumerate([*codes[codebook].tolist(), processor.audio_stream_eos_id]):
            expected[1 + codebook + index] = code
        assert labels[:, codebook].tolist() == expected
        for frame, label in zip(frames[:, codebook].tolist(), expected, strict=True):
            assert label in (IGNORE_INDEX, frame)


# The demonstration's samples


def test_target_transcript_and_codes_are_supervised_and_nothing_else(
    demo_dataset: VoiceCloningDataset, demo_codes: dict[Path, Tensor], processor: HiggsAudioV2Processor
) -> None:
    languages = set()
    for index, sample in enumerate(demo_dataset.samples):
        example = demo_dataset[index]
        languages.add(sample.language)
        assert supervised_text(example, processor) == [sample.target_transcript]
        is_label = example.labels != IGNORE_INDEX
        assert torch.equal(example.labels[is_label], example.input_ids[is_label])
        codes = [demo_codes[sample.references[0]], demo_codes[sample.targets[0]]]
        reference, target = clip_slices(codes, codes[0].shape[0])
        assert (example.audio_labels[reference] == IGNORE_INDEX).all()
        assert_target(example, target, codes[1], processor)
        assert target.stop == len(example.audio_input_ids)
    assert len(languages) == 3


def test_tensors_are_the_processors_own(demo_dataset: VoiceCloningDataset, processor: HiggsAudioV2Processor) -> None:
    rate = codec_sampling_rate(processor.audio_tokenizer)
    for index in (0, 13, 26):
        sample, example = demo_dataset.samples[index], demo_dataset[index]
        messages = [
            {
                "role": message.role,
                "content": [
                    {"type": "audio"} if hasattr(item, "path") else {"type": "text", "text": item.text}
                    for item in message.content
                ],
            }
            for message in sample.messages
        ]
        rendered = processor.apply_chat_template(messages, tokenize=False)
        expected = processor(
            text=rendered,
            audio=[read_audio(path, rate) for path in (*sample.references, *sample.targets)],
            sampling_rate=rate,
            return_tensors="pt",
            add_special_tokens=False,
        )
        assert torch.equal(example.input_ids[None], expected["input_ids"])
        assert torch.equal(example.audio_input_ids[None], expected["audio_input_ids"])


def test_there_are_as_many_placeholders_as_frames(
    demo_dataset: VoiceCloningDataset, processor: HiggsAudioV2Processor
) -> None:
    codebooks = processor.audio_tokenizer.config.num_quantizers
    for example in (demo_dataset[index] for index in range(len(demo_dataset))):
        ids = example.input_ids.tolist()
        delays = ids.count(processor.audio_delay_token_id)
        assert delays == 2 * (codebooks - 1)
        assert ids.count(processor.audio_token_id) + delays == len(example.audio_input_ids)


def test_labels_without_their_delay_are_the_codes(
    demo_dataset: VoiceCloningDataset, demo_codes: dict[Path, Tensor], processor: HiggsAudioV2Processor
) -> None:
    for index in (0, 17, 35):
        sample, example = demo_dataset.samples[index], demo_dataset[index]
        codes = [demo_codes[sample.references[0]], demo_codes[sample.targets[0]]]
        _, target = clip_slices(codes, codes[0].shape[0])
        reverted = processor.revert_delay_pattern(example.audio_labels[target])
        assert torch.equal(reverted[1:-1].transpose(0, 1), codes[1])
        assert (reverted[0] == IGNORE_INDEX).all()
        assert (reverted[-1] == processor.audio_stream_eos_id).all()


def test_metadata_reads_the_waveforms(demo_dataset: VoiceCloningDataset, processor: HiggsAudioV2Processor) -> None:
    sample, metadata = demo_dataset.samples[20], demo_dataset[20].metadata
    told = {
        name: metadata[name] for name in ("sample_id", "speaker", "language", "ref_transcript", "target_transcript")
    }
    assert told == {name: getattr(sample, name) for name in told}
    assert all(told.values())
    for name, paths in (("reference", sample.references), ("target", sample.targets)):
        [waveform], [path] = metadata[name], paths
        samples, rate = soundfile.read(path)
        assert waveform.sampling_rate == codec_sampling_rate(processor.audio_tokenizer) != rate
        assert waveform.file_sampling_rate == rate
        expected = soxr.resample(samples, rate, waveform.sampling_rate, quality="VHQ")
        np.testing.assert_allclose(waveform.samples, expected, atol=1e-5)
        assert waveform.samples.std() > 0.01
        assert waveform.seconds == pytest.approx(len(samples) / rate, abs=0.04)  # a frame of codes


# Constructed samples


def test_an_earlier_assistant_turn_is_reference(
    make: Loader, clips: list[Path], demo_codes: dict[Path, Tensor], processor: HiggsAudioV2Processor
) -> None:
    turns = [
        turn("user", text("Say hello.")),
        turn("assistant", text("Hello."), audio(clips[0])),
        turn("user", text("Say hello.")),
        turn("assistant", text("Hello."), audio(clips[1])),
    ]
    codes = [demo_codes[clip] for clip in clips[:2]]
    first, second = clip_slices(codes, codes[0].shape[0])

    later = make(*turns, start_index=2)
    assert supervised_text(later, processor) == ["Hello."]
    assert (later.audio_labels[first] == IGNORE_INDEX).all()
    assert_target(later, second, codes[1], processor)
    assert [clip.path for clip in later.metadata["reference"]] == [clips[0]]
    # It is the second "Hello." that is supervised: the one behind the first clip.
    last_audio_of_first = torch.nonzero(later.input_ids == processor.audio_delay_token_id)[codes[0].shape[0] - 2]
    assert torch.nonzero(later.labels != IGNORE_INDEX).min() > last_audio_of_first

    both = make(*turns, start_index=0)
    assert supervised_text(both, processor) == ["Hello.", "Hello."]
    assert_target(both, first, codes[0], processor)
    assert_target(both, second, codes[1], processor)
    assert both.metadata["reference"] == []


def test_several_targets_in_one_turn(
    make: Loader, clips: list[Path], demo_codes: dict[Path, Tensor], processor: HiggsAudioV2Processor
) -> None:
    example = make(
        turn("user", text("Reference."), audio(clips[2]), text("Two clips, please.")),
        turn("assistant", text("One."), audio(clips[0]), text("Two."), audio(clips[1])),
    )
    codes = [demo_codes[clips[index]] for index in (2, 0, 1)]
    reference, first, second = clip_slices(codes, codes[0].shape[0])
    assert supervised_text(example, processor) == ["One.", "Two."]
    assert (example.audio_labels[reference] == IGNORE_INDEX).all()
    assert_target(example, first, codes[1], processor)
    assert_target(example, second, codes[2], processor)
    assert [clip.path for clip in example.metadata["target"]] == clips[:2]


@pytest.mark.parametrize(
    "words",
    [
        "assistant",
        ARABIC,
        "a",
        "Hello.\n\nassistant\n\nuser",
        "  spaces around \n",
        "<script>alert(1)</script> | 100 %",
        "🎤 é",
        "<|audio_out_",
        "<",
    ],
)
def test_whatever_the_target_text_it_alone_is_supervised(
    words: str, make: Loader, clips: list[Path], processor: HiggsAudioV2Processor
) -> None:
    """Also where the prompt holds the same words, and where they are a role's name."""
    example = make(
        turn("system", text(words)),
        turn("user", text(words), audio(clips[1]), text(words)),
        turn("assistant", text(words), audio(clips[0])),
    )
    assert supervised_text(example, processor) == [words.strip()]
    last_placeholder_of_prompt = torch.nonzero(example.input_ids == processor.audio_eos_token_id)[0]
    # Between the reference and the target text stand the prompt's last words and the assistant's header.
    prompt = processor.tokenizer.decode(
        example.input_ids[last_placeholder_of_prompt : torch.nonzero(example.labels != IGNORE_INDEX)[0]]
    )
    assert prompt == f"<|audio_eos|>{words.strip()}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


def test_a_target_without_text_supervises_codes_alone(
    make: Loader, clips: list[Path], demo_codes: dict[Path, Tensor], processor: HiggsAudioV2Processor
) -> None:
    example = make(turn("user", text("Speak.")), turn("assistant", audio(clips[0])))
    assert (example.labels == IGNORE_INDEX).all()
    codes = demo_codes[clips[0]]
    assert_target(example, slice(None), codes, processor)


@pytest.mark.parametrize("token", ["<|AUDIO_OUT|>", "<|reserved_special_token_6|>"])
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_text_with_an_audio_token_is_refused(role: str, token: str, make: Loader, clips: list[Path]) -> None:
    words = {"user": "Say it.", "assistant": "It."}
    words[role] = f"Words {token} words."
    with pytest.raises(ValueError, match=r"data\.json: sample 0 \('one'\): .*a text holds an audio token of the model"):
        make(turn("user", text(words["user"])), turn("assistant", text(words["assistant"]), audio(clips[0])))


def test_a_template_that_changes_the_target_text_is_refused(
    demo: Demonstration, demo_samples: list[Sample], demo_codes: dict[Path, Tensor]
) -> None:
    shouting = load_processor(str(demo.model))
    shouting.chat_template = shouting.chat_template.replace("item['text'] | trim", "item['text'] | trim | upper")
    with pytest.raises(ValueError, match=r"\('train-\S+'\): the chat template does not show the target text"):
        VoiceCloningDataset(demo_samples, shouting, demo_codes)


# Batches


def test_collator_pads_on_the_right_and_masks_say_so(
    demo_dataset: VoiceCloningDataset, collator: VoiceCloningCollator, processor: HiggsAudioV2Processor
) -> None:
    examples = [demo_dataset[index] for index in (0, 5, 12)]
    batch = collator(examples)
    tokens, frames = [len(e.input_ids) for e in examples], [len(e.audio_input_ids) for e in examples]
    assert len(set(tokens)) == len(set(frames)) == 3
    widths = {name: tensor.shape[1] for name, tensor in batch.items() if name != "metadata"}
    assert {widths[name] for name in ("input_ids", "attention_mask", "labels")} == {max(tokens)}
    assert {widths[name] for name in ("audio_input_ids", "audio_input_ids_mask", "audio_labels")} == {max(frames)}
    for row, example in enumerate(examples):
        text_end, audio_end = tokens[row], frames[row]
        for name in ("input_ids", "labels"):
            assert torch.equal(batch[name][row, :text_end], getattr(example, name))
        for name in ("audio_input_ids", "audio_labels"):
            assert torch.equal(batch[name][row, :audio_end], getattr(example, name))
        assert batch["attention_mask"][row].tolist() == [1] * text_end + [0] * (max(tokens) - text_end)
        assert batch["audio_input_ids_mask"][row].tolist() == [True] * audio_end + [False] * (max(frames) - audio_end)
        assert (batch["input_ids"][row, text_end:] == processor.tokenizer.pad_token_id).all()
        assert (batch["audio_input_ids"][row, audio_end:] == processor.audio_stream_eos_id).all()
        assert (batch["labels"][row, text_end:] == IGNORE_INDEX).all()
        assert (batch["audio_labels"][row, audio_end:] == IGNORE_INDEX).all()
    assert batch["audio_input_ids_mask"].dtype == torch.bool  # the model indexes with it
    assert [entry["sample_id"] for entry in batch["metadata"]] == [e.metadata["sample_id"] for e in examples]


# The cache of codes


class CountingEncoder:
    """Stands in for ``encode_waveform`` and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self._encode = trainer.code_cache.encode_waveform
        monkeypatch.setattr(trainer.code_cache, "encode_waveform", self)

    def __call__(self, codec: Any, samples: np.ndarray) -> Tensor:
        self.calls += 1
        return self._encode(codec, samples)


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> CountingEncoder:
    return CountingEncoder(monkeypatch)


@pytest.fixture
def own_clips(clips: list[Path], tmp_path: Path) -> list[Path]:
    """Copies that a test may change."""
    return [Path(shutil.copy(clip, tmp_path / f"clip_{index}.flac")) for index, clip in enumerate(clips)]


def cached_files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.safetensors"))


def assert_same_codes(first: Mapping[Path, Tensor], second: Mapping[Path, Tensor]) -> None:
    assert list(first) == list(second)
    assert all(torch.equal(first[path], second[path]) for path in first)


def test_clips_are_encoded_once(
    own_clips: list[Path], processor: HiggsAudioV2Processor, encoder: CountingEncoder, tmp_path: Path
) -> None:
    codec = processor.audio_tokenizer
    first = CodeCache(codec, tmp_path / "cache").encode([*own_clips, own_clips[0]])
    assert encoder.calls == len(own_clips)
    assert list(first) == own_clips
    rate = codec_sampling_rate(codec)
    for path, codes in first.items():
        expected = codec.encode(torch.from_numpy(read_audio(path, rate))[None, None]).audio_codes[0]
        assert torch.equal(codes, expected)
        assert codes.dtype == torch.int64

    moved = own_clips[0].rename(tmp_path / "elsewhere.flac")
    again = CodeCache(codec, tmp_path / "cache").encode([moved, *own_clips[1:]])
    assert encoder.calls == len(own_clips)
    assert torch.equal(again[moved], first[own_clips[0]])


def test_changed_audio_is_encoded_anew(
    own_clips: list[Path], processor: HiggsAudioV2Processor, encoder: CountingEncoder, tmp_path: Path
) -> None:
    cache = CodeCache(processor.audio_tokenizer, tmp_path / "cache")
    before = cache.encode(own_clips)
    shutil.copy(own_clips[1], own_clips[0])
    after = cache.encode(own_clips)
    assert encoder.calls == len(own_clips)  # the content is that of a clip already known
    assert torch.equal(after[own_clips[0]], before[own_clips[1]])

    samples, rate = soundfile.read(own_clips[2])
    soundfile.write(own_clips[2], samples[: len(samples) // 2], rate)
    assert cache.encode(own_clips)[own_clips[2]].shape[1] < before[own_clips[2]].shape[1]
    assert encoder.calls == len(own_clips) + 1


def test_another_codec_encodes_anew(
    own_clips: list[Path], demo: Demonstration, encoder: CountingEncoder, tmp_path: Path
) -> None:
    codec = load_audio_tokenizer(str(demo.audio_tokenizer))
    before = CodeCache(codec, tmp_path / "cache").encode(own_clips)
    key = codec_key(codec)
    assert codec_key(load_audio_tokenizer(str(demo.audio_tokenizer))) == key

    name, weight = max(codec.state_dict().items(), key=lambda item: item[1].numel())
    weight.copy_(weight.flip(0) if weight.dim() == 1 else weight.flip(-2))
    assert codec_key(codec) != key, name
    after = CodeCache(codec, tmp_path / "cache").encode(own_clips)
    assert encoder.calls == 2 * len(own_clips)
    assert any(not torch.equal(after[path], before[path]) for path in own_clips)


def test_a_codec_is_known_wherever_it_is(demo: Demonstration, tmp_path: Path) -> None:
    shutil.copytree(demo.audio_tokenizer, tmp_path / "moved")
    keys = {codec_key(load_audio_tokenizer(str(path))) for path in (demo.audio_tokenizer, tmp_path / "moved")}
    assert len(keys) == 1


def flip_a_bit(file: Path, at: int, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= bit
    file.write_bytes(data)


def rewrite(file: Path, change: Callable[[Tensor], Tensor]) -> None:
    """Write other codes with the checksum of those that were there."""
    held = load_file(file)
    save_file({**held, "codes": change(held["codes"])}, file)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-5]),
        lambda file: file.write_bytes(b"\xff" * 200),
        lambda file: save_file({"other": torch.zeros(2)}, file),
        lambda file: flip_a_bit(file, -36, 0x01),  # another code of the codebook
        lambda file: flip_a_bit(file, -35, 0x10),  # none of it
        lambda file: flip_a_bit(file, -33, 0x80),  # a negative one
        lambda file: flip_a_bit(file, -1, 0x01),  # of the checksum
        lambda file: flip_a_bit(file, 0, 0x04),  # of the header
        lambda file: rewrite(file, lambda codes: codes.float() * float("nan")),
        lambda file: rewrite(file, lambda codes: codes.long()),
        lambda file: rewrite(file, lambda codes: codes[:-1]),
        lambda file: rewrite(file, lambda codes: codes[:, :0]),
        lambda file: rewrite(file, lambda codes: codes.T.contiguous()),
        lambda file: rewrite(file, lambda codes: codes[0]),
        lambda file: rewrite(file, lambda codes: codes.flip(1).contiguous()),
        lambda file: save_file({"codes": load_file(file)["codes"]}, file),  # without a checksum
        lambda file: shutil.copy(cached_files(file.parent.parent)[1], file),  # of another clip
        lambda file: (file.unlink(), file.symlink_to(file.parent)),
    ],
)
def test_a_damaged_cache_file_is_made_anew(
    damage: Callable[[Path], Any],
    own_clips: list[Path],
    processor: HiggsAudioV2Processor,
    encoder: CountingEncoder,
    tmp_path: Path,
    trainer_log: pytest.LogCaptureFixture,
) -> None:
    cache = CodeCache(processor.audio_tokenizer, tmp_path / "cache")
    before = cache.encode(own_clips)
    damage(cached_files(tmp_path / "cache")[0])
    assert_same_codes(cache.encode(own_clips), before)
    assert encoder.calls == len(own_clips) + 1
    assert [r for r in trainer_log.records if r.levelno == logging.WARNING and "unreadable" in r.getMessage()]
    assert_same_codes(cache.encode(own_clips), before)
    assert encoder.calls == len(own_clips) + 1


def test_what_a_killed_run_left_half_written_does_no_harm(
    own_clips: list[Path], processor: HiggsAudioV2Processor, encoder: CountingEncoder, tmp_path: Path
) -> None:
    cache = CodeCache(processor.audio_tokenizer, tmp_path / "cache")
    before = cache.encode(own_clips)
    whole = cached_files(tmp_path / "cache")[0]
    whole.rename(whole.with_suffix(".1.partial")).write_bytes(b"half")
    assert_same_codes(cache.encode(own_clips), before)
    assert encoder.calls == len(own_clips) + 1


def test_a_failing_encoder_leaves_no_torn_file(
    own_clips: list[Path], processor: HiggsAudioV2Processor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(tensors: Any, file: str) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space left")

    cache = CodeCache(processor.audio_tokenizer, tmp_path / "cache")
    with monkeypatch.context() as full_disk:
        full_disk.setattr(trainer.code_cache, "save_file", fail)
        with pytest.raises(OSError, match="no space left"):
            cache.encode(own_clips)
    assert cached_files(tmp_path / "cache") == []
    assert set(cache.encode(own_clips)) == set(own_clips)


def test_the_cache_is_where_hf_home_says(hf_home: Path) -> None:
    assert default_cache_dir() == hf_home / "strategic_telemetry" / "audio_codes"


def test_two_that_fill_one_cache_at_once_do_each_other_no_harm(
    own_clips: list[Path], processor: HiggsAudioV2Processor, encoder: CountingEncoder, tmp_path: Path
) -> None:
    """Both write every clip: neither begins to write before the other has found it missing."""
    expected = CodeCache(processor.audio_tokenizer, tmp_path / "other").encode(own_clips)
    caches = [CodeCache(processor.audio_tokenizer, tmp_path / "cache") for _ in range(2)]
    both_look = threading.Barrier(2)

    class Waiting(CountingEncoder):
        def __call__(self, codec: Any, samples: np.ndarray) -> Tensor:
            both_look.wait(60)
            return super().__call__(codec, samples)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        Waiting(patch)
        found = list(pool.map(lambda cache: cache.encode(own_clips), caches))
    for codes in (*found, caches[0].encode(own_clips)):
        assert_same_codes(codes, expected)
    assert [file.suffix for file in (tmp_path / "cache").rglob("*.*")] == [".safetensors"] * len(own_clips)
