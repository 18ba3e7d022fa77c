"""A small audio codec fitted in seconds, so that the demonstration needs no download.

It is a demonstration codec: good enough to recognise a voice by ear and to exercise every part of the training, and
not meant for real training. Train with ``HiggsAudioV2TokenizerModel`` weights instead.

A frame of 40 ms is the log-mel vectors of its four 10 ms sub-frames, stacked, and residual vector quantized. The
codebooks are fitted by k-means, stage by stage, as SoundStream initialises its own (Zeghidour et al. 2021,
"SoundStream: An End-to-End Neural Audio Codec", https://arxiv.org/abs/2107.03312, section III-C and algorithm 1).
Decoding inverts the mel filters by least squares and finds a phase with the fast Griffin-Lim algorithm (Perraudin,
Balazs, Søndergaard 2013, "A fast Griffin-Lim algorithm", https://doi.org/10.1109/WASPAA.2013.6701851).

Importing this module registers the codec with transformers' auto classes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForAudioTokenization, PreTrainedConfig, processing_utils
from transformers.audio_utils import mel_filter_bank
from transformers.modeling_utils import PreTrainedAudioTokenizerBase
from transformers.utils.generic import ModelOutput

_FLOOR = 1e-4  # of the mel magnitude: that of the rounding noise of 16-bit files
_KMEANS_ITERATIONS = 25
_GRIFFIN_LIM_ITERATIONS = 32
_GRIFFIN_LIM_MOMENTUM = 0.99  # the value that its authors recommend
_PHASE_SEED = 0


class DemonstrationCodecConfig(PreTrainedConfig):
    """Shape of a :class:`DemonstrationCodec`.

    Attributes:
        sample_rate: of the audio, in Hz; ``sampling_rate`` is the same.
        hop_length: samples of one frame of codes.
        subframes: log-mel vectors stacked to one frame.
        num_mels: mel filters.
        fft_size: samples of the analysis window.
        num_quantizers: residual stages, one codebook each.
        codebook_size: entries of each codebook.
    """

    model_type = "demonstration_codec"
    attribute_map = {"sampling_rate": "sample_rate"}  # noqa: RUF012  # transformers' own declaration

    sample_rate: int = 16000
    hop_length: int = 640
    subframes: int = 4
    num_mels: int = 40
    fft_size: int = 512
    num_quantizers: int = 8
    codebook_size: int = 64

    @property
    def subframe_length(self) -> int:
        """Samples between two log-mel vectors."""
        return self.hop_length // self.subframes

    @property
    def frame_size(self) -> int:
        """Values that describe one frame."""
        return self.subframes * self.num_mels


@dataclass
class DemonstrationCodecOutput(ModelOutput):
    """What the codec returns.

    Attributes:
        audio_codes: int64 ``[batch, num_quantizers, frames]``; absent from what ``decode`` returns.
        audio_values: float32 ``[batch, 1, samples]``; absent from what ``encode`` returns.
    """

    audio_codes: Tensor | None = None
    audio_values: Tensor | None = None


class DemonstrationCodec(PreTrainedAudioTokenizerBase):
    """Residual vector quantization of stacked log-mel frames, with the interface of ``HiggsAudioV2TokenizerModel``.

    Make one with :meth:`fit`; a codec made from a configuration alone has empty codebooks.
    """

    config: DemonstrationCodecConfig
    config_class = DemonstrationCodecConfig
    base_model_prefix = "demonstration_codec"
    main_input_name = "input_values"
    input_modalities = "audio"

    def __init__(self, config: DemonstrationCodecConfig) -> None:
        super().__init__(config)
        shape = (config.num_quantizers, config.codebook_size, config.frame_size)
        self.codebooks = nn.Parameter(torch.zeros(shape), requires_grad=False)
        self.post_init()

    @classmethod
    def fit(
        cls, waveforms: Sequence[Tensor], config: DemonstrationCodecConfig | None = None, seed: int = 0
    ) -> DemonstrationCodec:
        """A codec whose codebooks are fitted to ``waveforms``. Global random state is neither used nor changed.

        Args:
            waveforms: float32 ``[samples]`` each, mono, at the configuration's sample rate.
            config: shape of the codec; the default configuration when None.
            seed: of the choice of first codebook entries. The same seed gives the same codebooks.

        Raises:
            ValueError: when the waveforms have fewer frames than a codebook has entries.
        """
        codec = cls(config or DemonstrationCodecConfig())
        frames = torch.cat([codec._analyse(waveform[None])[0] for waveform in waveforms])
        generator = torch.Generator().manual_seed(seed)
        for codebook in codec.codebooks.unbind():
            codebook.copy_(_kmeans(frames, len(codebook), generator))
            frames = frames - codebook[_nearest(frames, codebook)]
        return codec.eval()

    @torch.no_grad()
    def encode(self, input_values: Tensor, **_: Any) -> DemonstrationCodecOutput:
        """Quantize waveforms.

        Args:
            input_values: float ``[batch, 1, samples]`` at ``config.sample_rate``. The last frame is filled up with
                silence.

        Returns:
            An output whose ``audio_codes`` are int64 ``[batch, num_quantizers, ceil(samples / hop_length)]``.

        Raises:
            ValueError: when the waveforms are not mono or have no samples.
        """
        if input_values.ndim != 3 or input_values.shape[1] != 1 or input_values.shape[2] == 0:
            raise ValueError(f"expected waveforms of shape [batch, 1, samples], got {list(input_values.shape)}")
        # One by one: in a batch, rounding and with it a code could depend on the other items.
        codes = [self._quantize(self._analyse(waveform.float())) for waveform in input_values]
        return DemonstrationCodecOutput(audio_codes=torch.cat(codes))

    @torch.no_grad()
    def decode(self, audio_codes: Tensor, **_: Any) -> DemonstrationCodecOutput:
        """Make waveforms from codes. The same codes give the same waveform.

        Args:
            audio_codes: int64 ``[batch, stages, frames]``; the first ``stages`` (at most ``num_quantizers``) are
                used, fewer give a coarser sound.

        Returns:
            An output whose ``audio_values`` are float32 ``[batch, 1, frames * hop_length]`` within -1 and 1.
        """
        waveforms = [self._synthesize(self._dequantize(codes[None])) for codes in audio_codes]  # one by one, as above
        return DemonstrationCodecOutput(audio_values=torch.stack(waveforms))

    def forward(self, input_values: Tensor, **_: Any) -> DemonstrationCodecOutput:
        """The codes of ``input_values`` (float ``[batch, 1, samples]``) and the waveforms made from them."""
        encoded = self.encode(input_values)
        assert encoded.audio_codes is not None
        return DemonstrationCodecOutput(encoded.audio_codes, self.decode(encoded.audio_codes).audio_values)

    def _analyse(self, waveforms: Tensor) -> Tensor:
        """Log-mel frames ``[batch, frames, frame_size]`` of waveforms ``[batch, samples]``."""
        config = self.config
        padded = nn.functional.pad(waveforms, (0, -waveforms.shape[-1] % config.hop_length))
        window = torch.hann_window(config.fft_size, device=padded.device)
        spectrum = _stft(padded, window, config.subframe_length)[..., :-1]  # the last one lies after the last sample
        mels = torch.einsum("fm,bft->btm", self._filters(padded.device), spectrum.abs())
        return mels.clamp(min=_FLOOR).log().reshape(len(waveforms), -1, config.frame_size)

    def _quantize(self, frames: Tensor) -> Tensor:
        """Codes ``[batch, num_quantizers, frames]`` of log-mel frames ``[batch, frames, frame_size]``."""
        codes = []
        for codebook in self.codebooks.float().unbind():
            codes.append(_nearest(frames, codebook))
            frames = frames - codebook[codes[-1]]
        return torch.stack(codes, dim=1)

    def _synthesize(self, frames: Tensor) -> Tensor:
        """Waveforms ``[batch, samples]`` within -1 and 1 of log-mel frames."""
        window = torch.hann_window(self.config.fft_size, device=frames.device)
        return _griffin_lim(self._magnitudes(frames), window, self.config.subframe_length).clamp(-1, 1)

    def _dequantize(self, codes: Tensor) -> Tensor:
        """Log-mel frames ``[batch, frames, frame_size]`` that codes ``[batch, stages, frames]`` stand for."""
        chosen = [codebook[stage] for codebook, stage in zip(self.codebooks.float(), codes.unbind(1), strict=False)]
        return torch.stack(chosen).sum(0)

    def _magnitudes(self, frames: Tensor) -> Tensor:
        """STFT magnitudes ``[batch, bins, 1 + frames * subframes]`` of log-mel frames."""
        mels = frames.reshape(len(frames), -1, self.config.num_mels).exp()
        inverse = torch.linalg.pinv(self._filters(frames.device))
        magnitudes = torch.einsum("mf,btm->bft", inverse, mels).clamp(min=0)
        return torch.cat([magnitudes, magnitudes[..., -1:]], dim=-1)

    def _filters(self, device: torch.device) -> Tensor:
        config = self.config
        return _mel_filters(config.fft_size, config.num_mels, config.sample_rate).to(device)


@functools.lru_cache(maxsize=4)
def _mel_filters(fft_size: int, num_mels: int, sample_rate: int) -> Tensor:
    filters = mel_filter_bank(fft_size // 2 + 1, num_mels, 0.0, sample_rate / 2, sample_rate, norm="slaney")
    return torch.from_numpy(filters / filters.sum(0).max()).float()


def _stft(waveforms: Tensor, window: Tensor, hop_length: int) -> Tensor:
    return torch.stft(
        waveforms, len(window), hop_length, window=window, center=True, pad_mode="constant", return_complex=True
    )


def _griffin_lim(magnitudes: Tensor, window: Tensor, hop_length: int) -> Tensor:
    """Waveforms ``[batch, samples]`` whose STFT magnitudes come near ``magnitudes`` ``[batch, bins, times]``."""
    samples = (magnitudes.shape[-1] - 1) * hop_length
    generator = torch.Generator().manual_seed(_PHASE_SEED)
    phase = torch.rand(magnitudes.shape, generator=generator).to(magnitudes.device) * 2 * torch.pi
    estimate = torch.polar(torch.ones_like(magnitudes), phase)
    previous = torch.zeros_like(estimate)
    for _ in range(_GRIFFIN_LIM_ITERATIONS):
        rebuilt = _stft(_istft(magnitudes * _unit(estimate), window, hop_length, samples), window, hop_length)
        estimate = rebuilt + _GRIFFIN_LIM_MOMENTUM * (rebuilt - previous)
        previous = rebuilt
    return _istft(magnitudes * _unit(estimate), window, hop_length, samples)


def _istft(spectrum: Tensor, window: Tensor, hop_length: int, samples: int) -> Tensor:
    return torch.istft(spectrum, len(window), hop_length, window=window, center=True, length=samples)


def _unit(values: Tensor) -> Tensor:
    return values / values.abs().clamp(min=1e-12)


def _nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest codebook entry (``[entries, size]``) of each vector (``[..., size]``), int64."""
    # ||v - c||² without ||v||², which is the same for every entry.
    return (codebook.pow(2).sum(-1) - 2 * vectors @ codebook.T).argmin(-1)


