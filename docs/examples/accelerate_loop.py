"""A loop with Hugging Face Accelerate: gradient accumulation, clipping, any number of processes.

accelerate launch docs/examples/accelerate_loop.py runs/accelerate_loop
"""

from __future__ import annotations

import itertools
import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from telemetry import Telemetry

ACCUMULATION = 2


def main(output_dir: str) -> None:
    """Train a tiny language model to count."""
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader([(torch.arange(12) + 4 * row) % 64 for row in range(80)], batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    with Telemetry(model, output_dir, optimizer=optimizer, logging_steps=5) as telemetry:
        batches = iter(loader)
        while microbatches := list(itertools.islice(batches, ACCUMULATION)):
            with telemetry.step():
                for ids in microbatches:
                    with accelerator.accumulate(model):
                        loss = model(input_ids=ids, labels=ids).loss
                        accelerator.backward(loss)
                        if accelerator.sync_gradients:
                            telemetry.gradients()
                            accelerator.clip_grad_norm_(model.parameters(), 1.0)
                        optimizer.step()
                        optimizer.zero_grad()
            telemetry.log({"loss": loss.item()})


if __name__ == "__main__":
    main(*sys.argv[1:])
