"""Speech checkpoints of a few kilobytes, saved as any other: random weights, but real models."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
    WavLMConfig,
    WavLMForXVector,
    WavLMModel,
)

RATE = 16_000
LETTERS = "abcdefghijklmnopqrstuvwxyz"

_SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8),
    "conv_kernel": (20, 8),
    "conv_stride": (16, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
}


def save_speaker_encoder(directory: Path, with_head: bool = True) -> Path:
    """An x-vector model, or its trunk alone."""
    config = WavLMConfig(
        **_SHAPE, tdnn_dim=(12, 12), tdnn_kernel=(3, 1), tdnn_dilation=(1, 1), xvector_output_dim=10, num_buckets=20
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        (WavLMForXVector if with_head else WavLMModel)(config).save_pretrained(directory)
    Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True).save_pretrained(directory)
    return directory


def save_transcriber(directory: Path) -> Path:
    """A CTC model over the letters."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = {"<pad>": 0, "<unk>": 1, "|": 2, **{letter: 3 + i for i, letter in enumerate(LETTERS)}}
    (directory / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    tokenizer = Wav2Vec2CTCTokenizer(
        str(directory / "vocab.json"), pad_token="<pad>", unk_token="<unk>", word_delimiter_token="|"
    )
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(sampling_rate=RATE), tokenizer).save_pretrained(directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = Wav2Vec2ForCTC(Wav2Vec2Config(**_SHAPE, vocab_size=len(vocabulary), pad_token_id=0))
        torch.nn.init.normal_(model.lm_head.weight, std=2.0)
        torch.nn.init.constant_(model.lm_head.bias[1:2], -1e4)  # never unknown
        model.save_pretrained(directory)
    return directory
