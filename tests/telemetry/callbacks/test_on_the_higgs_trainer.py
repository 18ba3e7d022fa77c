"""On the project's own trainer: telemetry's losses and norms are the ones that the Trainer logs, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.batches import Sample, Voices
from support.references import scalars_at
from support.steps import make_trainer

from telemetry import StrategicTelemetry
from telemetry.backends.memory import MemoryBackend
from telemetry.records import Scalar, Table

STEPS = 3


class Collator:
    """Batches of known samples, with the metadata that the trainer takes out."""

    def __init__(self, voices: Voices) -> None:
        self.voices = voices
        self.names: list[list[str]] = []

    def __call__(self, rows: list[tuple[str, Sample]]) -> dict[str, Any]:
        self.names.append([name for name, _ in rows])
        samples = self.voices.pad([sample for _, sample in rows])
        return {**self.voices.batch(samples), "metadata": [{"sample_id": name} for name, _ in rows]}


def trainer_of(
    model: Any,
    collator: Collator,
    data: list[tuple[str, Sample]],
    directory: Path,
    backend: MemoryBackend,
    accumulation: int,
    max_grad_norm: float = 1.0,
) -> Any:
    return make_trainer(
        model,
        data,
        collator,
        directory,
        [StrategicTelemetry(logging_steps=1, backends=[backend])],
        processing_class=collator.voices.tokenizer,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=max_grad_norm,
    )


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("max_grad_norm", [0.5, 0.0])
def test_losses_and_norms_are_those_of_the_trainer(
    higgs: Any, voices: Voices, tmp_path: Path, accumulation: int, max_grad_norm: float
) -> None:
    data = [(f"s{i}", voices.conversation(reference=1 + i % 4, target=1 + 3 * (i % 5), seed=i)) for i in range(18)]
    collator, backend = Collator(voices), MemoryBackend()
    trainer = trainer_of(higgs, collator, data, tmp_path, backend, accumulation, max_grad_norm)
    trainer.train()

    for step in range(1, STEPS + 1):
        values = scalars_at(backend, step, "outputs", "gradients")
        assert values["outputs/loss/total"] == pytest.approx(backend.scalars("train/loss")[step], rel=1e-5)
        if max_grad_norm:
            logged = backend.scalars("train/grad_norm")[step]
            assert logged > max_grad_norm  # clipping changed something
            assert values["gradients/total_norm"] == pytest.approx(logged, rel=1e-5)
    notes = {record.note for _, record in backend.records["gradients/total_norm"] if isinstance(record, Scalar)}
    assert notes == {""}
    tables = [record for _, record in backend.records["zero_shot/chatml"] if isinstance(record, Table)]
    seen = [sorted(str(row[0]) for row in table.rows) for table in tables]
    expected = [collator.names[step * accumulation : (step + 1) * accumulation] for step in range(STEPS)]
    assert seen == [sorted(name for names in step for name in names) for step in expected]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("use_text_head", [True, False])
def test_of_a_compiled_model_passes_are_handed_over(
    make_higgs: Any, voices: Voices, tmp_path: Path, accumulation: int, use_text_head: bool
) -> None:
    """Its loss adds up all the same, and the total where its output holds all that the loss is made of."""
    model = make_higgs(use_text_head=use_text_head)
    model._compiled_call_impl = model._call_impl  # as torch.nn.Module.compile leaves it
    data = [(f"s{i}", voices.conversation(reference=1 + i % 4, target=1 + 3 * (i % 5), seed=i)) for i in range(18)]
    backend = MemoryBackend()
    trainer_of(model, Collator(voices), data, tmp_path, backend, accumulation).train()
    trained = backend.scalars("train/loss")
    assert backend.scalars("outputs/loss/model") == {step: pytest.approx(trained[step], rel=1e-5) for step in (1, 2, 3)}
    if use_text_head:
        absent = {row[0]: row[1] for row in backend.last("telemetry/absent", Table).rows}
        assert absent["outputs/loss/total"] == "a part of it could not be measured"
        assert absent["outputs/loss/text"] == "a compiled model does not show its logits for it"
    else:
        assert backend.scalars("outputs/loss/total") == pytest.approx(backend.scalars("outputs/loss/model"), rel=1e-5)
