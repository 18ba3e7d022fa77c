"""The loss that a family's streams make up is the model's own; where it is not, it is withheld, and both are named."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from support.batches import Voices
from support.models import SHAPE, sure
from support.references import Outputs, scalars_at
from support.steps import make_trainer, measure, quiet_arguments
from support.text_training import training
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, Trainer
from transformers.modeling_outputs import CausalLMOutputWithPast

from telemetry import OutputLoggerCallback, StrategicTelemetry
from telemetry.backends.memory import MemoryBackend
from telemetry.families import CausalLMFamily, Family, HiggsAudioV2Family, LossPart, Seen, Stream, base, reads
from telemetry.families.base import shift_labels
from telemetry.instruments.outputs import TOTAL, UNCHECKED, CheckedMean, OutputInstrument
from telemetry.probes.forward import Microbatch, Reading
from telemetry.records import Metric, Scalar, Table

STEPS = 3
MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "GraniteForCausalLM": {"logits_scaling": 8.0},
    "CohereForCausalLM": {"logit_scale": 0.0625},
    "Gemma2ForCausalLM": {"final_logit_softcapping": 0.5},
    "Qwen3MoeForCausalLM": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.1,
    },
    "GPT2LMHeadModel": {},
    "BertForMaskedLM": {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
    "T5ForConditionalGeneration": {
        **{"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 2},
        **{"dropout_rate": 0.0, "decoder_start_token_id": 0},
    },
}


def make(name: str, **more: Any) -> Any:
    """A model by its class's name, with logits that are far from uniform."""
    config = re.sub(r"(ForCausalLM|LMHeadModel|ForMaskedLM|ForConditionalGeneration)$", "Config", name)
    shape = SHAPE | MODELS.get(name, {}) | more
    return sure(lambda: getattr(transformers, name)(getattr(transformers, config)(**shape)), 3, 0.3)


def trained(model: Any, directory: Path, accumulation: int = 1, **arguments: Any) -> MemoryBackend:
    backend = MemoryBackend()
    run = training(model, directory, [OutputLoggerCallback(1, [backend])], STEPS, accumulation, **arguments)
    run.trainer.add_callback(Logs(backend))
    run.trainer.train()
    return backend


class Logs(transformers.TrainerCallback):
    """Keeps the loss that the Trainer logs, unrounded."""

    def __init__(self, backend: MemoryBackend) -> None:
        self.losses = backend.losses = {}  # type: ignore[attr-defined]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses[state.global_step] = float(logs["loss"])


def absences(backend: MemoryBackend) -> dict[str, str]:
    return {str(row[0]): str(row[1]) for row in backend.last("telemetry/absent", Table).rows}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_the_total_is_what_the_trainer_minimizes(name: str, accumulation: int, tmp_path: Path) -> None:
    backend = trained(make(name), tmp_path, accumulation)
    total, model = backend.scalars(TOTAL), backend.scalars("outputs/loss/model")
    assert list(total) == [1, 2, 3]
    assert total == pytest.approx(model, rel=1e-5)
    assert total == pytest.approx(backend.losses, rel=1e-5)  # type: ignore[attr-defined]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_total_of_higgs_on_the_trainer_itself(
    higgs: Any, voices: Voices, tmp_path: Path, accumulation: int
) -> None:
    """Which divides every part of the loss by the number of text labels."""
    backend = MemoryBackend()
    make_trainer(
        higgs,
        [voices.conversation(1 + i % 4, 1 + 3 * (i % 5), seed=i) for i in range(12)],
        lambda samples: voices.batch(voices.pad(samples)),
        tmp_path,
        [OutputLoggerCallback(1, [backend]), logs := Logs(backend)],
        Trainer,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
    ).train()
    total = backend.scalars(TOTAL)
    assert total == pytest.approx(backend.scalars("outputs/loss/model"), rel=1e-5)
    assert total == pytest.approx(logs.losses, rel=1e-5)
    values = scalars_at(backend, 1, "outputs")
    own_means = values["outputs/loss/text"] + sum(values[f"outputs/loss/codebook_{k}"] for k in range(3))
    assert abs(total[1] - own_means) > 0.1  # as no mean is over its own tokens here


def test_the_router_loss_of_experts_is_a_part_of_the_total(tmp_path: Path) -> None:
    model = make("Qwen3MoeForCausalLM")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = training(model, tmp_path, [OutputLoggerCallback(1, [backend := MemoryBackend()])], 1, 1)
    run.trainer.train()
    model.load_state_dict(before)
    with torch.no_grad():
        outputs = model(**run.of_step(1)[0])
    values = scalars_at(backend, 1, "outputs")
    assert values["outputs/loss/router"] == pytest.approx(0.1 * outputs.aux_loss.item(), rel=1e-5)
    assert values[TOTAL] == pytest.approx(values["outputs/loss/text"] + values["outputs/loss/router"], rel=1e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "T5ForConditionalGeneration"])
