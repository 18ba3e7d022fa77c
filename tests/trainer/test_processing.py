"""The processor is loaded around the right codec, checked against the model, and can say a training sample."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import HiggsAudioV2Config, HiggsAudioV2Processor

from trainer.chatml import Sample
from trainer.codec import codec_sampling_rate
from trainer.dataset import IGNORE_INDEX, VoiceCloningDataset
from trainer.demo.prepare import Demonstration
from trainer.processing import check_processor, load_processor, training_template

# As the published one: audio only in the assistant's turn, where text raises.
PUBLISHED_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for item in message['content'] %}
            {%- if message['role'] == 'assistant' and item['type'] != 'audio' %}
                {{- raise_exception('The assistant can only speak.') }}
            {%- elif message['role'] == 'assistant' %}
                {{- '<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|>' }}
            {%- elif item['type'] == 'text' %}
                {{- item['text'] }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
"""
# Another wording that can say everything.
OWN_TEMPLATE = training_template().replace("'<|eot_id|>'", "'<|eot_id|>\\n'")


@pytest.fixture
def model_path(demo: Demonstration, tmp_path: Path) -> Path:
    """A copy of the model's directory, without weights, that a test may change."""
    return Path(shutil.copytree(demo.model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.fixture
def model_config(demo: Demonstration) -> HiggsAudioV2Config:
    return HiggsAudioV2Config.from_pretrained(demo.model)


def change_json(file: Path, **changes: Any) -> None:
    held = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    file.write_text(json.dumps({key: value for key, value in held.items() if value is not None}), encoding="utf-8")


def codec_directory(processor: HiggsAudioV2Processor) -> str:
    return processor.audio_tokenizer.config._name_or_path


# The codec


def test_the_codec_is_the_one_that_the_processor_names(model_path: Path, demo: Demonstration) -> None:
    processor = load_processor(str(model_path))
    assert codec_directory(processor) == str(demo.audio_tokenizer)
    assert processor.feature_extractor.sampling_rate == codec_sampling_rate(processor.audio_tokenizer) == 16000
    assert (processor.audio_stream_bos_id, processor.audio_stream_eos_id) == (64, 65)


def test_another_codec_can_be_given_and_is_saved_as_such(model_path: Path, demo: Demonstration, tmp_path: Path) -> None:
    other = shutil.copytree(demo.audio_tokenizer, tmp_path / "other")
    processor = load_processor(str(model_path), str(other))
    assert codec_directory(processor) == str(other)
    processor.save_pretrained(tmp_path / "saved")
    assert codec_directory(load_processor(str(tmp_path / "saved"))) == str(other)


def test_a_processor_that_names_no_codec(model_path: Path, demo: Demonstration) -> None:
    change_json(model_path / "processor_config.json", audio_tokenizer=None)
    with pytest.raises(ValueError, match="names no audio tokenizer: pass --audio_tokenizer_path"):
        load_processor(str(model_path))
    assert load_processor(str(model_path), str(demo.audio_tokenizer)).audio_token_id > 0


def test_missing_files_are_named(model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--model_path {tmp_path}/none: no processor_config.json there"):
        load_processor(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=f"no audio tokenizer at '{tmp_path}/none'"):
        load_processor(str(model_path), str(tmp_path / "none"))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (model_path / file).unlink()
    with pytest.raises(ValueError, match=f"--model_path {model_path}: no tokenizer there"):
        load_processor(str(model_path))


# What must agree


def test_what_belongs_together_passes(processor: HiggsAudioV2Processor, model_config: HiggsAudioV2Config) -> None:
    check_processor(processor, model_config)


def test_every_disagreement_is_named_at_once(
    processor: HiggsAudioV2Processor, model_config: HiggsAudioV2Config
) -> None:
    own = model_config.to_dict()
    other = copy.deepcopy(model_config)
    other.update(
        {
            "audio_token_id": own["audio_token_id"] + 100,
            "audio_bos_token_id": own["audio_bos_token_id"] + 100,
            "audio_delay_token_id": own["audio_delay_token_id"] + 100,
            "audio_stream_bos_id": 20,
            "audio_stream_eos_id": 21,
            "num_codebooks": 4,
            "codebook_size": 32,
            "vocab_size": len(processor.tokenizer) - 1,
        }
    )
    with pytest.raises(ValueError, match="do not belong together") as caught:
        check_processor(processor, other)
    tokens = len(processor.tokenizer)
    for said in (
        *(f"{name}: {own[name]} against the model's {own[name] + 100}" for name in _TOKEN_IDS),
        "audio_stream_bos_id: 64 against the model's 20",
        "audio_stream_eos_id: 65 against the model's 21",
        "number of codebooks: 8 against the model's 4",
        "codes and stream ids need 64 entries a codebook, the model has 32",
        f"the tokenizer has {tokens} tokens, the model {tokens - 1}",
        "Pass the --audio_tokenizer_path",
    ):
        assert said in str(caught.value)


_TOKEN_IDS = ("audio_token_id", "audio_bos_token_id", "audio_delay_token_id")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_codebooks": 7}, "number of codebooks: 8 against the model's 7"),
        ({"audio_stream_eos_id": 64}, "audio_stream_eos_id: 65 against the model's 64"),
        ({"codebook_size": 65}, "codes and stream ids need 66 entries a codebook, the model has 65"),
    ],
)
def test_a_single_disagreement_is_the_only_one_named(
    change: dict[str, int], said: str, processor: HiggsAudioV2Processor, model_config: HiggsAudioV2Config
) -> None:
    other = copy.deepcopy(model_config)
    other.update(change)
    with pytest.raises(ValueError, match="do not belong together") as caught:
        check_processor(processor, other)
    message = str(caught.value)
    assert f"together: {said}. Pass" in message


# The chat template


def warnings_of(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.levelno >= logging.WARNING]


@pytest.fixture
def published(model_path: Path) -> Path:
    (model_path / "chat_template.jinja").write_text(PUBLISHED_TEMPLATE, encoding="utf-8")
    return model_path


def test_a_template_that_cannot_say_a_sample_is_replaced_and_the_new_one_saved(
    published: Path, tmp_path: Path, trainer_log: pytest.LogCaptureFixture
) -> None:
    processor = load_processor(str(published))
    assert warnings_of(trainer_log) == [
        "the model's chat template cannot express these samples: using the trainer's own instead"
    ]
    assert processor.chat_template == processor.tokenizer.chat_template == training_template()

    processor.save_pretrained(tmp_path / "saved")
    trainer_log.clear()
    again = load_processor(str(tmp_path / "saved"))
    assert again.chat_template == training_template()
    assert warnings_of(trainer_log) == []


def test_samples_of_a_model_with_the_published_template_are_whole(
    published: Path, demo_samples: list[Sample], demo_codes: dict[Path, Any]
) -> None:
    processor = load_processor(str(published))
    [example] = VoiceCloningDataset(demo_samples[:1], processor, demo_codes)
    supervised = example.labels[example.labels != IGNORE_INDEX]
    assert processor.tokenizer.decode(supervised) == demo_samples[0].target_transcript
    assert (example.input_ids == processor.audio_delay_token_id).sum() == 2 * 7  # reference and target


def test_a_template_that_can_say_a_sample_is_kept(model_path: Path, trainer_log: pytest.LogCaptureFixture) -> None:
    (model_path / "chat_template.jinja").write_text(OWN_TEMPLATE, encoding="utf-8")
    assert load_processor(str(model_path)).chat_template == OWN_TEMPLATE != training_template()
    assert warnings_of(trainer_log) == []


def test_a_model_without_a_template_gets_the_trainers_own(
    model_path: Path, trainer_log: pytest.LogCaptureFixture
) -> None:
    (model_path / "chat_template.jinja").unlink()
    change_json(model_path / "tokenizer_config.json", chat_template=None)
    assert load_processor(str(model_path)).chat_template == training_template()
    assert warnings_of(trainer_log) == []
