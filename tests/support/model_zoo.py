"""Tiny models of many classes with random weights, a batch for each, and how their losses read them, token by token."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import trainer  # noqa: F401  # makes an installed torchaudio importable before transformers imports it

# isort: split
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTalkerConfig

from .models import sure
from .speech_models import IGNORED, mimi_config, numbers, padded

Batch = dict[str, Any]
Token = tuple["str | int", list[float], int]
"""Stream, logits, label."""

WORDS, PLACEHOLDER, BEGIN = 28, 28, 11
CODEBOOKS = 3
SIZES: dict[str, Any] = {
    "vocab_size": WORDS + 1, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LENGTHS = ((5, 8), (3, 7), (6, 4), (9, 2))


@dataclass(frozen=True)
class Kind:
    """A class of models.

    Attributes:
        make: a model, the same every time.
        batch: of a seed, the lengths of two samples, and the side that they are padded on.
        read: the tokens that its loss is made of, in a model that has its logits returned; None where there are none.
        absent: part of the reason for which ``outputs/loss/total`` is not there.
        shown: tags that are to be there as well.
        warned: set-up checks that fire on so small a training, and rightly.
    """

    make: Callable[[], Any]
    batch: Callable[[int, tuple[int, int], bool], Batch]
    read: Callable[[Any, Batch], Iterator[Token]] | None = None
    absent: str = ""
    shown: tuple[str, ...] = ()
    warned: tuple[str, ...] = ()


def batches(kind: Kind) -> list[Batch]:
    """Four, of which every other is padded on the left."""
    return [kind.batch(10 * at, lengths, at % 2 == 1) for at, lengths in enumerate(LENGTHS)]


# -- batches ----------------------------------------------------------------------------------------------------------


def words(seed: int, lengths: tuple[int, int], left: bool) -> Batch:
    """Text whose first two tokens are a prompt without labels."""
    ids = [numbers(length, seed + row, 3, WORDS) for row, length in enumerate(lengths)]
    return {
        "input_ids": padded(ids, 0, left),
        "attention_mask": padded([[1] * len(row) for row in ids], 0, left),
        "labels": padded([[IGNORED, IGNORED, *row[2:]] for row in ids], IGNORED, left),
    }


def hidden_words(seed: int, lengths: tuple[int, int], left: bool) -> Batch:
    batch = words(seed, lengths, left)
    batch["labels"][:, ::2] = IGNORED
    return batch


def _answers(seed: int, lengths: tuple[int, int]) -> Tensor:
    return padded([numbers(length + 1, seed + 50 + row, 3, WORDS) for row, length in enumerate(lengths)], IGNORED)


def answers(seed: int, lengths: tuple[int, int], left: bool) -> Batch:
    return {**words(seed, lengths, left), "labels": _answers(seed, lengths)}


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heard(seed: int, lengths: tuple[int, int], left: bool) -> Batch:
    return {"input_features": _noise(seed, 2, 8, 20), "labels": _answers(seed, lengths)}


def waves(seed: int, lengths: tuple[int, int], left: bool) -> Batch:
    return {"input_values": _noise(seed, 2, 400), "labels": _answers(seed, lengths)}


def classes(seed: int, lengths: tuple[int, int], left: bool) -> Batch:
    return {**words(seed, lengths, left), "labels": torch.tensor([0, 2])}


def spectrograms(seed: int, lengths: tuple[int, int], left: bool) -> Batch:
    given = {name: one for name, one in words(seed, lengths, False).items() if name != "labels"}
    labels = _noise(seed, 2, 8, 4)
    labels[1, 6:] = IGNORED
    return {**given, "labels": labels, "speaker_embeddings": _noise(seed, 2, 4)}


def codes(seed: int, lengths: tuple[int, int], left: bool) -> Batch:
    rows = [[numbers(CODEBOOKS, seed + 7 * at + row, 0, BEGIN) for at in range(length)]
            for row, length in enumerate(lengths)]  # fmt: skip
    return {"labels": padded(rows, [IGNORED] * CODEBOOKS)}


def described_codes(seed: int, lengths: tuple[int, int], left: bool) -> Batch:
    return {**words(seed, lengths, left), **codes(seed, lengths, left)}


def words_over_codes(seed: int, lengths: tuple[int, int], left: bool) -> Batch:
    batch = words(seed, lengths, left)
    under = torch.stack([batch["input_ids"] % 4 + k for k in range(CODEBOOKS)], dim=-1)
    return {**batch, "input_ids": torch.cat([batch["input_ids"][..., None], under], dim=-1)}


def _after_placeholders(batch: Batch, count: int) -> Batch:
    front = {"input_ids": PLACEHOLDER, "attention_mask": 1, "labels": IGNORED}
    return {name: torch.cat([torch.full((2, count), front[name]), batch[name]], dim=1) for name in front}


def pictured_words(seed: int, lengths: tuple[int, int], left: bool) -> Batch:
    return {**_after_placeholders(words(seed, lengths, left), 4), "pixel_values": _noise(seed, 2, 3, 8, 8)}


def sounded_words(seed: int, lengths: tuple[int, int], left: bool) -> Batch:
    sound = {"input_features": _noise(seed, 2, 8, 20), "feature_attention_mask": torch.ones(2, 20, dtype=torch.long)}
    return {**_after_placeholders(words(seed, lengths, left), 5), **sound}


def talked(seed: int, lengths: tuple[int, int], left: bool) -> Batch:
    batch = words(seed, lengths, left)
    labels = torch.where(batch["labels"] >= 0, batch["labels"] % 19, batch["labels"])
    embedded = {"inputs_embeds": _noise(seed, *labels.shape, 16), "talker_input_ids": batch["input_ids"].clamp(min=8)}
    return {**embedded, "attention_mask": batch["attention_mask"], "labels": labels}


def latents(seed: int, lengths: tuple[int, int], left: bool) -> Batch:
    """Text, a begin, and three frames of latents."""
    batch = words(seed, lengths, True)
    ids = torch.cat([batch["input_ids"], torch.tensor([[WORDS, *[PLACEHOLDER + 1] * 3]] * 2)], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 4, dtype=torch.long)], dim=1)
    return {"input_ids": ids, "attention_mask": mask, "labels": _noise(seed, 2, 3, 4)}


def diffused_words(seed: int, lengths: tuple[int, int], left: bool) -> Batch:
    """The last three positions of every sample are sound."""
    batch = words(seed, (max(lengths), max(lengths)), left)
    batch["input_ids"] = torch.cat([batch["input_ids"], torch.full((2, 3), PLACEHOLDER)], dim=1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["labels"] = torch.cat([batch["labels"], torch.full((2, 3), IGNORED)], dim=1)
    mask = batch["input_ids"] == PLACEHOLDER
    return {**batch, "input_values": _noise(seed, 2, 1, 12), "padding_mask": torch.ones(2, 12, dtype=torch.bool),
            "acoustic_loss_mask": mask, "noise_scheduler": Noise(), "sample": False}  # fmt: skip


class Noise:
    """As much of a scheduler as the model asks for."""

    alpha_t, sigma_t = torch.linspace(0.9, 0.1, 10), torch.linspace(0.1, 0.9, 10)

    def add_noise(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return self.alpha_t[times, None] * clean + self.sigma_t[times, None] * noise


# -- how losses read --------------------------------------------------------------------------------------------------


def _logits(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch).logits
    return found.double()


def shifted(model: Any, batch: Batch) -> Iterator[Token]:
    logits = _logits(model, batch)
    for row, labels in enumerate(batch["labels"].tolist()):
        for at in range(1, len(labels)):
            if labels[at] != IGNORED:
                yield "text", logits[row, at - 1].tolist(), labels[at]


def nothing(model: Any, batch: Batch) -> Iterator[Token]:
    """Of a loss that is made of no tokens, and can be read all the same."""
    return iter(())


def first_codebook(model: Any, batch: Batch) -> Iterator[Token]:
    return ((0, logits, label) for _, logits, label in shifted(model, batch))


def aligned(model: Any, batch: Batch) -> Iterator[Token]:
    logits = _logits(model, batch)
    for row, labels in enumerate(batch["labels"].tolist()):
        for at, label in enumerate(labels):
            if label != IGNORED:
                yield "text", logits[row, at].tolist(), label


def by_codebook(model: Any, batch: Batch) -> Iterator[Token]:
    logits = _logits(model, batch)
    for row, k in itertools.product(range(len(batch["labels"])), range(CODEBOOKS)):
        labels = batch["labels"][row, :, k].tolist()
        for at, label in enumerate(labels):
            if label != IGNORED:
                yield k, logits[row * CODEBOOKS + k, at - len(labels)].tolist(), label


# -- models -----------------------------------------------------------------------------------------------------------


def _language_model(name: str, **options: Any) -> Callable[[], Any]:
    config, model = getattr(hf, f"{name}Config"), getattr(hf, f"{name.removesuffix('Text')}ForCausalLM")
    return lambda: sure(lambda: model(config(**SIZES | options)), 3, 0.4)


def _made(model: str, config: Callable[[], Any], std: float = 0.4) -> Callable[[], Any]:
    return lambda: sure(lambda: getattr(hf, model)(config()), 3, std)


class Plain(nn.Module):
    """A module of one's own."""

    def __init__(self, _config: object) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, 16), nn.Linear(16, WORDS)

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> Mapping[str, Tensor]:
        logits = self.head(self.embed(input_ids))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def _encoder(**options: Any) -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "dropout_rate": 0.0, "num_layers": 1}
    return hf.T5Config(
        vocab_size=WORDS + 1, pad_token_id=0, decoder_start_token_id=0, eos_token_id=2, **sizes | options
    )


