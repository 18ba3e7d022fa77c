"""Makes everything that the training script needs to run the demonstration, in one directory.

``DIR/model`` holds a small untrained Higgs Audio v2 with its tokenizer and processor, ``DIR/audio_tokenizer`` the
demonstration codec, ``DIR/clips`` the speech, ``DIR/train.json`` and ``DIR/eval.json`` the samples. A second run over
the same directory writes the same files again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    DacFeatureExtractor,
    HiggsAudioV2Config,
    HiggsAudioV2ForConditionalGeneration,
    HiggsAudioV2Processor,
    PreTrainedTokenizerFast,
)

from trainer.audio import read_audio
from trainer.codec import codec_sampling_rate, load_audio_tokenizer
from trainer.demo.codec import DemonstrationCodec, DemonstrationCodecConfig
from trainer.demo.synthesize import CLIPS_DIRECTORY, Clip, read_manifest
from trainer.processing import training_template

SYSTEM_PROMPT = "You are a voice cloning assistant. Speak the text in the voice of the reference audio."
TARGET_PROMPT = "Please say this in the same voice: "

BOS_TOKEN = "<|begin_of_text|>"
PAD_TOKEN = "<|end_of_text|>"
EOS_TOKEN = "<|eot_id|>"
AUDIO_BOS_TOKEN = "<|audio_out_bos|>"
AUDIO_TOKEN = "<|AUDIO_OUT|>"
AUDIO_EOS_TOKEN = "<|audio_eos|>"
AUDIO_DELAY_TOKEN = "<|reserved_special_token_6|>"
_OTHER_SPECIAL_TOKENS = (
    "<|start_header_id|>",
    "<|end_header_id|>",
    AUDIO_BOS_TOKEN,
    AUDIO_TOKEN,
    AUDIO_EOS_TOKEN,
    AUDIO_DELAY_TOKEN,
)

_VOCABULARY_LIMIT = 600
_SEED = 0


@dataclass(frozen=True)
class Demonstration:
    """What :func:`prepare` has made.

    Attributes:
        model: directory of the model, its tokenizer and processor.
        audio_tokenizer: directory of the demonstration codec.
        train_file: training samples of the training voices.
        eval_file: samples of voices that are in no training sample, and three of the training samples to compare.
        train_samples: how many there are.
        eval_samples: how many there are.
    """

    model: Path
    audio_tokenizer: Path
    train_file: Path
    eval_file: Path
    train_samples: int
    eval_samples: int


def prepare(directory: Path, show_progress: bool = True) -> Demonstration:
    """Write the demonstration's model, codec, clips and data files into ``directory``; takes a few seconds.

    Args:
        directory: made where it is missing. Files of the same names are written over, others left alone.
        show_progress: whether to show a progress bar.

    Raises:
        OSError: when the directory cannot be written.
    """
    directory = directory.expanduser().resolve()  # the processor names its codec by this path, from wherever it is read
    made = Demonstration(
        model=directory / "model",
        audio_tokenizer=directory / "audio_tokenizer",
        train_file=directory / "train.json",
        eval_file=directory / "eval.json",
        train_samples=len(samples_of("train")),
        eval_samples=len(eval_samples()),
    )
    steps: dict[str, Callable[[], None]] = {
        "clips": lambda: copy_clips(directory / "clips"),
        "data files": lambda: write_data_files(made),
        "codec": lambda: fit_codec().save_pretrained(made.audio_tokenizer),
        "model": lambda: save_model(made),
    }
    with tqdm(steps.items(), desc="preparing", unit="part", disable=not show_progress) as progress:
        for name, step in progress:
            progress.set_postfix_str(name)
            step()
    return made


def copy_clips(directory: Path) -> None:
    """Copy the bundled clips into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    for clip in read_manifest():
        shutil.copyfile(CLIPS_DIRECTORY / clip.file, directory / clip.file)


def write_data_files(made: Demonstration) -> None:
    """Write the training and evaluation samples as JSON lists."""
    for path, samples in ((made.train_file, samples_of("train")), (made.eval_file, eval_samples())):
        text = json.dumps(samples, ensure_ascii=False, indent=1)
        path.write_text(text + "\n", encoding="utf-8")


def samples_of(split: str) -> list[dict[str, Any]]:
    """The samples of one split: every clip is the target once, with its speaker's next sentence as reference.

    Audio paths are relative to the data file.
    """
    clips = [clip for clip in read_manifest() if clip.split == split]
    samples = []
    for target in clips:
        own = [clip for clip in clips if clip.speaker == target.speaker]
        samples.append(_sample(split, target, own[(own.index(target) + 1) % len(own)]))
    return samples


