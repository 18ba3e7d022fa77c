"""Voice-cloning samples as model inputs: text ids, audio codes in delay pattern, and labels for the target alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import HiggsAudioV2Processor

from trainer.audio import probe_audio, read_audio
from trainer.chatml import AudioContent, Message, Sample, TextContent
from trainer.codec import codec_frame_rate, codec_num_codebooks, codec_sampling_rate
from trainer.processing import codec_of

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Waveform:
    """A clip of a sample, read when it is asked for: encoded audio needs no waveform to train on.

    Attributes:
        path: the audio file.
        sampling_rate: of ``samples``, in hertz.
        seconds: the clip's length.
    """

    path: Path
    sampling_rate: int
    seconds: float

    @property
    def samples(self) -> np.ndarray:
        """float32 ``[samples]``, mono.

        Raises:
            AudioError: when the file is no longer readable.
        """
        return read_audio(self.path, self.sampling_rate)

    @property
    def file_sampling_rate(self) -> int:
        """Of the file, in hertz, before it is resampled.

        Raises:
            AudioError: when the file is no longer readable.
        """
        return probe_audio(self.path).sampling_rate


@dataclass(frozen=True)
class Example:
    """One sample, ready to be batched.

    Attributes:
        input_ids: int64 ``[sequence]``.
        labels: int64 ``[sequence]``: the target text, :data:`IGNORE_INDEX` elsewhere.
        audio_input_ids: int64 ``[frames, codebooks]``: every clip in delay pattern, one after the other.
        audio_labels: int64 ``[frames, codebooks]``: the target clips' codes and the first end of stream of every
            codebook, :data:`IGNORE_INDEX` elsewhere.
        metadata: what the model must not see: ids, transcripts, ``reference`` and ``target`` waveforms.
    """

    input_ids: Tensor
    labels: Tensor
    audio_input_ids: Tensor
    audio_labels: Tensor
    metadata: Mapping[str, Any] = field(default_factory=dict)


class VoiceCloningDataset(Dataset[Example]):
    """Checked samples with their codes, laid out by the conventions of ``HiggsAudioV2Processor``.

    The processor's own ``output_labels=True`` supervises the prompt and the reference and masks every end of stream;
    here only the target text and the target codes are supervised, and every codebook learns where to stop.

    All samples are tokenized at once, so that a sample that cannot be is known before training.

    Args:
        samples: from ``load_samples``.
        processor: chat template, delay pattern, stream ids.
        codes: int64 ``[codebooks, frames]`` for every audio path of the samples.

    Raises:
        ValueError: when a sample cannot be laid out; names it, the reason and the mend.
    """

    def __init__(
        self, samples: Sequence[Sample], processor: HiggsAudioV2Processor, codes: Mapping[Path, Tensor]
    ) -> None:
        self.samples = list(samples)
        self._processor = processor
        self._codes = codes
        self._bos, self._eos = processor.audio_stream_bos_id, processor.audio_stream_eos_id
        codec = codec_of(processor)
        self._codebooks = codec_num_codebooks(codec)
        self._sampling_rate = codec_sampling_rate(codec)
        self._frame_rate = codec_frame_rate(codec)
        self._texts = [self._text(sample) for sample in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Example:
        sample = self.samples[index]
        return Example(*self._texts[index], *self._audio(sample), self.metadata(index))

    def _text(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """``input_ids`` and ``labels``, each int64 ``[sequence]``."""
        rendered, spans = self._render(sample)
        encoded = self._processor.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        lengths = iter([len(self._delay(self._codes[clip.path])) for clip in _clips(sample.messages)])
        self._check_placeholders(sample, encoded["input_ids"])
        input_ids: list[int] = []
        labels: list[int] = []
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if token == self._processor.audio_token_id:
                frames, delays = next(lengths), self._codebooks - 1
                # As many as there are frames, the last ones for the codebooks that end later.
                input_ids += [token] * (frames - delays) + [self._processor.audio_delay_token_id] * delays
                labels += [IGNORE_INDEX] * frames
            else:
                input_ids.append(token)
                is_supervised = any(max(start, first) < min(end, last) for first, last in spans)
                labels.append(token if is_supervised else IGNORE_INDEX)
        return torch.tensor(input_ids), torch.tensor(labels)

    def _audio(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """``audio_input_ids`` and ``audio_labels``, each int64 ``[frames, codebooks]``."""
        frames, labels = [], []
        for clip in _clips(sample.messages):
            delayed = self._delay(self._codes[clip.path])
            frames.append(delayed)
            labels.append(self._supervise(delayed) if clip.is_target else torch.full_like(delayed, IGNORE_INDEX))
        return torch.cat(frames), torch.cat(labels)

    def _delay(self, codes: Tensor) -> Tensor:
        """Codes ``[codebooks, n]`` between stream BOS and EOS, codebook *k* shifted by *k* frames.

        Returns:
            int64 ``[n + 1 + codebooks, codebooks]``.
        """
        begin, end = (codes.new_full((codes.shape[0], 1), token) for token in (self._bos, self._eos))
        stream = torch.cat([begin, codes, end], dim=1)
        return self._processor.build_delay_pattern(stream[None])[0].transpose(0, 1).contiguous()

    def _supervise(self, delayed: Tensor) -> Tensor:
        """Labels of a target clip: its codes and the first EOS of each codebook; what generation forces has none."""
        ends = delayed == self._eos
        forced = ends & (ends.long().cumsum(dim=0) > 1)
        return delayed.masked_fill(forced | (delayed == self._bos), IGNORE_INDEX)

    def metadata(self, index: int) -> dict[str, Any]:
        """Return what travels beside the tensors of a sample: clips are read when they are asked for."""
        sample = self.samples[index]
        named = ("sample_id", "speaker", "language", "ref_transcript", "target_transcript")
        return {
            **{name: getattr(sample, name) for name in named},
            "reference": [self._waveform(path) for path in sample.references],
            "target": [self._waveform(path) for path in sample.targets],
        }

    def _waveform(self, path: Path) -> Waveform:
        return Waveform(path, self._sampling_rate, self._codes[path].shape[1] / self._frame_rate)

    def _render(self, sample: Sample) -> tuple[str, list[tuple[int, int]]]:
        """The whole conversation as text, and the character spans of its supervised text."""
        messages = [_as_chat(message) for message in sample.messages]
        spans: list[tuple[int, int]] = []
        for index, message in enumerate(sample.messages):
            if message.role != "assistant" or index < sample.start_index:
                continue
            upto = self._chat(messages[: index + 1])
            prompt = self._chat(messages[:index], add_generation_prompt=True)
            # The prompt may begin the audio after the header, and a text may begin as that token does.
            at = _shared_length(upto, prompt.removesuffix(self._processor.audio_bos_token))
            for text in _texts(message):
                found = upto.find(text, at)
                if found < 0:
                    raise _layout_error(sample, "the chat template does not show the target text as it is")
                spans.append((found, found + len(text)))
                at = found + len(text)
        return self._chat(messages), spans

    def _chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        return str(
            self._processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        )

    def _check_placeholders(self, sample: Sample, ids: Sequence[int]) -> None:
        clips, found = sum(1 for _ in _clips(sample.messages)), ids.count(self._processor.audio_token_id)
        if found != clips or self._processor.audio_delay_token_id in ids:
            raise _layout_error(
                sample, f"{found} audio tokens for {clips} clips: a text holds an audio token of the model's"
            )


def _shared_length(text: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, other, strict=False)))


def _clips(messages: Sequence[Message]) -> Iterator[AudioContent]:
    return (item for message in messages for item in message.content if isinstance(item, AudioContent))


def _texts(message: Message) -> Iterator[str]:
    return (item.text.strip() for item in message.content if isinstance(item, TextContent) and item.text.strip())


def _as_chat(message: Message) -> dict[str, Any]:
    content = [
        {"type": "text", "text": item.text} if isinstance(item, TextContent) else {"type": "audio"}
        for item in message.content
    ]
    return {"role": message.role, "content": content}


def _layout_error(sample: Sample, what: str) -> ValueError:
    return ValueError(f"{sample.source} ({sample.sample_id!r}): {what}. Change the text or the chat template.")
