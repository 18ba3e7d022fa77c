"""Fine-tuning a language model that writes codec tokens, as Orpheus does, with the Trainer and all of telemetry.

python docs/examples/orpheus_finetuning.py runs/orpheus
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from telemetry import CodecTokens, StrategicTelemetry

# Orpheus itself: FIRST, SIZE, BEGIN, END = 128266, 4096, 128257, 128258, and "canopylabs/orpheus-3b-0.1-pretrained"
CODEBOOKS, SIZE, BEGIN, END, FIRST = 7, 16, 62, 63, 64


class Snac:
    """Hands the seven codes of a frame to SNAC's three layers."""

    sampling_rate = 24000

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Turn codes ``[1, 7, frames]`` into a waveform ``[1, 1, samples]``."""
        layers = [codes[:, [0]], codes[:, [1, 4]], codes[:, [2, 3, 5, 6]]]
        layers = [layer.transpose(1, 2).flatten(1) for layer in layers]
        # The real one: return snac.SNAC.from_pretrained("hubertsiuzdak/snac_24khz").decode(layers)
        return (layers[2].float() / SIZE - 0.5).repeat_interleave(512, dim=1)[:, None]


def checkpoint(directory: Path) -> Path:
    """Save a tiny language model with random weights."""
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": FIRST + CODEBOOKS * SIZE}
    LlamaForCausalLM(LlamaConfig(**small, pad_token_id=0, eos_token_id=END)).save_pretrained(directory)
    return directory


def sample(seed: int) -> dict[str, torch.Tensor]:
    """A voice and what it says, and what it is to say: only that is learnt."""
    chance = torch.Generator().manual_seed(seed)
    words = torch.randint(1, BEGIN, (2, 6), generator=chance)
    codes = torch.randint(0, SIZE, (2, 5, CODEBOOKS), generator=chance) + FIRST + SIZE * torch.arange(CODEBOOKS)
    turns = [torch.cat([words[at], torch.tensor([BEGIN]), codes[at].flatten(), torch.tensor([END])]) for at in (0, 1)]
    silent = torch.full((len(turns[0]) + 7,), -100)
    return {"input_ids": torch.cat(turns), "labels": torch.cat([silent, turns[1][7:]])}


def main(output_dir: str) -> None:
    """Train for 20 steps; `tensorboard --logdir OUTPUT_DIR` shows them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(checkpoint(Path(output_dir) / "start"))
    orpheus = CodecTokens(first=FIRST, codebooks=CODEBOOKS, size=SIZE, end=END, codec=Snac())
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "learning_rate": 1e-2}
    options |= {"eval_strategy": "steps", "eval_steps": 10, "report_to": "none", "use_cpu": True}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir, max_steps=20, save_strategy="no", **options),
        train_dataset=[sample(seed) for seed in range(16)],
        eval_dataset=[sample(seed) for seed in range(100, 104)],
        callbacks=[StrategicTelemetry(logging_steps=5, family=orpheus)],
    )
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
