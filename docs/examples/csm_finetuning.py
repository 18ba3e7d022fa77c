"""Fine-tuning Csm with the Trainer and all of telemetry.

python docs/examples/csm_finetuning.py runs/csm
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import CsmConfig, CsmForConditionalGeneration, Trainer, TrainingArguments

from telemetry import StrategicTelemetry

TEXT, AUDIO, END, FRAMES, SAMPLES = 6, 60, 61, 4, 8  # tokens of text, ids, frames of a clip, samples of a frame


def load_model() -> CsmForConditionalGeneration:
    """A tiny Csm with random weights."""
    # The real one: return CsmForConditionalGeneration.from_pretrained("sesame/csm-1b")
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_codebooks": 4, "vocab_size": 19}
    small |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    codec = {"hidden_size": 8, "num_filters": 2, "upsampling_ratios": [2, 2], "codebook_size": 16, "codebook_dim": 4}
    codec |= {"num_quantizers": 4, "vector_quantization_hidden_dimension": 4, "upsample_groups": 8}
    codec |= {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "sampling_rate": 8000}
    config = CsmConfig(
        **small,
        text_vocab_size=64,
        pad_token_id=0,
        bos_token_id=1,
        codebook_pad_token_id=18,
        audio_token_id=AUDIO,
        audio_eos_token_id=END,
        depth_decoder_config={**small, "backbone_hidden_size": 32, "num_hidden_layers": 1},
        codec_config={"model_type": "mimi", **codec},
    )
    model = CsmForConditionalGeneration(config)
    for name, entries in model.codec_model.named_buffers():
        if name.endswith("embed_sum"):  # codebooks, which are all zeros in a new codec
            entries.normal_()
    return model


def conversation(seed: int) -> dict[str, torch.Tensor]:
    """Two turns of text and audio."""
    # Real ones: processor.apply_chat_template(turns, tokenize=True, return_dict=True, output_labels=True)
    chance = torch.Generator().manual_seed(seed)
    words = torch.randint(2, 60, (2, TEXT), generator=chance)
    spoken = torch.tensor([AUDIO] * FRAMES + [END])
    ids = torch.cat([words[0], spoken, words[1], spoken])
    labels = torch.where(ids >= AUDIO, ids, -100)
    sound = torch.rand(1, 2 * FRAMES * SAMPLES, generator=chance) * 2 - 1
    cutoffs = torch.tensor([FRAMES * SAMPLES, 2 * FRAMES * SAMPLES])
    return {"input_ids": ids, "labels": labels, "input_values": sound, "input_values_cutoffs": cutoffs}


def main(output_dir: str) -> None:
    """Train for 20 steps; `tensorboard --logdir OUTPUT_DIR` shows them."""
    torch.manual_seed(0)
    model = load_model()
    model.codec_model.requires_grad_(False)  # it makes the labels
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "learning_rate": 1e-2}
    options |= {"eval_strategy": "steps", "eval_steps": 10, "remove_unused_columns": False, "report_to": "none"}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir, max_steps=20, save_strategy="no", use_cpu=True, **options),
        train_dataset=[conversation(seed) for seed in range(16)],
        eval_dataset=[conversation(seed) for seed in range(100, 104)],
        callbacks=[StrategicTelemetry(logging_steps=5)],
    )
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