def test_label_smoothing_leaves_the_plain_loss(name: str, tmp_path: Path) -> None:
    """Which is that of the labels; the model, which is not given them, adds no other part to it."""
    plain = trained(make(name), tmp_path, 2).scalars("outputs/loss/text")
    smoothed = trained(make(name), tmp_path, 2, label_smoothing_factor=0.1)
    assert smoothed.scalars("outputs/loss/text")[1] == pytest.approx(plain[1], rel=1e-6)
    # Where the Trainer hands the model no count of tokens, passes are averaged.
    counted = smoothed.scalars(TOTAL) == pytest.approx(smoothed.scalars("outputs/loss/text"), rel=1e-6)
    assert counted or name in ("GPT2LMHeadModel", "BertForMaskedLM")
    assert "outputs/loss/router" not in smoothed.tags()
    assert "outputs/loss/model" not in smoothed.tags()


def test_a_loss_in_half_precision_differs_by_its_rounding(tmp_path: Path) -> None:
    backend = trained(make("LlamaForCausalLM").to(torch.bfloat16), tmp_path, 2)
    assert backend.scalars(TOTAL) == pytest.approx(backend.scalars("outputs/loss/model"), rel=1e-2)
    assert list(backend.scalars(TOTAL)) == [1, 2, 3]


# -- what is misread --------------------------------------------------------------------------------------------------


class TwiceShifted(CausalLMFamily):
    """Shifts labels that the loss shifts."""

    def streams(self, inputs: Mapping[str, Any], outputs: Any, seen: Seen) -> Iterator[Any]:
        for stream in super().streams(inputs, outputs, seen):
            assert isinstance(stream, Stream)
            yield replace(stream, labels=shift_labels(stream.labels))


class Swapped(HiggsAudioV2Family):
    """Takes the first two codebooks for each other."""

    def streams(self, inputs: Mapping[str, Any], outputs: Any, seen: Seen) -> Iterator[Any]:
        for stream in super().streams(inputs, outputs, seen):
            assert isinstance(stream, Stream)
            yield stream if stream.group == "text" else replace(stream, labels=stream.labels[..., [1, 0, 2]])


class WithPenalty(LlamaForCausalLM):
    """Adds a part to its loss that no stream shows."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.loss = outputs.loss + 0.01 * outputs.logits.square().mean()
        return outputs


@pytest.fixture
def read_by(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has models read by a family, by the names of their classes, for one test."""
    monkeypatch.setattr(base, "_READERS", dict(base._READERS))
    return lambda family, *names: reads(*names)(family)


def assert_withheld(
    backend: MemoryBackend, family: str, read: float, log: pytest.LogCaptureFixture, steps: int = 1
) -> None:
    """The total, and nothing else; both numbers of the first step are said, once."""
    assert backend.scalars(TOTAL) == {}
    returned = backend.scalars("outputs/loss/model")
    assert len(returned) == steps
    reason = absences(backend)[TOTAL]
    found = re.fullmatch(rf"family {family} reads a loss of ([\d.]+) where the model returned ([\d.]+): it .*", reason)
    assert found is not None, reason
    assert float(found[1]) == pytest.approx(read, rel=1e-5)
    assert float(found[2]) == pytest.approx(returned[1], rel=1e-5)
    said = [record for record in log.records if record.levelname == "WARNING" and TOTAL in record.getMessage()]
    assert [record.getMessage() for record in said] == [f"{TOTAL} is withheld: {reason}"]


