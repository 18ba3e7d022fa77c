"""The trainer keeps the Trainer's own step and events, and telemetry changes no bit of the training."""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from one_step import TrainerFactory
from support.steps import hooks_of
from torch import Tensor
from transformers import (
    HiggsAudioV2ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
)

from telemetry import StrategicTelemetry
from telemetry.backends.memory import MemoryBackend
from telemetry.records import Scalar
from trainer.collator import VoiceCloningCollator
from trainer.dataset import VoiceCloningDataset
from trainer.higgs_trainer import HiggsAudioTrainer, find_higgs
from trainer.model import add_lora

Model = HiggsAudioV2ForConditionalGeneration

EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]


class EventList(TrainerCallback):
    """Every event of the Trainer's, in order, with the step that the Trainer is at."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []


def _noting(event: str) -> Any:
    def note(self: EventList, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append((event, state.global_step))

    return note


for _event in EVENTS:
    setattr(EventList, _event, _noting(_event))


@dataclass
class StepEnds(TrainerCallback):
    """What ``on_step_end`` is given, by step."""

    given: dict[int, dict[str, Any]] = field(default_factory=dict)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert state.global_step not in self.given
        self.given[state.global_step] = kwargs


def telemetry(backend: MemoryBackend | None = None, every: int = 1) -> StrategicTelemetry:
    return StrategicTelemetry(logging_steps=every, backends=[backend or MemoryBackend()])


def logged(made: Trainer, name: str) -> dict[int, float]:
    """What the Trainer logged under a name, by step."""
    return {entry["step"]: float(entry[name]) for entry in made.state.log_history if name in entry}


def twin(model_path: Path) -> Model:
    return HiggsAudioV2ForConditionalGeneration.from_pretrained(model_path, use_text_head=True)


# (a) events


def test_every_callback_sees_the_events_of_a_plain_trainer(
    tiny_model_path: Path, demo_dataset: VoiceCloningDataset, collator: VoiceCloningCollator, train: TrainerFactory
) -> None:
    def without_metadata(examples: Sequence[Any]) -> dict[str, Any]:
        batch = collator(examples)
        del batch["metadata"]
        return batch

    arguments: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 3,
        "logging_steps": 2,
        "num_train_epochs": 2,
    }
    data = [demo_dataset[index] for index in range(9)]  # 5 microbatches an epoch: its last step is cut short
    plain, ours = EventList(), EventList()
    expected = train(twin(tiny_model_path), data, [plain], kind=Trainer, eval_dataset=data[:4], **arguments)
    expected.data_collator = without_metadata
    expected.train()
    watched = train(twin(tiny_model_path), data, [telemetry(), ours], eval_dataset=data[:4], **arguments)
    watched.train()

    assert ours.events == plain.events
    assert {event for event, _ in ours.events} == set(EVENTS) - {"on_predict", "on_push_begin"}
    ends = [step for event, step in ours.events if event == "on_step_end"]
    assert ends == [1, 2, 3, 4, 5, 6]
    assert [step for event, step in ours.events if event == "on_substep_end"] == [0, 1, 3, 4]


# (b) not a bit


def tensors_of(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a nested state, by its path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_of(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors_of(item, f"{name}[{index}]")
    else:
        yield name, value


def assert_identical(first: Any, second: Any) -> None:
    ours, theirs = dict(tensors_of(first)), dict(tensors_of(second))
    assert ours.keys() == theirs.keys()
    assert ours
    for name, value in ours.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, theirs[name]), name
            assert value.dtype == theirs[name].dtype, name
        else:
            assert value == theirs[name], name


def random_states() -> list[Any]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  # the global state is what is compared
    return [torch.get_rng_state(), random.getstate(), name, torch.from_numpy(np.array(keys, dtype=np.int64)), *rest]


def assert_dropout_is_on(model: Model, batch: Mapping[str, Any]) -> None:
    inputs = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    model.train()
    with torch.random.fork_rng(devices=[]):
        first, second = (model(**inputs).logits for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # its new name is not in 5.20 yet
@pytest.mark.parametrize(
    "mode",
    [{}, {"bf16": True}, {"gradient_checkpointing": True}],
    ids=["float32", "bf16", "gradient checkpointing"],
)
def test_telemetry_at_every_step_changes_no_bit_of_the_training(
    mode: dict[str, Any],
    tiny_model_path: Path,
    demo_dataset: VoiceCloningDataset,
    collator: VoiceCloningCollator,
    train: TrainerFactory,
) -> None:
    backend = MemoryBackend()
    ends = []
    for callbacks in ([], [telemetry(backend)]):
        model = twin(tiny_model_path)
        assert_dropout_is_on(model, collator([demo_dataset[0]]))
        arguments = {"max_steps": 20, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **mode}
        made = train(model, demo_dataset, callbacks, **arguments)
        made.train()
        assert model.training
        losses = logged(made, "loss")
        ends.append(
            (model.state_dict(), made.optimizer.state_dict(), random_states(), losses, logged(made, "grad_norm"))
        )

    assert_identical(ends[0], ends[1])
    assert len(ends[0][3]) == 20
    assert len(backend.scalars("outputs/loss/total")) == 20  # it did look
    assert len(backend.scalars("gradients/total_norm")) == 20


def test_a_resumed_run_with_telemetry_equals_one_that_was_never_interrupted(
    tiny_model_path: Path, demo_dataset: VoiceCloningDataset, train: TrainerFactory, tmp_path: Path
) -> None:
    arguments = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    whole = train(twin(tiny_model_path), demo_dataset, **arguments)
    whole.train()
    backend = MemoryBackend()
    resumed = train(twin(tiny_model_path), demo_dataset, [telemetry(backend)], **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "output" / "checkpoint-2"))
    assert_identical(whole.model.state_dict(), resumed.model.state_dict())
    assert_identical(whole.optimizer.state_dict(), resumed.optimizer.state_dict())
    assert list(backend.scalars("outputs/loss/total")) == [3, 4, 5]
    assert backend.run is not None
    assert backend.run.starting_step == 2


def test_telemetry_leaves_no_hook_behind(
    tiny_model: Model, demo_dataset: VoiceCloningDataset, train: TrainerFactory
) -> None:
    before = hooks_of(tiny_model)
    train(tiny_model, demo_dataset, [telemetry(every=2)], max_steps=3).train()
    assert hooks_of(tiny_model) == before


# (c) gradients


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("max_grad_norm", [1e-3, 0.0, 1e6])
def test_gradients_are_measured_before_clipping(
    max_grad_norm: float,
    accumulation: int,
    tiny_model: Model,
    demo_dataset: VoiceCloningDataset,
    train: TrainerFactory,
) -> None:
    backend = MemoryBackend()
    made = train(
        tiny_model,
        demo_dataset,
        [telemetry(backend)],
        max_steps=3,
        max_grad_norm=max_grad_norm,
        gradient_accumulation_steps=accumulation,
    )
    made.train()
    norms = logged(made, "grad_norm")
    assert min(norms.values()) > 0.1  # far above the smallest limit
    assert backend.scalars("gradients/total_norm") == pytest.approx(norms, rel=1e-4)
    gradients = [entries for tag, entries in backend.records.items() if tag.startswith("gradients/")]
    scalars = [record for entries in gradients for _, record in entries if isinstance(record, Scalar)]
    assert scalars
    assert not [record for record in scalars if record.note]


def test_clipping_really_clips(tiny_model: Model, demo_dataset: VoiceCloningDataset, train: TrainerFactory) -> None:
    """What the optimizer gets is no longer than the limit, though telemetry saw the whole."""

    @dataclass
    class Clipped(TrainerCallback):
        norm: float = 0.0

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.norm = sum(float(w.grad.double().square().sum()) for w in model.parameters()) ** 0.5

    clipped = Clipped()
    made = train(tiny_model, demo_dataset, [clipped, telemetry()], max_steps=1, max_grad_norm=1e-3)
    made.train()
    assert clipped.norm == pytest.approx(1e-3, rel=1e-2)
    assert logged(made, "grad_norm")[1] > 0.1


def test_every_part_of_the_model_is_trained(
    tiny_model: Model, demo_dataset: VoiceCloningDataset, train: TrainerFactory
) -> None:
    before = {name: weight.detach().clone() for name, weight in tiny_model.named_parameters()}
    train(tiny_model, demo_dataset, max_steps=1).train()
    unchanged = [name for name, weight in tiny_model.named_parameters() if torch.equal(weight, before[name])]
    assert unchanged == []


# (d) what on_step_end is given


def test_due_steps_hand_over_inputs_and_outputs_and_other_steps_do_not(
    tiny_model: Model, demo_dataset: VoiceCloningDataset, train: TrainerFactory
) -> None:
    ends = StepEnds()
    made = train(
        tiny_model,
        demo_dataset,
        [telemetry(every=3), ends],
        max_steps=7,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    made.train()
    assert sorted(ends.given) == [1, 2, 3, 4, 5, 6, 7]
    known = {sample.sample_id for sample in demo_dataset.samples}
    for step, given in ends.given.items():
        assert given["model"] is tiny_model
        assert ("inputs" in given) == ("outputs" in given) == (step in (1, 3, 6))
        if "inputs" not in given:
            continue
        inputs, outputs = given["inputs"], given["outputs"]
        assert {"input_ids", "attention_mask", "labels", "audio_input_ids", "audio_labels"} <= inputs.keys()
        assert len(inputs["metadata"]) == len(inputs["input_ids"]) == 2
        assert {entry["sample_id"] for entry in inputs["metadata"]} <= known
        assert "model" not in inputs
        assert "model" not in outputs
        assert outputs["logits"].shape[:2] == inputs["input_ids"].shape
        assert outputs["loss"].isfinite()
        tensors = [*inputs.values(), *outputs.values()]
        assert not any(tensor.requires_grad for tensor in tensors if isinstance(tensor, Tensor))
        assert all(tensor.grad_fn is None for tensor in tensors if isinstance(tensor, Tensor))


def test_without_an_observer_nothing_is_handed_over(
    tiny_model: Model, demo_dataset: VoiceCloningDataset, train: TrainerFactory
) -> None:
    ends = StepEnds()
    train(tiny_model, demo_dataset, [ends], max_steps=2).train()
    assert all(given.keys().isdisjoint({"inputs", "outputs"}) for given in ends.given.values())
    assert len(ends.given) == 2


@dataclass
class Survivors(TrainerCallback):
    """Whether the logits of the step before are still held when the next one begins."""

    logits: weakref.ref[Tensor] | None = None
    alive: list[bool] = field(default_factory=list)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.logits is not None:
            self.alive.append(self.logits() is not None)

    def on_step_end(self, args: Any, state: Any, control: Any, outputs: Any = None, **kwargs: Any) -> None:
        self.logits = weakref.ref(outputs["logits"])


def test_nothing_of_a_step_outlives_it(
    tiny_model: Model, demo_dataset: VoiceCloningDataset, train: TrainerFactory
) -> None:
    survivors = Survivors()
    made = train(tiny_model, demo_dataset, [telemetry(), survivors], max_steps=4, gradient_accumulation_steps=2)
    made.train()
    assert survivors.alive == [False, False, False]
    assert made.callback_handler.step_data == {}


# (e) metadata


def test_the_forward_pass_never_sees_metadata(
    tiny_model: Model, demo_dataset: VoiceCloningDataset, train: TrainerFactory
) -> None:
    seen: list[set[str]] = []
    tiny_model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    made = train(tiny_model, demo_dataset, [telemetry(every=2)], max_steps=3, eval_dataset=[demo_dataset[0]])
    made.train()
    made.evaluate()
    made.predict([demo_dataset[0]])
    assert len(seen) == 5 + 4 + 3  # and the conditioning gain and the set-up's of the first due step
    assert all("input_ids" in names and "metadata" not in names for names in seen)


# (f) losses


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_recombined_loss_is_the_logged_one(
    accumulation: int, tiny_model: Model, demo_dataset: VoiceCloningDataset, train: TrainerFactory
) -> None:
    backend = MemoryBackend()
    made = train(
        tiny_model,
        demo_dataset,
        [telemetry(backend)],
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
    )
    made.train()
    losses = logged(made, "loss")
    assert len(losses) == 4
    assert backend.scalars("outputs/loss/total") == pytest.approx(losses, rel=1e-5)
    for step, total in losses.items():
        parts = ["text", *(f"codebook_{k}" for k in range(tiny_model.config.num_codebooks))]
        assert sum(backend.scalars(f"outputs/loss/{part}")[step] for part in parts) == pytest.approx(total, rel=1e-5)
    assert backend.scalars("train/loss") == losses


def test_lora_trains_with_the_same_loss_and_observers(
    tiny_model: Model, demo_dataset: VoiceCloningDataset, train: TrainerFactory
) -> None:
    backend = MemoryBackend()
    wrapped = add_lora(tiny_model, rank=2, alpha=4, dropout=0.0)
    made = train(wrapped, demo_dataset, [telemetry(backend)], max_steps=2, gradient_accumulation_steps=2)
    made.train()
    assert backend.scalars("outputs/loss/total") == pytest.approx(logged(made, "loss"), rel=1e-5)
    assert backend.scalars("gradients/lora/norm") == pytest.approx(logged(made, "grad_norm"), rel=1e-4)


def test_evaluation_during_training_disturbs_no_due_step(
    tiny_model: Model, demo_dataset: VoiceCloningDataset, train: TrainerFactory
) -> None:
    backend = MemoryBackend()
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": [demo_dataset[0]]}
    made = train(tiny_model, demo_dataset, [telemetry(backend)], max_steps=3, **arguments)
    made.train()
    assert backend.scalars("outputs/loss/total") == pytest.approx(logged(made, "loss"), rel=1e-5)
    assert backend.scalars("eval/loss") == logged(made, "eval_loss")


# (g) other models


def test_another_model_is_refused(demo_dataset: VoiceCloningDataset, train: TrainerFactory) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=10, **sizes))
    with pytest.raises(
        ValueError, match="HiggsAudioTrainer trains HiggsAudioV2ForConditionalGeneration, not LlamaForCausalLM"
    ):
        train(llama, demo_dataset)


def test_the_model_is_found_inside_peft(tiny_model: Model) -> None:
    assert find_higgs(tiny_model) is tiny_model
    assert find_higgs(add_lora(tiny_model, 2, 4, 0.0)) is tiny_model


def test_two_devices_in_one_process_are_refused(
    tiny_model: Model, demo_dataset: VoiceCloningDataset, train: TrainerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = train(tiny_model, demo_dataset)
    monkeypatch.setattr(type(made.args), "n_gpu", 2)
    with pytest.raises(ValueError, match="torchrun --nproc_per_node=2"):
        HiggsAudioTrainer(model=tiny_model, args=made.args, train_dataset=demo_dataset)


def test_label_smoothing_is_refused_before_training(tiny_model: Model, train: TrainerFactory) -> None:
    with pytest.raises(ValueError, match=r"--label_smoothing_factor 0\.1: .* text and every codebook"):
        train(tiny_model, [], label_smoothing_factor=0.1)
