"""Models that PEFT has added to are read as a plain computation reads them, learned prompts included."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from support import models
from support.references import Outputs, assert_same, differing, gradient_values, scalars_at, update_values
from support.text_training import IGNORED, Training, training
from torch import Tensor

from telemetry import StrategicTelemetry
from telemetry.backends.memory import MemoryBackend
from telemetry.instruments.activations import OTHER_POSITIONS
from telemetry.records import Table

VIRTUAL = 3
OF: dict[str, Any] = {"task_type": "CAUSAL_LM"}
PROMPT: dict[str, Any] = {"num_virtual_tokens": VIRTUAL, **OF}
ADDED = {r".*\.(lora_|ia3_).*": "lora", r"prompt_encoder\..*": "lora"}
KEPT = {r".*\.embed_tokens\.modules_to_save\..*": "text_embedding", r".*\.lm_head\.modules_to_save\..*": "text_head"}
FEED_FORWARD: dict[str, Any] = {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
KINDS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=2, target_modules=["q_proj", "down_proj", "lm_head"], **OF),
    "lora, and modules in whole": LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], **OF
    ),
    "dora": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, **OF),
    "ia3": IA3Config(**FEED_FORWARD, **OF),
    "prompt tuning": PromptTuningConfig(**PROMPT),
    "p-tuning": PromptEncoderConfig(encoder_hidden_size=8, **PROMPT),
    "prefix tuning": PrefixTuningConfig(**PROMPT),
}
BEFORE = ("prompt tuning", "p-tuning")  # whose virtual tokens come before those of the batch


def peft_training(name: str, directory: Path, watched: MemoryBackend | None = None, dropout: float = 0.0) -> Training:
    """Two steps that have ended; every token has a label, the first ones too."""
    torch.manual_seed(2)
    model: Any = get_peft_model(models.make("llama", **models.SMALLER, attention_dropout=dropout), KINDS[name])
    callbacks = [] if watched is None else [StrategicTelemetry(logging_steps=1, backends=[watched])]
    run = training(model, directory, callbacks, steps=2)
    for row in run.trainer.train_dataset:  # type: ignore[union-attr]
        row["labels"] = list(row["input_ids"])
    run.trainer.train()
    return run


def bits(run: Training) -> dict[str, Tensor]:
    return {**dict(run.trainer.model.named_parameters()), "random": torch.get_rng_state()}  # type: ignore[union-attr]


def expected(run: Training, name: str, step: int) -> Mapping[str, float]:
    """What a plain computation gives of a step."""
    model, outputs = run.snapshots.models[step].train(), Outputs()  # which has no dropout; IA3 merges nothing
    model.zero_grad()
    batches = run.of_step(step)
    ahead = VIRTUAL if name in BEFORE else 0
    labels = [torch.nn.functional.pad(batch["labels"], (ahead, 0), value=IGNORED) for batch in batches]
    # The trainer counts the labels that it knows of: not the first ones, which a learned prompt predicts.
    known, tokens = (
        sum(int((one[:, 1:] != IGNORED).sum()) for one in of) for of in ([one["labels"] for one in batches], labels)
    )
    for batch, own in zip(batches, labels, strict=True):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        outputs.add_text(own.tolist(), logits.detach())
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), own[:, 1:].flatten(), reduction="sum")
        (losses / known).backward()
    after = run.snapshots.models.get(step + 1, run.trainer.model)
    values = outputs.values()
    total = dict.fromkeys(("outputs/loss/total", "outputs/loss/model"), values["outputs/loss/text"] * tokens / known)
    groups = ADDED | KEPT
    gradients = {t: v for t, v in gradient_values(model, groups).items() if "/layer_" not in t}
    return {**values, **total, **gradients, **update_values(model, after, groups)}


@pytest.mark.parametrize("name", KINDS)
def test_numbers_are_those_of_a_plain_computation(
    name: str, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    backend = MemoryBackend()
    run = peft_training(name, tmp_path, backend)
    for step in (1, 2):
        assert_same(scalars_at(backend, step, "outputs", "gradients"), expected(run, name, step), 1e-4)
    assert backend.scalars("outputs/loss/total") == pytest.approx(backend.scalars("train/loss"), rel=1e-5)
    why = {str(row[0]): str(row[1]) for row in backend.last("telemetry/absent", Table).rows}
    elsewhere = {tag for tag, reason in why.items() if reason == OTHER_POSITIONS}
    assert bool(elsewhere) == (name in BEFORE) == ("activations/layer_0/text_ffn/rms" not in backend.tags())
    assert ("attention/layer_0/entropy" in backend.tags()) == (name not in (*BEFORE, "prefix tuning"))
    assert "Traceback" not in telemetry_log.text


@pytest.mark.parametrize("name", KINDS)
def test_training_is_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    watched = bits(peft_training(name, tmp_path, MemoryBackend(), 0.1))
    assert differing(watched, bits(peft_training(name, tmp_path, None, 0.1))) == []