def test_labels_that_are_shifted_twice(
    llama: LlamaForCausalLM, tmp_path: Path, read_by: Any, telemetry_log: pytest.LogCaptureFixture
) -> None:
    read_by(TwiceShifted, "LlamaForCausalLM")
    run = training(llama, tmp_path, [OutputLoggerCallback(1, [backend := MemoryBackend()])], STEPS, 1)
    run.trainer.train()
    batch, outputs = run.of_step(1)[0], Outputs()
    with torch.no_grad():
        logits = run.snapshots.models[1](**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    outputs.add_text([[*row[1:], -100] for row in batch["labels"].tolist()], logits)
    text = outputs.streams["text"].losses
    # The loss divides by the tokens that the Trainer has counted, one a sequence more than are left.
    assert backend.scalars("outputs/loss/text")[1] == pytest.approx(sum(text) / len(text), rel=1e-5)
    counted = int((batch["labels"][:, 1:] != -100).sum())
    assert_withheld(backend, "TwiceShifted", sum(text) / counted, telemetry_log, STEPS)


def test_codebooks_that_are_taken_for_each_other(
    higgs: Any, voices: Voices, tmp_path: Path, read_by: Any, telemetry_log: pytest.LogCaptureFixture
) -> None:
    read_by(Swapped, "HiggsAudioV2ForConditionalGeneration")
    inputs = voices.batch(voices.pad([voices.conversation(seed=1), voices.conversation(target=9, seed=2)]))
    backend = measure(OutputLoggerCallback, higgs, tmp_path, [inputs])
    swapped = {**inputs, "audio_labels": inputs["audio_labels"][..., [1, 0, 2]]}
    with torch.no_grad():
        read = higgs(**swapped).loss.item()
    assert_withheld(backend, "Swapped", read, telemetry_log)
    values = scalars_at(backend, 1, "outputs")
    assert {"outputs/loss/text", "outputs/loss/audio", "outputs/loss/codebook_2", "outputs/accuracy/text"} <= set(
        values
    )


def test_a_part_of_the_loss_that_nobody_declares(
    llama: LlamaForCausalLM, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    model = WithPenalty(llama.config)
    model.load_state_dict(llama.state_dict())
    backend = trained(model, tmp_path, remove_unused_columns=False)
    assert_withheld(backend, "causal_lm", backend.scalars("outputs/loss/text")[1], telemetry_log, STEPS)
    assert list(backend.scalars("outputs/accuracy/text")) == [1, 2, 3]


def test_a_model_that_returns_no_loss_is_not_compared(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    class Lossless(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return CausalLMOutputWithPast(logits=super().forward(*args, **kwargs).logits)

    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            logits = model(**inputs).logits[:, :-1]
            return cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten())

    backend = trained(Lossless(llama.config), tmp_path, kind=Own, remove_unused_columns=False)
    values = [record for _, record in backend.records[TOTAL] if isinstance(record, Scalar)]
    assert [one.value for one in values] == pytest.approx(list(backend.losses.values()), rel=1e-5)  # type: ignore[attr-defined]
    assert {one.note for one in values} == {UNCHECKED}
    assert absences(backend)["outputs/loss/model"] == "the model returned no loss"


# -- how passes and ranks add up --------------------------------------------------------------------------------------


def test_a_difference_on_one_rank_withholds_the_value_of_all() -> None:
    right, wrong = CheckedMean(3.0, 1, 0, 0, 0, 0), CheckedMean(0, 1, 0, 2, 9.0, 7.0)
    assert right.merge(right).result() == 3.0
    assert right.merge(wrong).result() is None
    assert right.merge(wrong).fault("odd").startswith("family odd reads a loss of 4.5 where the model returned 3.5")  # type: ignore[attr-defined]
    assert right.merge(CheckedMean(1.0, 1, 1, 0, 0, 0)).result() is None


class Rank:
    """What one rank of two records of a step, in the place of a recorder."""

    def __init__(self, counted: bool, across: bool, losses: Iterable[tuple[float, float]]) -> None:
        self.metrics: dict[str, Metric] = {}
        step: Any = SimpleNamespace(
            recorder=self, family=Family(None), batches=2, tokens_across_ranks=across, tokenizer=None,
            output_dir=Path(), number=1,
        )  # fmt: skip
        instrument = OutputInstrument()
        instrument.begin(step)
        inputs = {"num_items_in_batch": torch.tensor(1)} if counted else {}
        for read, returned in losses:
            parts = [LossPart("all", torch.tensor(read))]
            instrument.outputs(step, Microbatch(inputs, None), Reading(parts=parts, loss=torch.tensor(returned)))
        instrument.finish(step)

    def metric(self, tag: str, value: Metric, note: str = "") -> None:
        self.metrics[tag] = self.metrics[tag].merge(value) if tag in self.metrics else value

    def defer(self, tensors: Any, build: Any) -> None:
        build(tensors, self)

    def show(self, tensors: Any, build: Any) -> None:
        pass

    def absent(self, tag: str, why: str) -> None:
        raise AssertionError(why)


@pytest.mark.parametrize(
    ("counted", "across", "expected"),
    [
        (True, True, 1 + 2 + 3 + 4.5),  # every loss is a share of one mean over all ranks' tokens
        (True, False, (1 + 2 + 3 + 4.5) / 2),  # of its rank's, and gradients are averaged over ranks
        (False, True, (1 + 2 + 3 + 4.5) / 4),  # a mean of its own
    ],
)
def test_passes_and_ranks_add_up_as_gradients_do(counted: bool, across: bool, expected: float) -> None:
    first, second = (Rank(counted, across, [(a, a), (b, b)]) for a, b in ((1.0, 2.0), (3.0, 4.5)))
    for tag in (TOTAL, "outputs/loss/model", "outputs/loss/all"):
        assert first.metrics[tag].merge(second.metrics[tag]).result() == pytest.approx(expected)


@pytest.mark.parametrize("returned", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_what_the_total_is(returned: float) -> None:
    """A mean over no token, for instance, which a stream without one adds nothing to."""
    total = Rank(False, True, [(1.0, returned)]).metrics[TOTAL]
    assert total.result() == pytest.approx(returned, nan_ok=True)


@pytest.mark.parametrize(("read", "held"), [(5.0004, True), (5.0006, False), (float("nan"), False)])
def test_rounding_is_no_difference(read: float, held: bool) -> None:
    assert (Rank(False, True, [(read, 5.0)]).metrics[TOTAL].result() is not None) == held


# -- a family of one's own --------------------------------------------------------------------------------------------


class Parrot(nn.Module):
    """Two codebooks predicted from each other's past, and how long it goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.heads = nn.ModuleList([nn.Linear(6, 7), nn.Linear(6, 7)])

    def forward(self, codes: Tensor, labels: Tensor) -> dict[str, Any]:
        hidden = self.embed(codes).sum(1).cumsum(1)
        logits = [head(hidden) for head in self.heads]
        losses = [cross_entropy(one.flatten(0, 1), labels[:, k].flatten()) for k, one in enumerate(logits)]
        length = hidden.square().mean()
        return {"loss": 0.7 * losses[0] + 0.3 * losses[1] + 0.1 * length, "logits": logits, "length": length}


def test_a_family_of_ones_own(tmp_path: Path, read_by: Any) -> None:
    class OfParrots(Family):
        modalities = ("audio",)
        groups = (("embed.", "audio_embedding"), ("heads.", "audio_head"))

        def streams(self, inputs: Mapping[str, Any], outputs: Any, seen: Seen) -> Iterator[Any]:
            for k, (logits, weight) in enumerate(zip(outputs["logits"], (0.7, 0.3), strict=True)):
                labels = inputs["labels"][:, k]
                yield Stream(f"codebook_{k}", logits, labels, "audio", "aligned", weight, eos_id=6)
            yield LossPart("length", 0.1 * outputs["length"])

    read_by(OfParrots, "Parrot")
    torch.manual_seed(1)
    model, chance = Parrot(), torch.Generator().manual_seed(2)
    codes = torch.randint(7, (4, 2, 5), generator=chance)
    labels = torch.randint(-1, 7, (4, 2, 5), generator=chance).masked_fill(codes == 0, -100)
    labels[labels < 0] = -100
    data = [{"codes": codes[row], "labels": labels[row]} for row in range(4)]
    with torch.no_grad():
        outputs = model(codes, labels)
    arguments = quiet_arguments(tmp_path, max_steps=1, per_device_train_batch_size=4)
    telemetry = StrategicTelemetry(["outputs", "shared_attention"], 1, [backend := MemoryBackend()])
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[telemetry]).train()  # type: ignore[arg-type]

    values = scalars_at(backend, 1, "outputs", "gradients")
    assert values[TOTAL] == pytest.approx(outputs["loss"].item(), rel=1e-5)
    assert values["outputs/loss/model"] == pytest.approx(outputs["loss"].item(), rel=1e-5)
    assert values["outputs/loss/length"] == pytest.approx(0.1 * outputs["length"].item(), rel=1e-5)
    for k in range(2):
        losses, hits = [], []
        for row in range(4):
            for at in range(5):
                label = int(labels[row, k, at])
                if label >= 0:
                    logits = outputs["logits"][k][row, at].double()
                    losses.append(-float(logits.log_softmax(-1)[label]))
                    hits.append(int(logits.argmax()) == label)
        assert values[f"outputs/loss/codebook_{k}"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert values[f"outputs/accuracy/codebook_{k}"] == pytest.approx(sum(hits) / len(hits))
    assert {"outputs/eos/probability", "outputs/codebook_1/used_fraction", "gradients/audio_head/norm"} <= set(values)
    streams = {row[1] for row in backend.last("outputs/predictions", Table).rows}
    assert streams == {"codebook 0", "codebook 1"}
