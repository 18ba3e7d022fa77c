"""Codec tokens in a text vocabulary: every stream against a loop over tokens, what is spoken, what is misread."""

from __future__ import annotations

import math
import re
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from support.codec_tokens import BEGIN, CODEBOOKS, END, FIRST, SIZE, TEXT, batch, codes_of, declared, llama, tokens_of
from support.speaking import ToneCodec, table
from support.speech_models import IGNORED, Batch, Tokens, numbers, of_step, shown, train
from support.steps import Snapshots
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from telemetry import StrategicTelemetry, reads
from telemetry.backends.memory import MemoryBackend
from telemetry.families import CodecTokens, CodecTokensFamily, Stream, base
from telemetry.records import Table

STEPS, ACCUMULATION = 2, 2


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_READERS", dict(base._READERS))


def batches() -> list[Batch]:
    return [
        batch((3, 2, 2, 3), (5, 1, 1, 4)),
        batch((4, 0, 3, 2), (2, 3, 2, 2), left=True, seed=7),
        batch((2, 1, 2, 5), seed=9),
        batch((3, 2, 1, 1), (1, 1, 4, 3), left=True, seed=11),
    ]


def expected(model: Any, microbatches: Sequence[Batch]) -> dict[str, float]:
    """Token by token."""
    tokens = Tokens()
    for one in microbatches:
        with torch.no_grad():
            logits = model(**{name: one[name] for name in ("input_ids", "attention_mask")}).logits.double()
        for row, labels in enumerate(one["labels"].tolist()):
            for at in range(1, len(labels)):
                if labels[at] != IGNORED:
                    stream = (labels[at] - FIRST) // SIZE if labels[at] >= FIRST else "text"
                    tokens.add(stream, logits[row, at - 1].tolist(), labels[at])
    losses = tokens.losses("text") + tokens.losses("audio")
    ends = [math.exp(one[token] - math.log(sum(map(math.exp, one)))) for one, token, _ in tokens.streams["text"]
            if token == END]  # fmt: skip
    values = tokens.values() | {"outputs/loss/total": math.fsum(losses) / len(losses)}
    return values | {"outputs/eos/probability": math.fsum(ends) / len(ends)}


