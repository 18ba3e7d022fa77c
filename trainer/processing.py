"""Loads a model's processor with the codec that training uses, and checks that the three belong together."""

from __future__ import annotations

import json
import logging
from importlib import resources
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, DacFeatureExtractor, HiggsAudioV2Config, HiggsAudioV2Processor
from transformers.utils.hub import cached_file

from trainer.codec import codec_num_codebooks, codec_sampling_rate, load_audio_tokenizer

logger = logging.getLogger(__name__)

_PROBE = (
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "r"}, {"type": "audio"}, {"type": "text", "text": "t"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "t"}, {"type": "audio"}]},
)


def load_processor(
    model_path: str, audio_tokenizer_path: str | None = None, device: Any = None
) -> HiggsAudioV2Processor:
    """The processor of a model, around a codec.

    Args:
        model_path: a directory or hub id with tokenizer and ``processor_config.json``.
        audio_tokenizer_path: the codec; by default the one that the processor names.
        device: where the codec encodes; by default the CPU.

    Raises:
        ValueError: when there is no processor, or none of its parts can be loaded; says which and what to do.
    """
    settings = _read_settings(model_path)
    codec_path = audio_tokenizer_path or (settings.get("audio_tokenizer") or {}).get("audio_tokenizer_name_or_path")
    if not codec_path:
        raise ValueError(f"the processor of {model_path} names no audio tokenizer: pass --audio_tokenizer_path")
    codec = load_audio_tokenizer(str(codec_path), device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model_path {model_path}: no tokenizer there ({error})") from error
    processor = HiggsAudioV2Processor(
        feature_extractor=DacFeatureExtractor(
            feature_size=1, hop_length=1, sampling_rate=codec_sampling_rate(codec), return_attention_mask=True
        ),
        tokenizer=tokenizer,
        audio_tokenizer=codec,
        chat_template=tokenizer.chat_template,
        **{key: settings[key] for key in _STREAM_SETTINGS if key in settings},
    )
    _use_training_template(processor)
    return processor


_STREAM_SETTINGS = (
    "audio_token",
    "audio_bos_token",
    "audio_eos_token",
    "audio_delay_token",
    "audio_stream_bos_id",
    "audio_stream_eos_id",
)


def check_processor(processor: HiggsAudioV2Processor, config: HiggsAudioV2Config) -> None:
    """Make sure that processor, codec and model agree.

    Raises:
        ValueError: names every disagreement: token ids, number of codebooks, codebook size, stream ids.
    """
    codec = codec_of(processor)
    pairs = {
        "audio_token_id": (processor.audio_token_id, config.audio_token_id),
        "audio_bos_token_id": (processor.audio_bos_token_id, config.audio_bos_token_id),
        "audio_delay_token_id": (processor.audio_delay_token_id, config.audio_delay_token_id),
        "audio_stream_bos_id": (processor.audio_stream_bos_id, config.audio_stream_bos_id),
        "audio_stream_eos_id": (processor.audio_stream_eos_id, config.audio_stream_eos_id),
        "number of codebooks": (codec_num_codebooks(codec), config.num_codebooks),
    }
    faults = [f"{name}: {own} against the model's {other}" for name, (own, other) in pairs.items() if own != other]
    needed = max(int(codec.config.codebook_size), config.audio_stream_bos_id + 1, config.audio_stream_eos_id + 1)
    if needed > config.codebook_size:
        faults.append(f"codes and stream ids need {needed} entries a codebook, the model has {config.codebook_size}")
    if len(processor.tokenizer) > config.vocab_size:
        faults.append(f"the tokenizer has {len(processor.tokenizer)} tokens, the model {config.vocab_size}")
    if faults:
        raise ValueError(
            "the model, its processor and the audio tokenizer do not belong together: "
            + "; ".join(faults)
            + ". Pass the --audio_tokenizer_path that the model was trained with."
        )


def codec_of(processor: HiggsAudioV2Processor) -> Any:
    """The audio tokenizer that a processor encodes with."""
    return processor.audio_tokenizer  # type: ignore[attr-defined]


def training_template() -> str:
    """The project's chat template: audio in any turn, and text before audio in the assistant's."""
    return resources.files("trainer").joinpath("chat_template.jinja").read_text(encoding="utf-8")


def _read_settings(model_path: str) -> dict[str, Any]:
    try:
        path = cached_file(model_path, "processor_config.json")
    except OSError as error:
        raise ValueError(
            f"--model_path {model_path}: no processor_config.json there ({error}). Give a directory or hub id with "
            "model, tokenizer and HiggsAudioV2Processor, such as bosonai/higgs-audio-v2-generation-3B-base."
        ) from error
    return dict(json.loads(Path(str(path)).read_text(encoding="utf-8")))


def _use_training_template(processor: HiggsAudioV2Processor) -> None:
    """Keep the checkpoint's chat template if it can say a training sample, else take the project's.

    The published template drops audio in the user's turn and refuses text in the assistant's. What is trained is
    saved with the template that it was trained with.
    """
    if not _can_say(processor, _PROBE):
        if processor.chat_template:
            logger.warning("the model's chat template cannot express these samples: using the trainer's own instead")
        processor.chat_template = training_template()
        processor.tokenizer.chat_template = processor.chat_template


def _can_say(processor: HiggsAudioV2Processor, messages: tuple[dict[str, Any], ...]) -> bool:
    if not processor.chat_template:
        return False
    try:
        rendered = processor.apply_chat_template(list(messages), tokenize=False)
    except Exception:  # noqa: BLE001  (a template raises whatever it likes)
        return False
    return bool(rendered.count(processor.audio_token) == 2 and rendered.count("t" + processor.audio_bos_token) == 1)
