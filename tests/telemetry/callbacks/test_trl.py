"""TRL's trainers: their losses are fused with the head, and their steps hold passes that are not training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from support.references import assert_same, differing, scalars_at, setup_findings
from support.trl_training import SENTENCES, Run, llama, plain, train

from telemetry import CodecTokens, StrategicTelemetry
from telemetry.backends.memory import MemoryBackend
from telemetry.instruments.outputs import TOTAL
from telemetry.records import Table

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL's own

TEXT = {"text": SENTENCES}
TURNS = {"messages": [[{"role": role, "content": said} for role in ("user", "assistant")] for said in SENTENCES]}
PAIRS = {"prompt": SENTENCES, "completion": SENTENCES[::-1]}
PREFERENCES = {"prompt": SENTENCES, "chosen": SENTENCES[::-1], "rejected": SENTENCES[3:] + SENTENCES[:3]}
LORA = LoraConfig(r=2, target_modules=["q_proj"])
SFT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text, evaluated": (TEXT, {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": TEXT}),
    "completions": (PAIRS, {}),
    "assistant only": (TURNS, {"assistant_only_loss": True}),
    "packed": (TEXT, {"packing": True, "max_length": 12}),
    "without padding": (TEXT, {"padding_free": True, "max_length": None}),
    "another loss": (TEXT, {"loss_type": "dft"}),
    "adapters": (TEXT, {"peft_config": LORA}),
    "a learned prompt": (TEXT, {"peft_config": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")}),
    "checkpointed": (TEXT, {"gradient_checkpointing": True}),
}


@pytest.fixture(autouse=True)
def _trl() -> None:
    pytest.importorskip("trl")


def words_used(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(completion.split()))) for completion in completions]


def measured(
    kind: str, data: Any, directory: Path, log: pytest.LogCaptureFixture, **more: Any
) -> tuple[Run, MemoryBackend]:
    """A training with everything measured at every step, which is to the bit what it is without."""
    backend, another = MemoryBackend(), MemoryBackend()
    run = train(kind, data, directory, [StrategicTelemetry(logging_steps=1, backends=[backend])], **more)
    watched = train(kind, data, directory, [StrategicTelemetry(logging_steps=1, backends=[another])], 0.1, **more)
    assert differing(watched.bits(), train(kind, data, directory, dropout=0.1, **more).bits()) == []
    assert differing(watched.bits(), run.bits())  # as there is dropout
    assert another.scalars("outputs/loss/text").keys() == {1, 2}
    assert "Traceback" not in log.text
    return run, backend


def assert_plain(run: Run, backend: MemoryBackend, *others: str) -> None:
    """What is shown of every step is what a plain computation gives of its training passes, and of no others."""
    for step in (1, 2):
        found, expected = scalars_at(backend, step, "outputs"), run.outputs(step)
        for tag in others:
            found.pop(tag, None)
            expected.pop(tag)
        assert_same(found, expected)
        passes = run.passes.of_step[step]
        assert backend.scalars("inputs/tokens/total")[step] == sum(one["input_ids"].numel() for one in passes)
    assert backend.last("outputs/predictions", Table).rows


@pytest.mark.parametrize("name", SFT)
def test_supervised_fine_tuning(name: str, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture) -> None:
    data, more = SFT[name]
    run, backend = measured("SFT", data, tmp_path, telemetry_log, **more)
    assert_plain(run, backend)
    if name not in ("another loss", "a learned prompt"):  # TRL does not count the token that the prompt predicts
        assert backend.scalars("outputs/loss/text") == pytest.approx(backend.scalars("train/loss"), rel=1e-5)
    assert (run.passes.others > 0) == ("evaluated" in name)
    assert setup_findings(backend) == ({"recombined"} if name == "another loss" else set())


@pytest.mark.parametrize("adapters", [False, True])
def test_preferences(adapters: bool, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture) -> None:
    """What the reference model, or the model without its adapters, has to say is not counted."""
    more: dict[str, Any] = {"peft_config": LORA} if adapters else {"ref_model": llama()}
    run, backend = measured("DPO", PREFERENCES, tmp_path, telemetry_log, **more)
    assert_plain(run, backend)
    assert len(run.passes.of_step[1]) == 2
    assert run.passes.others == (4 if adapters else 0)


@pytest.mark.parametrize("more", [{}, {"temperature": 0.7}, {"num_iterations": 2, "peft_config": LORA, "beta": 0.1}])
def test_rewards(more: dict[str, Any], tmp_path: Path, telemetry_log: pytest.LogCaptureFixture) -> None:
    """Generation inside of the step is not counted. A loss of logits that are divided is not that of the model's."""
    sizes = {"num_generations": 2, "max_completion_length": 6, "reward_funcs": words_used}
    run, backend = measured("GRPO", {"prompt": SENTENCES}, tmp_path, telemetry_log, **sizes, **more)
    scaled = "temperature" in more
    assert_plain(run, backend, *((TOTAL, "outputs/loss/model") if scaled else ()))
    why = {str(row[0]): str(row[1]) for row in backend.last("telemetry/absent", Table).rows}
    assert ("a temperature" in why.get(TOTAL, "")) == (TOTAL not in backend.tags()) == scaled
    assert run.passes.others >= 4
    assert not any(backend.scalars("health/step_skipped").values())  # though its first losses may be exactly 0


def test_codec_tokens_under_a_fused_loss(tmp_path: Path) -> None:
    """Words that stand for codes of three codebooks, seven of each: the first of them has id 7."""
    backend, size = MemoryBackend(), 7
    family = CodecTokens(first=7, codebooks=3, size=size, layout=(), end=2)
    run = train("SFT", TEXT, tmp_path, [StrategicTelemetry(logging_steps=1, backends=[backend], family=family)])
    for step in (1, 2):
        surprises: dict[int, list[float]] = {}
        for inputs in run.passes.of_step[step]:
            with torch.no_grad():
                given = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
                chances = plain(run.snapshots.models[step])(**given).logits.double().log_softmax(-1)
            for row, labels in enumerate(inputs["labels"].tolist()):
                for at, label in enumerate(labels[1:]):
                    if 7 <= label < 7 + 3 * size:
                        surprises.setdefault((label - 7) // size, []).append(-float(chances[row, at, label]))
        assert set(surprises) == {0, 1, 2}
        for k, own in surprises.items():
            shown = backend.scalars(f"outputs/loss/codebook_{k}")[step]
            assert shown == pytest.approx(math.fsum(own) / len(own), rel=1e-5)
    assert backend.scalars("outputs/loss/total") == pytest.approx(backend.scalars("outputs/loss/model"), rel=1e-5)