def _seq2seq(kind: Any, **options: Any) -> Any:
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder")
             for name, size in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 24))}  # fmt: skip
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return kind(vocab_size=WORDS + 1, d_model=16, dropout=0.0, **sizes, **ids, **options)


def _bert(**options: Any) -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return hf.BertConfig(vocab_size=WORDS + 1, **sizes, **still, **options)


def _musicgen(kind: Any) -> Any:
    config = kind(
        vocab_size=BEGIN, max_position_embeddings=64, num_hidden_layers=2, ffn_dim=24, num_attention_heads=2,
        hidden_size=16, dropout=0.0, num_codebooks=CODEBOOKS, pad_token_id=BEGIN, bos_token_id=BEGIN,
    )  # fmt: skip
    config.decoder_start_token_id = BEGIN  # which training asks for
    return config


def _described(whole: Any, decoder: Any, **options: Any) -> Any:
    codec = hf.EncodecConfig(
        num_filters=4, hidden_size=8, upsampling_ratios=[2, 2], codebook_size=16, codebook_dim=8,
        num_residual_layers=1, num_lstm_layers=1, target_bandwidths=[1.0],
    )  # fmt: skip
    parts = {"text_encoder": _encoder(), "audio_encoder": codec, "decoder": _musicgen(decoder)}
    config = whole(**{name: part.to_dict() for name, part in parts.items()}, **options)
    config.decoder.decoder_start_token_id = BEGIN
    return config