def eval_samples() -> list[dict[str, Any]]:
    """The evaluation split, with a training sample of each language: what was learnt by heart, next to what was not.

    The first six are one of either kind for each language, so that a few generated clips show both.
    """
    unheard, heard = samples_of("eval"), samples_of("train")
    first = []
    for language in dict.fromkeys(sample["misc"]["language"] for sample in unheard):
        for samples in (unheard, heard):
            first.append(next(sample for sample in samples if sample["misc"]["language"] == language))
    return first + [sample for sample in unheard if sample not in first]


def _sample(split: str, target: Clip, reference: Clip) -> dict[str, Any]:
    user = [
        {"type": "text", "text": reference.transcript},
        {"type": "audio", "audio_url": f"clips/{reference.file}"},
        {"type": "text", "text": TARGET_PROMPT + target.transcript},
    ]
    assistant = [
        {"type": "text", "text": target.transcript},
        {"type": "audio", "audio_url": f"clips/{target.file}", "duration": target.seconds},
    ]
    return {
        "messages": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant},
        ],
        "start_index": 0,
        "speaker": target.speaker,
        "misc": {
            "sample_id": f"{split}-{Path(target.file).stem}",
            "ref_transcript": reference.transcript,
            "target_transcript": target.transcript,
            "duration": target.seconds,
            "language": target.language,
        },
    }


def fit_codec() -> DemonstrationCodec:
    """A demonstration codec fitted to the training voices only, so that the evaluation voices are new to it too."""
    config = DemonstrationCodecConfig()
    paths = [CLIPS_DIRECTORY / clip.file for clip in read_manifest() if clip.split == "train"]
    waveforms = [torch.from_numpy(read_audio(path, config.sample_rate)) for path in paths]
    return DemonstrationCodec.fit(waveforms, config, seed=_SEED)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the demonstration's texts; it can encode every text.

    Special tokens are those of Higgs Audio v2, with ids of their own.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY_LIMIT,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[BOS_TOKEN, PAD_TOKEN, EOS_TOKEN, *_OTHER_SPECIAL_TOKENS],
        show_progress=False,
    )
    texts = [SYSTEM_PROMPT, TARGET_PROMPT, "system user assistant \n\n"]
    tokenizer.train_from_iterator(texts + [clip.transcript for clip in read_manifest()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        additional_special_tokens=list(_OTHER_SPECIAL_TOKENS),
        chat_template=training_template(),
        clean_up_tokenization_spaces=False,
    )


def model_config(tokenizer: PreTrainedTokenizerFast, codec: DemonstrationCodecConfig) -> HiggsAudioV2Config:
    """Configuration of the demonstration model, its ids those of ``tokenizer`` and ``codec``.

    Start and end of stream are the two ids after the codec's codes.
    """
    ids = tokenizer.get_vocab()
    return HiggsAudioV2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        num_codebooks=codec.num_quantizers,
        codebook_size=codec.codebook_size + 2,
        audio_stream_bos_id=codec.codebook_size,
        audio_stream_eos_id=codec.codebook_size + 1,
        audio_token_id=ids[AUDIO_TOKEN],
        audio_bos_token_id=ids[AUDIO_BOS_TOKEN],
        audio_delay_token_id=ids[AUDIO_DELAY_TOKEN],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def save_model(made: Demonstration) -> None:
    """Save the untrained model, the tokenizer and the processor; reads the codec saved before.

    Global random state is left as it was.
    """
    tokenizer = train_tokenizer()
    codec = load_audio_tokenizer(str(made.audio_tokenizer))
    config = model_config(tokenizer, DemonstrationCodecConfig.from_pretrained(made.audio_tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)
    model.save_pretrained(made.model)
    processor = HiggsAudioV2Processor(
        feature_extractor=DacFeatureExtractor(
            feature_size=1, hop_length=1, sampling_rate=codec_sampling_rate(codec), padding_value=0.0
        ),
        tokenizer=tokenizer,
        audio_tokenizer=codec,
        chat_template=tokenizer.chat_template,
        audio_stream_bos_id=config.audio_stream_bos_id,
        audio_stream_eos_id=config.audio_stream_eos_id,
    )
    processor.save_pretrained(made.model)
