"""Tiny real speech models of transformers, and batches for each whose every code is known."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trainer  # noqa: F401  # makes an installed torchaudio importable before transformers imports it

# isort: split
import torch
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler
from transformers import (
    CsmConfig,
    CsmDepthDecoderConfig,
    CsmForConditionalGeneration,
    DiaConfig,
    DiaDecoderConfig,
    DiaEncoderConfig,
    DiaForConditionalGeneration,
    MimiConfig,
    MimiModel,
    MoshiConfig,
    MoshiDepthConfig,
    MoshiForConditionalGeneration,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from telemetry.backends.memory import MemoryBackend

from .models import sure
from .steps import quiet_arguments

IGNORED = -100
CODEBOOKS, CODES = 4, 8
SAMPLES = 8  # of the waveform in a frame
AUDIO, AUDIO_END, PAD = 30, 31, 0
SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
DELAY = (0, 2, 3)
DIA_BEGIN, DIA_END, DIA_PAD = 10, 8, 9

Batch = Mapping[str, Any]


def mimi_config() -> MimiConfig:
    """Of a codec of 8 samples a frame."""
    return MimiConfig(
        hidden_size=8,
        num_filters=2,
        upsampling_ratios=[2, 2],
        codebook_size=CODES,
        codebook_dim=4,
        num_quantizers=CODEBOOKS,
        vector_quantization_hidden_dimension=4,
        upsample_groups=8,
        num_hidden_layers=1,
        intermediate_size=8,
        num_attention_heads=1,
        num_key_value_heads=1,
        sliding_window=8,
        sampling_rate=800,
    )


def codec() -> Any:
    """Such a codec whose codes differ from frame to frame; it is not trained."""
    made = sure(lambda: MimiModel(mimi_config()), 3, 0.4).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(9)
    for name, entries in made.named_buffers():
        if name.endswith("embed_sum"):  # the codebooks, all zeros in a new model
            entries.normal_(std=0.3, generator=generator)
    return made


def csm(**options: Any) -> Any:
    """A Csm of 2 layers and a depth decoder of one; codes are below 8, of 12 ids, and 0 in all codebooks is an end."""
    depth = CsmDepthDecoderConfig(
        **SHAPE, num_codebooks=CODEBOOKS, backbone_hidden_size=16, vocab_size=12, num_hidden_layers=1,
        max_position_embeddings=CODEBOOKS + 1,
    )  # fmt: skip
    config = CsmConfig(
        **SHAPE,
        num_codebooks=CODEBOOKS,
        vocab_size=12,
        text_vocab_size=32,
        num_hidden_layers=2,
        max_position_embeddings=64,
        pad_token_id=PAD,
        codebook_pad_token_id=11,
        codebook_eos_token_id=0,
        bos_token_id=1,
        audio_token_id=AUDIO,
        audio_eos_token_id=AUDIO_END,
        depth_decoder_config=depth,
        codec_config=mimi_config(),
        **options,
    )
    made = sure(lambda: CsmForConditionalGeneration(config), 5, 0.3)
    made.codec_model = codec()
    return made


def dia() -> Any:
    """A Dia of one layer each, with 3 codebooks of 8 codes."""
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    sizes |= {"head_dim": 8, "intermediate_size": 24, "max_position_embeddings": 64}
    config = DiaConfig(
        encoder_config=DiaEncoderConfig(**sizes, vocab_size=32),
        decoder_config=DiaDecoderConfig(
            **{**sizes, "num_hidden_layers": 2},
            cross_num_attention_heads=2,
            cross_head_dim=8,
            cross_num_key_value_heads=2,
            cross_hidden_size=16,
            vocab_size=12,
            num_channels=len(DELAY),
            eos_token_id=DIA_END,
            pad_token_id=DIA_PAD,
            bos_token_id=DIA_BEGIN,
        ),
        delay_pattern=list(DELAY),
    )
    return sure(lambda: DiaForConditionalGeneration(config), 6, 0.3)


def moshi() -> Any:
    """A Moshi of 2 layers and a depth decoder of one, with 4 codebooks of 8 codes."""
    shared: dict[str, Any] = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "ffn_dim": 24,
        "hidden_size": 16,
    }
    shared |= {"num_codebooks": CODEBOOKS, "vocab_size": 32, "audio_vocab_size": CODES}
    config = MoshiConfig(
        **shared,
        num_hidden_layers=2,
        max_position_embeddings=64,
        audio_encoder_config=mimi_config(),
        depth_decoder_config=MoshiDepthConfig(**shared, input_size=16, num_hidden_layers=1),
    )
    made = sure(lambda: MoshiForConditionalGeneration(config), 7, 0.3)
    made.freeze_audio_encoder()
    return made


def numbers(count: int, seed: int, low: int, high: int) -> list[int]:
    """``count`` numbers from ``low`` to ``high - 1``."""
    generator = random.Random(seed)
    return [generator.randrange(low, high) for _ in range(count)]


def waveform(frames: int, seed: int) -> list[float]:
    """Noise that a codec makes so many frames of."""
    generator = random.Random(seed)
    return [generator.uniform(-1, 1) for _ in range(frames * SAMPLES)]


def padded(rows: Sequence[Sequence[Any]], fill: Any, left: bool = False) -> Tensor:
    """Rows at one length."""
    most = max(map(len, rows))
    return torch.tensor(
        [[fill] * (most - len(row)) * left + [*row] + [fill] * (most - len(row)) * (not left) for row in rows]
    )


def csm_waveforms(
    *samples: Sequence[tuple[int, int, Sequence[int]]], left: bool = False, missing: int = 0
) -> dict[str, Tensor]:
    """Conversations for Csm with waveforms.

    Args:
        samples: each a sequence of turns: tokens of text, frames of audio, and the labels of these frames and of their
            end (the token's id, -100 or -101).
        left: whether padding stands on the left.
        missing: samples that the last frame of every clip lacks.
    """
    ids: list[list[int]] = [[] for _ in samples]
    labels: list[list[int]] = [[] for _ in samples]
    values: list[list[float]] = [[] for _ in samples]
    cutoffs: list[list[int]] = [[] for _ in samples]
    for row, turns in enumerate(samples):
        for turn, (text, frames, taught) in enumerate(turns):
            seed = 100 * row + turn
            assert len(taught) == frames + 1
            ids[row] += [*numbers(text, seed, 2, 30), *[AUDIO] * frames, AUDIO_END]
            labels[row] += [*[IGNORED] * text, *taught]
            values[row] += waveform(frames, seed)[: frames * SAMPLES - missing]
            cutoffs[row].append(len(values[row]))
    return {
        "input_ids": padded(ids, PAD, left),
        "attention_mask": padded([[1] * len(row) for row in ids], 0, left),
        "labels": padded(labels, IGNORED, left),
        "input_values": padded(values, 0.0)[:, None],
        "input_values_cutoffs": padded(cutoffs, -1),
    }


def taught(frames: int, depth_every: int = 1) -> list[int]:
    """Labels of a clip and its end: all for the backbone, and one of ``depth_every`` frames for the depth decoder."""
    return [AUDIO if at % depth_every == 0 else -101 for at in range(frames)] + [AUDIO_END]


def csm_codes(*clips: tuple[int, int], left: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Codes for Csm: of every sample, frames of context and frames that are taught, each with its end."""
    frames, labels = [], []
    for row, (context, target) in enumerate(clips):
        own: list[list[int]] = []
        given: list[list[int]] = []
        for part, length in enumerate((context, target)):
            if not length:
                continue
            codes = [numbers(CODEBOOKS, seed + 997 * row + 31 * at + 7 * part, 0, CODES) for at in range(length)]
            codes = [code if any(code) else [1] * CODEBOOKS for code in codes] + [[0] * CODEBOOKS]
            own += codes
            given += codes if part else [[IGNORED] * CODEBOOKS] * len(codes)
        frames.append(own)
        labels.append(given)
    return {
        "input_ids": padded(frames, [11] * CODEBOOKS, left),
        "attention_mask": padded([[1] * len(row) for row in frames], 0, left),
        "labels": padded(labels, [IGNORED] * CODEBOOKS, left),
    }


def dia_batch(*clips: tuple[int, int, int], flat: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """What a processor makes for Dia: of every sample, tokens of text, frames of a prompt and frames that are taught.

    Text is padded on the right, audio on the left, as the processor does it.
    """
    texts, frames, masks, labels = [], [], [], []
    most = max(prompt + target for _, prompt, target in clips)
    for row, (text, prompt, target) in enumerate(clips):
        texts.append(numbers(text, seed + row, 1, 32))
        missing = most - prompt - target
        streams, marks = [], []
        for k, delay in enumerate(DELAY):
            codes = numbers(prompt + target, seed + 53 * row + k, 0, CODES)
            tail = [DIA_PAD] * (max(DELAY) - delay)
            streams.append([DIA_BEGIN] * (missing + 1 + delay) + codes + [DIA_END] + tail)
            marks.append(
                [IGNORED] * (missing + 1 + delay + prompt) + codes[prompt:] + [DIA_END] + [IGNORED] * len(tail)
            )
        frames.append([list(frame) for frame in zip(*streams, strict=True)][:-1])
        labels += [stream[1:] for stream in marks]
        masks.append([0] * missing + [1] * (len(frames[-1]) - missing))
    given = torch.tensor(frames)
    return {
        "input_ids": padded(texts, 0),
        "attention_mask": padded([[1] * len(row) for row in texts], 0),
        "decoder_input_ids": given.transpose(1, 2).reshape(-1, given.shape[1]) if flat else given,
        "decoder_attention_mask": torch.tensor(masks),
        "labels": torch.tensor(labels),
    }


def moshi_batch(*lengths: int, audio: bool = True, left: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """What a collator makes for Moshi: of every sample so many positions; padding has no label in the audio."""
    text = [numbers(length, seed + row, 0, 32) for row, length in enumerate(lengths)]
    ids = padded(text, 0, left)
    batch = {"input_ids": ids, "text_labels": ids}
    for at, name in enumerate(("moshi_audio_codes", "user_audio_codes")):
        codebooks = [
            [numbers(length, seed + at + 17 * row + 3 * k, 0, CODES) for row, length in enumerate(lengths)]
            for k in range(CODEBOOKS)
        ]
        batch[name] = torch.stack([padded(rows, CODES, left) for rows in codebooks], dim=1)
    return batch | ({"audio_labels": batch["moshi_audio_codes"]} if audio else {})


@dataclass
class Tokens:
    """Every token that was to be predicted, by stream: its logits, the token, and whether it is an end."""

    streams: dict[str | int, list[tuple[list[float], int, bool]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, stream: str | int, logits: list[float], token: int, is_end: bool = False) -> None:
        self.streams[stream].append((logits, token, is_end))

    def extend(self, other: Tokens) -> None:
        for stream, tokens in other.streams.items():
            self.streams[stream] += tokens

    def losses(self, of: str = "audio") -> list[float]:
        """Minus the log probabilities of ``text``, or of all codebooks."""
        of_group = [tokens for stream, tokens in self.streams.items() if (stream == "text") == (of == "text")]
        return [_surprise(logits, token) for tokens in of_group for logits, token, _ in tokens]

    def mean_loss(self, of: str = "audio") -> float:
        losses = self.losses(of)
        return math.fsum(losses) / len(losses)

    def values(self, end: int | None = None) -> dict[str, float]:
        """What is shown of them under ``outputs/``, without the loss as a whole."""
        codebooks = {k: tokens for k, tokens in self.streams.items() if isinstance(k, int)}
        audio = [token for tokens in codebooks.values() for token in tokens]
        named = {"audio": audio, **{f"codebook_{k}": tokens for k, tokens in codebooks.items()}}
        if self.streams.get("text"):
            named["text"] = self.streams["text"]
        values = {}
        for name, tokens in named.items():
            ranks = [sum(one > logits[token] for one in logits) for logits, token, _ in tokens]
            values[f"outputs/loss/{name}"] = math.fsum(_surprise(*token[:2]) for token in tokens) / len(tokens)
            values[f"outputs/accuracy/{name}"] = sum(rank == 0 for rank in ranks) / len(ranks)
            values[f"outputs/top5/{name}"] = sum(rank < 5 for rank in ranks) / len(ranks)
        if end is not None:
            ends = [math.exp(-_surprise(logits, end)) for logits, _, is_end in audio if is_end]
            values["outputs/eos/probability"] = math.fsum(ends) / len(ends)
        return values


def _surprise(logits: Sequence[float], token: int) -> float:
    return math.log(math.fsum(math.exp(one) for one in logits)) - logits[token]


def of_step(batches: Sequence[Batch], step: int, accumulation: int) -> list[Batch]:
    """The microbatches of a step of :func:`train`: the last of an epoch has fewer."""
    per_epoch = -(-len(batches) // accumulation)
    begin = (step - 1) % per_epoch * accumulation
    return list(batches[begin : begin + accumulation])


def shown(backend: MemoryBackend, step: int, tags: Iterable[str]) -> dict[str, float]:
    """What was written of a step under some tags."""
    return {tag: backend.scalars(tag).get(step, math.nan) for tag in tags}


class OrderedTrainer(Trainer):
    """The Trainer itself, but it takes the batches as they come."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


class OrderedSeq2SeqTrainer(Seq2SeqTrainer):
    """The same for encoder-decoders."""

    _get_train_sampler = OrderedTrainer._get_train_sampler  # type: ignore[assignment]


def train(
    model: Any,
    batches: Sequence[Batch],
    directory: Path,
    callbacks: Sequence[Any] = (),
    steps: int = 4,
    accumulation: int = 2,
    eval_dataset: Any = None,
    processing_class: Any = None,
    **arguments: Any,
) -> Trainer:
    """Train on whole batches, one a microbatch."""
    sizes: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": accumulation,
        "max_steps": steps,
    }
    sizes |= {"per_device_eval_batch_size": 1, "prediction_loss_only": True}
    given = {"learning_rate": 0.01, "remove_unused_columns": False, **sizes, **arguments}
    encodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    made = (OrderedSeq2SeqTrainer if encodes else OrderedTrainer)(
        model=model,
        args=quiet_arguments(directory, Seq2SeqTrainingArguments if encodes else TrainingArguments, **given),
        train_dataset=batches,  # type: ignore[arg-type]
        data_collator=lambda rows: dict(rows[0]),
        eval_dataset=eval_dataset,
        processing_class=processing_class,
        callbacks=list(callbacks),
    )
    made.train()
    return made
