"""``gradients/text_audio_cosine`` against two backward passes of a copy, and its marks on training: none."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.batches import Voices
from support.steps import Steps, hooks_of
from torch import Tensor

from telemetry.backends.memory import MemoryBackend
from telemetry.callbacks.questions import SharedAttentionLoggerCallback, StrategicTelemetry
from trainer.loss import AccumulatedLoss
from trainer.model import add_lora, freeze_llm

COSINE = "gradients/text_audio_cosine"


@pytest.fixture
def batches(voices: Voices) -> list[dict[str, Tensor]]:
    padded = voices.pad([voices.conversation(target=7, seed=1), voices.conversation(seed=2, words="boat")])
    last = voices.batch(padded)
    last["audio_labels"][:, ::2, 0] = -100  # codebooks with unequal numbers of labels
    return [voices.batch([voices.conversation(seed=5)]), last]


def step(model: Any, directory: Path, batches: list[dict[str, Tensor]], **options: Any) -> dict[int, float]:
    """What one step shows."""
    backend = MemoryBackend()
    callback = SharedAttentionLoggerCallback(1, [backend], **{"text_audio_cosine": True, **options})
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    with Steps(model, [callback], directory, optimizer=optimizer) as run:
        run.step(batches)
    return backend.scalars(COSINE)


def reference(model: Any, inputs: dict[str, Tensor]) -> float:
    """Of the model's own losses of text alone and of audio alone, over the attention of both layers."""
    gradients = []
    for left_out in ("audio_labels", "labels"):
        other = copy.deepcopy(model).eval()
        other.zero_grad()
        other(**{name: tensor for name, tensor in inputs.items() if name != left_out}).loss.backward()
        gradients.append(
            [
                value
                for name, parameter in other.named_parameters()
                if ".self_attn." in name and parameter.requires_grad
                for value in (parameter.grad.double().flatten().tolist())
            ]
        )
    text, audio = gradients
    product = math.fsum(one * other for one, other in zip(text, audio, strict=True))
    return product / math.sqrt(math.fsum(x * x for x in text) * math.fsum(x * x for x in audio))


def test_is_that_of_the_last_microbatch_after_the_step(
    higgs: Any, batches: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    measured = step(higgs, tmp_path, batches)
    assert measured == {1: pytest.approx(reference(higgs, batches[-1]), rel=1e-4)}
    assert abs(measured[1] - reference(higgs, batches[0])) > 1e-2


def test_of_a_lora_model_it_is_that_of_the_adapters(
    higgs: Any, batches: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    higgs.loss_function = AccumulatedLoss(higgs.config)
    model = add_lora(higgs, rank=2, alpha=4, dropout=0.1)
    assert step(model, tmp_path, batches) == {1: pytest.approx(reference(model, batches[-1]), rel=1e-4)}


def test_is_off_by_default(higgs: Any, batches: list[dict[str, Tensor]], tmp_path: Path) -> None:
    assert step(higgs, tmp_path, batches, text_audio_cosine=False) == {}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("frozen", "nothing of the attention of the first, middle and last layer is trained"),
        ("no audio", "the batch has no text or no audio to learn, or the model computes no logits of it"),
        ("no audio supervised", "nothing of the text or of the audio is supervised in the batch"),
    ],
)
def test_where_it_cannot_be_measured_it_is_absent(
    change: str,
    reason: str,
    higgs: Any,
    batches: list[dict[str, Tensor]],
    voices: Voices,
    tmp_path: Path,
    telemetry_log: pytest.LogCaptureFixture,
) -> None:
    if change == "frozen":
        freeze_llm(higgs)
    elif change == "no audio":
        textual = voices.batch([voices.conversation(reference=None, target=None)])
        batches[-1] = {name: tensor for name, tensor in textual.items() if not name.startswith("audio")}
    else:
        batches[-1]["audio_labels"] = torch.full_like(batches[-1]["audio_labels"], -100)
    assert step(higgs, tmp_path, batches) == {}
    assert f"no {COSINE}: {reason}" in [record.getMessage() for record in telemetry_log.records]


def test_a_broken_loss_shows(higgs: Any, batches: list[dict[str, Tensor]], tmp_path: Path) -> None:
    with torch.no_grad():
        higgs.text_lm_head.weight[0, 0] = math.nan
    assert math.isnan(step(higgs, tmp_path, batches)[1])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_does_not_notice(
    checkpointing: bool, make_higgs: Any, batches: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    """Dropout on, everything measured at every step: parameters, optimizer and random state are the same bits."""
    left = []
    for measured in (False, True):
        model = make_higgs()
        model.config.attention_dropout = 0.3
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.3
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        hooks = hooks_of(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        backend = MemoryBackend()
        everything = StrategicTelemetry(
            logging_steps=1, backends=[backend], options={"shared_attention": {"text_audio_cosine": True}}
        )
        torch.manual_seed(3)
        with Steps(model, [everything] if measured else [], tmp_path, optimizer=optimizer) as run:  # type: ignore[list-item]
            losses = [run.step(batches) for _ in range(3)]
        assert list(backend.scalars(COSINE)) == ([1, 2, 3] if measured else [])
        assert [name for name, module in model.named_modules() if not module.training] == []
        assert hooks_of(model) == hooks
        state = [value for one in optimizer.state.values() for value in one.values()]
        gradients = [parameter.grad for parameter in model.parameters()]
        left.append([*model.parameters(), *state, *gradients, torch.tensor(losses), torch.get_rng_state()])
    plain, seen = left
    assert len(plain) == len(seen)
    assert [at for at, (one, other) in enumerate(zip(plain, seen, strict=True)) if not torch.equal(one, other)] == []