def _talker() -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    experts = {"moe_intermediate_size": 12, "num_experts": 2, "num_experts_per_tok": 1}
    text = SIZES | experts | {"vocab_size": 19, "shared_expert_intermediate_size": 12, "rope_parameters": rope}
    special = ("audio", "image", "video", "vision_start", "audio_start")
    config = Qwen3OmniMoeTalkerConfig(
        text_config=text,
        code_predictor_config=SIZES | {"vocab_size": 16, "num_code_groups": 3},
        thinker_hidden_size=16, num_code_groups=3, accept_hidden_layer=1,
        codec_eos_token_id=2, codec_pad_id=0, codec_bos_id=1,
        **{f"{name}_token_id": 3 + at for at, name in enumerate(special)},
    )  # fmt: skip
    config.spatial_merge_size, config.vocab_size = 2, 19  # which training asks for
    return config


def _vibevoice() -> Any:
    encoder = {"hidden_size": 8, "num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]}
    return hf.VibeVoiceConfig(
        text_config={"model_type": "qwen2", **SIZES},
        audio_config={"model_type": "vibevoice_acoustic_tokenizer", **encoder},
        semantic_model_config={"model_type": "vibevoice_acoustic_tokenizer_encoder", **encoder},
        diffusion_head_config={"num_hidden_layers": 1, "intermediate_size": 24, "frequency_embedding_size": 8},
        audio_bos_token_id=3, audio_eos_token_id=4, audio_token_id=PLACEHOLDER, pad_token_id=0, eos_token_id=2,
        diffusion_loss_weight=0.25,
    )  # fmt: skip


def _pocket() -> Any:
    named = ("audio_bos", "audio_latent", "audio_prompt", "audio_prompt_bos")
    head = {
        "hidden_size": 16,
        "condition_dim": 16,
        "latent_dim": 4,
        "num_hidden_layers": 1,
        "loss_weighting_hidden_size": 8,
    }
    return hf.PocketTTSConfig(
        **SIZES | {"vocab_size": WORDS + 4, "num_key_value_heads": 2}, latent_dim=4, flow_head_config=head,
        **{f"{name}_token_id": WORDS + at for at, name in enumerate(named)},
    )  # fmt: skip


def _speecht5() -> Any:
    still = ("hidden", "attention", "activation", "positional", "speech_decoder_prenet", "speech_decoder_postnet")
    return hf.SpeechT5Config(
        vocab_size=WORDS + 1, hidden_size=16, encoder_layers=1, decoder_layers=2, num_mel_bins=4, reduction_factor=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
        speech_decoder_prenet_units=8, speech_decoder_postnet_units=8, speech_decoder_postnet_layers=2,
        speaker_embedding_dim=4, encoder_layerdrop=0.0, decoder_layerdrop=0.0, use_guided_attention_loss=False,
        **{f"{name}_dropout": 0.0 for name in still},
    )  # fmt: skip


def _wav2vec() -> Any:
    still = {f"{name}_dropout": 0.0 for name in ("hidden", "attention", "feat_proj", "final")}
    return hf.Wav2Vec2Config(
        vocab_size=WORDS + 1, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(8, 4), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, layerdrop=0.0, mask_time_prob=0.0, pad_token_id=0, ctc_zero_infinity=True,
        **still,
    )  # fmt: skip


_LLAMA: dict[str, Any] = {"model_type": "llama", **SIZES}
_PICTURES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
_EARS: dict[str, Any] = {
    "num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "d_model": 16,
    "max_source_positions": 10, "dropout": 0.0,
}  # fmt: skip
_COUNTED = ("loss_weight",)  # takes the trainer's count, ignores it, and so no one divides accumulated losses
_NONE = "no part of the model's loss could be read"

KINDS: dict[str, Kind] = {
    **{
        name: Kind(_language_model(name, **options), words, shifted)
        for name, options in {
            "Llama": {}, "Qwen2": {}, "Qwen3": {}, "Mistral": {}, "Phi3": {}, "Olmo2": {}, "Cohere": {},
            "Gemma2": {"final_logit_softcapping": 2.0}, "Gemma3Text": {}, "Granite": {"logits_scaling": 2.0},
            "GptOss": {"num_local_experts": 2, "num_experts_per_tok": 1},
        }.items()
    },
    "Mixtral": Kind(
        _language_model("Mixtral", num_local_experts=2, num_experts_per_tok=1, output_router_logits=True),
        words, shifted, shown=("outputs/loss/router",),
    ),
    "Qwen3Moe": Kind(
        _language_model("Qwen3Moe", num_experts=2, num_experts_per_tok=1, moe_intermediate_size=12), words, shifted
    ),
    "Mamba": Kind(_language_model("Mamba", state_size=4), words, shifted),
    "GPT2": Kind(
        _made("GPT2LMHeadModel", lambda: hf.GPT2Config(
            vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
        )), words, shifted, warned=("chance",),  # its random weights are large
    ),
    "T5": Kind(_made("T5ForConditionalGeneration", lambda: _encoder(num_layers=2)), answers, aligned, warned=_COUNTED),
    "Bart": Kind(
        _made("BartForConditionalGeneration", lambda: _seq2seq(hf.BartConfig, max_position_embeddings=64)),
        answers, aligned, warned=_COUNTED,
    ),
    "Whisper": Kind(
        _made("WhisperForConditionalGeneration", lambda: _seq2seq(
            hf.WhisperConfig, num_mel_bins=8, max_source_positions=10, max_target_positions=32,
        )), heard, aligned, warned=_COUNTED,
    ),
    "BertForMaskedLM": Kind(_made("BertForMaskedLM", _bert), hidden_words, aligned, warned=_COUNTED),
    "Llava": Kind(
        _made("LlavaForConditionalGeneration", lambda: hf.LlavaConfig(
            vision_config={"model_type": "clip_vision_model", **_PICTURES}, text_config=_LLAMA,
            image_token_index=PLACEHOLDER, vision_feature_layer=-1,
        ), 0.3), pictured_words, shifted,
    ),
    "Qwen2Audio": Kind(
        _made("Qwen2AudioForConditionalGeneration", lambda: hf.Qwen2AudioConfig(
            audio_config={"model_type": "qwen2_audio_encoder", **_EARS}, text_config={**_LLAMA, "model_type": "qwen2"},
            audio_token_index=PLACEHOLDER,
        ), 0.3), sounded_words, shifted, warned=_COUNTED,
    ),
    "KyutaiSpeechToText": Kind(
        _made("KyutaiSpeechToTextForConditionalGeneration", lambda: hf.KyutaiSpeechToTextConfig(
            **SIZES, codebook_vocab_size=9, num_codebooks=CODEBOOKS, ffn_dim=24, audio_bos_token_id=8,
            audio_pad_token_id=7, codec_config=mimi_config().to_dict(),
        ), 0.3), words_over_codes, shifted, shown=("attention/layer_0/text_to_text", "inputs/tokens/text_fraction"),
    ),
    "Qwen3OmniTalker": Kind(
        _made("Qwen3OmniMoeTalkerForConditionalGeneration", _talker, 0.3), talked, first_codebook,
        shown=("outputs/eos/probability",),
    ),
    "VibeVoice": Kind(
        _made("VibeVoiceForConditionalGeneration", _vibevoice, 0.3), diffused_words, shifted,
        shown=("outputs/loss/diffusion",),
    ),
    "MusicgenForCausalLM": Kind(
        _made("MusicgenForCausalLM", lambda: _musicgen(hf.MusicgenDecoderConfig)), codes, by_codebook,
        shown=("attention/layer_0/target_to_target",),
    ),
    "Musicgen": Kind(
        _made("MusicgenForConditionalGeneration", lambda: _described(hf.MusicgenConfig, hf.MusicgenDecoderConfig)),
        described_codes, by_codebook,
        shown=(
            "attention/layer_0/target_to_target", "attention/layer_0/cross/entropy",
            "inputs/tokens/target_audio_fraction",
        ),
    ),
    "MusicgenMelody": Kind(
        _made("MusicgenMelodyForConditionalGeneration", lambda: _described(
            hf.MusicgenMelodyConfig, hf.MusicgenMelodyDecoderConfig, num_chroma=4, chroma_length=3,
        )), described_codes, by_codebook,
    ),
    "SpeechT5": Kind(
        _made("SpeechT5ForTextToSpeech", _speecht5, 0.3), spectrograms, nothing,
        shown=("outputs/loss/spectrogram", "outputs/loss/end_of_speech", "gradients/audio_ffn/norm"),
    ),
    "PocketTTS": Kind(
        _made("PocketTTSForConditionalGeneration", _pocket, 0.3), latents, nothing,
        shown=("outputs/loss/flow", "outputs/loss/end_of_speech", "gradients/audio_embedding/norm"),
    ),
    "Wav2Vec2ForCTC": Kind(_made("Wav2Vec2ForCTC", _wav2vec, 0.2), waves, absent=_NONE),
    "BertForSequenceClassification": Kind(
        _made("BertForSequenceClassification", lambda: _bert(num_labels=3)), classes, absent=_NONE
    ),
    "a module of one's own": Kind(lambda: sure(lambda: Plain(SimpleNamespace()), 3, 0.4), words, absent=_NONE),
}  # fmt: skip
