"""A plain PyTorch loop with telemetry: three added lines, marked.

python docs/examples/plain_loop.py runs/plain_loop
"""

from __future__ import annotations

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from telemetry import Telemetry  # 1


def main(output_dir: str) -> None:
    """Train a tiny language model to count."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = [(torch.arange(12)[None] + 4 * row) % 64 for row in range(20)]

    with Telemetry(model, output_dir, optimizer=optimizer, logging_steps=5) as telemetry:  # 2
        for ids in batches:
            with telemetry.step():  # 3
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()


if __name__ == "__main__":
    main(*sys.argv[1:])