def _kmeans(vectors: Tensor, entries: int, generator: torch.Generator) -> Tensor:
    """Cluster centres ``[entries, size]`` of ``vectors`` ``[n, size]`` by Lloyd's algorithm, from a random choice."""
    if len(vectors) < entries:
        raise ValueError(f"{len(vectors)} frames cannot fill a codebook of {entries} entries: give more audio")
    centres = vectors[torch.randperm(len(vectors), generator=generator)[:entries]].clone()
    for _ in range(_KMEANS_ITERATIONS):
        nearest = _nearest(vectors, centres)
        counts = torch.bincount(nearest, minlength=entries)
        sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
        used = counts > 0  # an entry that attracts nothing stays where it is
        centres[used] = sums[used] / counts[used, None]
    return centres


def _register() -> None:
    AutoConfig.register(DemonstrationCodecConfig.model_type, DemonstrationCodecConfig, exist_ok=True)
    AutoModelForAudioTokenization.register(DemonstrationCodecConfig, DemonstrationCodec, exist_ok=True)
    # Processors accept only the audio tokenizers named here, although any PreTrainedAudioTokenizerBase would do, and
    # look for their classes in transformers itself: the search among registered classes fails without torchvision.
    # Their transformers module is a second copy, which need not be the one that an import gives.
    vars(processing_utils.transformers_module)[DemonstrationCodec.__name__] = DemonstrationCodec
    classes = processing_utils.MODALITY_TO_BASE_CLASS_MAPPING
    accepted = classes["audio_tokenizer"]
    accepted = (accepted,) if isinstance(accepted, str) else accepted
    if DemonstrationCodec.__name__ not in accepted:
        classes["audio_tokenizer"] = (*accepted, DemonstrationCodec.__name__)


_register()