@pytest.mark.parametrize("layout", ["ranges", "fused"])
def test_every_stream_is_right_and_training_is_left_alone(
    layout: str, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads("LlamaForCausalLM")(declared())
    model, untouched, data = llama(), llama(), batches()
    backend, snapshots = MemoryBackend(), Snapshots()
    if layout == "fused":  # the model gives its loss alone, as a patch for a fused loss does it
        for one in (model, untouched):
            plain = one.forward
            monkeypatch.setattr(one, "forward", lambda *a, _plain=plain, **k: _plain(*a, **k) | {"logits": None})
    train(model, data, tmp_path, [snapshots, StrategicTelemetry(logging_steps=1, backends=[backend])], STEPS)
    assert backend.scalars("outputs/loss/total") == pytest.approx(backend.scalars("outputs/loss/model"), rel=1e-5)
    for step in range(1, STEPS + 1):
        plainly = llama()
        plainly.load_state_dict(snapshots.models[step].state_dict())
        values = expected(plainly.eval(), of_step(data, step, ACCUMULATION))
        assert shown(backend, step, values) == pytest.approx(values, rel=1e-5), step
    assert [record.getMessage() for record in telemetry_log.records if record.levelname == "ERROR"] == []
    if layout == "ranges":
        assert backend.scalars("setup/asked/text/next")[1] == 1
        assert backend.scalars("setup/loss_weight/text")[1] == pytest.approx(1, rel=1e-4)

    train(untouched, data, tmp_path, [], STEPS)
    after = untouched.state_dict()
    assert [name for name, one in model.state_dict().items() if not torch.equal(one, after[name])] == []


def test_positions_and_codes_are_read_from_ids(tmp_path: Path) -> None:
    reads("LlamaForCausalLM")(declared())
    backend, data = MemoryBackend(), batches()[:1]
    train(llama(), data, tmp_path, [StrategicTelemetry(logging_steps=1, backends=[backend])], 1, 1)
    kinds = {"text": 0, "padding": 0, "reference_audio": 0, "target_audio": 0}
    for ids, labels, mask in zip(
        *(data[0][name].tolist() for name in ("input_ids", "labels", "attention_mask")), strict=True
    ):
        spoken = False
        for token, label, real in zip(ids, labels, mask, strict=True):
            audio = token >= FIRST or (token == END and spoken)
            spoken = token >= FIRST
            kind = "padding" if not real else "text" if not audio else "target" if label != IGNORED else "reference"
            kinds[kind if kind in kinds else f"{kind}_audio"] += 1
    for kind, count in kinds.items():
        assert backend.scalars(f"inputs/tokens/{kind}_fraction")[1] == pytest.approx(count / sum(kinds.values())), kind
    codes = [7 * CODEBOOKS, 3 * CODEBOOKS]  # of the target, of the reference
    assert backend.scalars("inputs/supervised/audio_fraction")[1] == pytest.approx(codes[0] / sum(codes))
    assert backend.scalars("inputs/invalid_ids")[1] == 0
    assert backend.scalars("outputs/eos/supervised")[1] == 1
    wanted = {"attention/layer_0/target_to_reference", "gradients/shared_attention/norm", "gradients/text_ffn/norm"}
    assert wanted - set(backend.tags()) == set()
    said = {str(tag): str(why) for tag, why in backend.last("telemetry/absent", Table).rows}
    assert "ChatML" in said["zero_shot/chatml/compliance"]


@pytest.mark.parametrize("shared", [False, True])
def test_codes_of_frames_in_another_order_or_of_equal_ids(shared: bool, tmp_path: Path) -> None:
    """A label's codebook is that of its place in the frame, where ids do not tell."""
    layout = [1, 2, 0]
    tokens = declared(layout=layout, **({"first": [FIRST] * CODEBOOKS} if shared else {}))
    reads("LlamaForCausalLM")(tokens)
    given: dict[str, Any] = batch((3, 1, 1, 3), (2, 0, 2, 2), left=True)
    for name in ("input_ids", "labels"):  # from the order of the codebooks to that of the layout
        rows = given[name].tolist()
        for row in rows:
            for at, token in enumerate(row):
                if token >= FIRST:
                    k, code = divmod(token - FIRST, SIZE)
                    row[at] = FIRST + code + (0 if shared else layout[k] * SIZE)
        given[name] = torch.tensor(rows)
    model, backend, snapshots = llama(), MemoryBackend(), Snapshots()
    train(model, [given], tmp_path, [snapshots, StrategicTelemetry(logging_steps=1, backends=[backend])], 1, 1)
    with torch.no_grad():
        logits = snapshots.models[1].eval()(**{k: given[k] for k in ("input_ids", "attention_mask")}).logits.double()
    read = Tokens()
    for row, labels in enumerate(given["labels"].tolist()):
        place = 0
        for at in range(1, len(labels)):
            if labels[at] >= FIRST:
                read.add(layout[place % CODEBOOKS], logits[row, at - 1].tolist(), labels[at])
                place += 1
            elif labels[at] != IGNORED:
                read.add("text", logits[row, at - 1].tolist(), labels[at])
    values = read.values()
    assert shown(backend, 1, values) == pytest.approx(values, rel=1e-5)
    assert backend.scalars("outputs/loss/total") == pytest.approx(backend.scalars("outputs/loss/model"), rel=1e-5)
    assert backend.scalars("inputs/invalid_ids")[1] == 0


def test_tokens_at_the_place_of_another_codebook_are_counted(tmp_path: Path) -> None:
    reads("LlamaForCausalLM")(declared())
    given, backend = batch((3, 1, 1, 3)), MemoryBackend()
    at = given["input_ids"][0].tolist().index(BEGIN, 8) + 1
    given["input_ids"][0, at : at + 2] = given["input_ids"][0, at : at + 2].flip(0)
    train(llama(), [given], tmp_path, [StrategicTelemetry(logging_steps=1, backends=[backend])], 1, 1)
    assert backend.scalars("inputs/invalid_ids")[1] == 2


@torch.no_grad()
def test_it_speaks_after_its_prompt(tmp_path: Path) -> None:
    model = llama().eval()
    family = declared(codec=ToneCodec())(model)
    speaker = family.speaker
    assert speaker is not None
    prompt = speaker.prompt(batch((3, 2, 2, 3), (5, 1, 1, 6)), 0)
    assert prompt is not None
    assert prompt.reference is not None
    assert prompt.reference.t().tolist() == codes_of(2, 1)
    assert prompt.target.t().tolist() == codes_of(3, 3)
    ids = [*numbers(3, 0, 1, TEXT), BEGIN, *tokens_of(codes_of(2, 1)), END, *numbers(2, 2, 1, TEXT), BEGIN]
    assert prompt.inputs["input_ids"].tolist() == [ids]

    whole = [*ids, *tokens_of(codes_of(3, 3))]
    logits = model(input_ids=torch.tensor([whole])).logits[0]
    forced = speaker.teacher_forced(prompt)
    for frame in range(3):
        for k in range(CODEBOOKS):
            row = logits[len(ids) - 1 + frame * CODEBOOKS + k]
            begin = FIRST + k * SIZE
            assert int(forced[k, frame]) == int(row[begin : begin + SIZE].argmax())
    assert speaker.frames_for(prompt, 2.0) == 19

    said = speaker.generate(prompt, 7, math.inf, seed=0)
    codes: list[int] = []
    tokens = list(ids)
    while (len(tokens) < len(ids) + 7 and tokens[-1:] != [END]) or len(tokens) == len(ids):
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    for at, token in enumerate(tokens[len(ids) :]):
        if not 0 <= token - FIRST - at % CODEBOOKS * SIZE < SIZE:
            break
        codes.append(token - FIRST - at % CODEBOOKS * SIZE)
    frames = [codes[at : at + CODEBOOKS] for at in range(0, len(codes) - CODEBOOKS + 1, CODEBOOKS)]
    assert said.codes.t().tolist() == frames
    assert said.ending == ("end of stream" if END in tokens[len(ids) :] else "tokens")
    model.lm_head.weight.zero_()
    model.model.norm.register_forward_hook(lambda _module, _given, made: torch.ones_like(made))
    model.lm_head.weight[END] = 1.0
    ended = speaker.generate(prompt, 7, math.inf, seed=0)
    assert (ended.ending, ended.codes.shape) == ("end of stream", (CODEBOOKS, 0))
    unlabelled = {name: one for name, one in batch((3, 2, 2, 3)).items() if name != "labels"}
    assert speaker.prompt(unlabelled, 0) is None
    assert declared(layout=())(model).speaker is None
    speaker.idle()


def test_references_are_swapped_and_speech_is_heard(tmp_path: Path, telemetry_log: pytest.LogCaptureFixture) -> None:
    reads("LlamaForCausalLM")(declared(codec=ToneCodec()))
    model, untouched, backend = llama(attention_dropout=0.2), llama(attention_dropout=0.2), MemoryBackend()
    data = [batch((3, 2, 2, 3), (5, 1, 1, 4)), batch((2, 2, 2, 5), seed=9)]
    evaluated: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": data}
    options = {"shared_attention": {"text_audio_cosine": True}, "zero_shot": {"conditioning_every": 1, "clips": 2}}
    train(model, data, tmp_path, [StrategicTelemetry(logging_steps=1, backends=[backend], options=options)], 2, 1,
          **evaluated)  # fmt: skip
    rows = table(backend, 1)
    assert [row["sample"] for row in rows] == ["sample 0", "sample 1"]
    assert [len(row["target"].clips[0].samples) for row in rows] == [3 * 40, 4 * 40]
    assert list(backend.scalars("zero_shot/conditioning/gain")) == [1]
    assert list(backend.scalars("zero_shot/conditioning/eval/gain")) == [1, 2]
    assert list(backend.scalars("gradients/text_audio_cosine")) == [1, 2]
    assert backend.scalars("setup/causality/earlier_changes")[1] < 1e-3
    assert [record.getMessage() for record in telemetry_log.records if record.levelname == "ERROR"] == []
    train(untouched, data, tmp_path, [], 2, 1, **evaluated)
    after = untouched.state_dict()
    assert [name for name, one in model.state_dict().items() if not torch.equal(one, after[name])] == []


@torch.no_grad()
def test_the_gain_is_that_of_swapped_token_ids(tmp_path: Path) -> None:
    tokens, model, backend, snapshots = declared(), llama(), MemoryBackend(), Snapshots()
    reads("LlamaForCausalLM")(tokens)
    given = batch((3, 2, 2, 3), (4, 2, 1, 4))
    with torch.enable_grad():
        telemetry = StrategicTelemetry(logging_steps=1, backends=[backend])
        train(model, [given], tmp_path, [snapshots, telemetry], 1, 1)
    model = model.eval()  # measured after the update
    swapped = given["input_ids"].clone()
    for row, other in ((0, 1), (1, 0)):
        at = given["input_ids"][row].tolist().index(BEGIN) + 1
        swapped[row, at : at + 6] = torch.tensor(tokens_of(codes_of(2, 100 * other + 1)))
    losses = []
    for ids in (given["input_ids"], swapped):
        logits = model(input_ids=ids, attention_mask=given["attention_mask"]).logits.double()
        of = [(row, at) for row, at in (given["labels"] >= FIRST).nonzero().tolist()]
        losses.append(sum(float(-logits[r, t - 1].log_softmax(-1)[given["labels"][r, t]]) for r, t in of) / len(of))
    assert backend.scalars("zero_shot/conditioning/gain")[1] == pytest.approx(losses[1] - losses[0], abs=1e-5)


MISREAD: Mapping[str, Any] = {
    "labels shifted once more": lambda one: replace(one, labels=base.shift_labels(one.labels)),
    "aligned": lambda one: replace(one, alignment="aligned"),
    "padding and prompts counted": lambda one: replace(one, labels=one.labels.masked_fill(one.labels == IGNORED, 1)),
    "a mean of its own": lambda one: replace(one, denominator=None),
    "half of it": lambda one: replace(one, weight=0.5),
}


@pytest.mark.parametrize("how", MISREAD)
def test_a_misreading_withholds_the_total(how: str, tmp_path: Path) -> None:
    class Misread(CodecTokensFamily):
        def streams(self, inputs: Any, outputs: Any, seen: Any) -> Iterator[Any]:
            for one in super().streams(inputs, outputs, seen):
                yield replace(MISREAD[how](one), turns=None) if isinstance(one, Stream) else one

    class Declared(CodecTokens):
        def __call__(self, model: Any) -> CodecTokensFamily:
            return Misread(model, self)

    reads("LlamaForCausalLM")(Declared(FIRST, CODEBOOKS, SIZE, end=END))
    backend = MemoryBackend()
    train(llama(), batches()[:1], tmp_path, [StrategicTelemetry(logging_steps=1, backends=[backend])], 1, 1)
    assert backend.scalars("outputs/loss/total") == {}
    said = {str(tag): str(why) for tag, why in backend.last("telemetry/absent", Table).rows}
    assert said["outputs/loss/total"].startswith("family Misread reads a loss of ")


WRONG: Mapping[str, Mapping[str, Any]] = {
    "a range of another place": {"first": FIRST + 1},
    "codes of another number": {"size": SIZE - 1},
    "codebooks in another order": {"layout": (1, 0, 2)},
}


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_declaration_shows_as_misplaced_tokens(how: str, tmp_path: Path) -> None:
    """The total cannot show it: it is the same however tokens are told apart."""
    reads("LlamaForCausalLM")(declared(**WRONG[how]))
    backend = MemoryBackend()
    train(llama(), batches()[:1], tmp_path, [StrategicTelemetry(logging_steps=1, backends=[backend])], 1, 1)
    assert backend.scalars("outputs/loss/total") == pytest.approx(backend.scalars("outputs/loss/model"), rel=1e-5)
    assert backend.scalars("inputs/invalid_ids")[1] > 0


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"size": 0}, "at least 1"),
        ({"layout": (0, 1)}, "each codebook"),
        ({"first": (FIRST, FIRST + 1)}, "names 2 codebooks of 3"),
        ({"first": (FIRST, FIRST + 1, FIRST + 2)}, "share ids"),
        ({"first": (FIRST,) * 3, "layout": ()}, "share ids"),
    ],
)
def test_what_cannot_be_declared_is_refused(said: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        declared(**said)


def test_a_family_that_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    telemetry = StrategicTelemetry(logging_steps=1, backends=[MemoryBackend()], family=declared(first=1000))
    with pytest.raises(ValueError, match=r"CodecTokens.*first=1000.* fits no part of the model, a LlamaForCausalLM"):
        train(llama(), batches()[:1], tmp_path, [telemetry], 1, 1)


def test_adapters_hide_nothing(tmp_path: Path) -> None:
    """LoRA, and a prompt that is put in front of the batch's labels."""
    for config in (
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ):
        model = peft.get_peft_model(llama(), config)
        backend = MemoryBackend()
        telemetry = StrategicTelemetry(["outputs"], 1, [backend], family=declared())
        train(model, batches()[:1], tmp_path, [telemetry], 1, 1)
        assert backend.scalars("outputs/loss/total") == pytest.approx(backend.scalars("outputs/loss/model"), rel=1e-5)
        assert backend.scalars("outputs/loss/codebook_2")


# -- what the documentation shows -------------------------------------------------------------------------------------

DOCS = Path(__file__).parents[3] / "docs"


def test_the_declaration_in_the_documentation_is_heard(tmp_path: Path) -> None:
    found = re.findall(r"```python\n(.*?)```", (DOCS / "strategic_logging.md").read_text(), re.DOTALL)
    [shown] = [code for code in found if "CodecTokens(" in code]
    assert len(shown.strip().splitlines()) <= 20
    given: dict[str, Any] = {}
    exec(compile(shown, "strategic_logging.md", "exec"), given)
    heard: list[list[Tensor]] = []
    decoder = SimpleNamespace(decode=lambda layers: heard.append(layers) or torch.zeros(1, 1, 8))
    telemetry = given["orpheus"](decoder)
    tokens = telemetry.family
    assert (tokens.firsts[6], tokens.places, tokens.end) == (128266 + 6 * 4096, tuple(range(7)), 128258)
    tokens.codec.decode(torch.arange(14).view(1, 2, 7).transpose(1, 2))
    assert [layer.tolist() for layer in heard[0]] == [[[0, 7]], [[1, 4, 8, 11]], [[2, 3, 5, 6, 9, 10, 12, 13]]]


def test_the_example_runs_and_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = DOCS / "examples" / "orpheus_finetuning.py"
    assert len(path.read_text().splitlines()) <= 80
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.setattr(sys, "argv", [path.name, str(tmp_path)])
    runpy.run_path(str(path), run_name="__main__")
    [events] = tmp_path.rglob("events.out.tfevents.*")
    shown = EventAccumulator(str(events.parent))
    shown.Reload()
    total = shown.Scalars("outputs/loss/total")
    assert [event.step for event in total] == [1, 5, 10, 15, 20]
    assert [event.value for event in total] == pytest.approx(
        [event.value for event in shown.Scalars("outputs/loss/model")], rel=1e-5
    )
    losses = [event.value for event in shown.Scalars("outputs/loss/codebook_6")]
    assert losses[-1] < losses[0]
    assert shown.Scalars("zero_shot/conditioning/eval/gain")
    assert "zero_shot/clips" in str(shown.Tags()["tensors"])
