"""Where a loss is fused with the head, what the model predicts is what it would have predicted without."""

from __future__ import annotations

import functools
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from support.models import SHAPE, sure
from support.references import differing, scalars_at
from support.steps import Steps, gradients_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from telemetry import OutputLoggerCallback, StrategicTelemetry
from telemetry.backends.memory import MemoryBackend
from telemetry.families import causal_lm
from telemetry.families.base import shift_labels
from telemetry.families.fused import SPREAD, even_rows
from telemetry.instruments.outputs import PART_SAMPLED, TOTAL
from telemetry.records import Scalar, Table

MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Granite": {"logits_scaling": 8.0},
    "Cohere": {"logit_scale": 0.0625},
    "Gemma2": {"final_logit_softcapping": 0.5},
    "Qwen3Moe": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
        **{"output_router_logits": True, "router_aux_loss_coef": 0.1},
    },
    "OPT": {"dropout": 0.0, "ffn_dim": 24},
    "GPT2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


def make(name: str, **changes: Any) -> Any:
    """A model in training mode."""
    config = getattr(transformers, f"{name}Config")(**SHAPE | {"num_hidden_layers": 2} | MODELS[name] | changes)
    kind = getattr(transformers, f"{name}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel")
    return sure(lambda: kind(config).train(), 3, 0.3)


def fuse(model: Any, empty: Any = None) -> Any:
    """Replace a model's forward pass as fused losses do: it returns its loss, and no logits."""
    original = type(model).forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **inputs: Any) -> Any:
        whole = original(self, *args, **inputs)
        return type(whole)(**{**whole, "logits": empty})

    model.forward = types.MethodType(forward, model)
    return model


def batches(**more: Any) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for rows, length in ((2, 9), (3, 6)):
        ids = torch.randint(3, 29, (rows, length), generator=generator)
        labels = ids.clone()
        labels[0, :4] = labels[-1, -2:] = -100
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **more})
    return made


def step(model: Any, directory: Path, kind: Any = OutputLoggerCallback, made: Any = None) -> MemoryBackend:
    backend = MemoryBackend()
    callbacks = [] if kind is None else [kind(logging_steps=1, backends=[backend])]
    with Steps(model, callbacks, directory, loss=lambda model, batch: model(**batch).loss) as steps:
        steps.step(batches() if made is None else made)
    return backend


def shown(backend: MemoryBackend) -> dict[str, float]:
    return scalars_at(backend, 1, "outputs")


def predictions(backend: MemoryBackend) -> tuple[Any, ...]:
    return backend.last("outputs/predictions", Table).rows


def why(backend: MemoryBackend) -> dict[str, str]:
    return {str(row[0]): str(row[1]) for row in backend.last("telemetry/absent", Table).rows}


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_unfused_model(name: str, counted: bool, tmp_path: Path) -> None:
    """Scales, caps, experts' losses and all; of losses that are divided by a count of the trainer's, too."""
    made = batches(**({"num_items_in_batch": torch.tensor(17)} if counted else {}))
    expected, found = step(make(name), tmp_path, made=made), step(fuse(make(name)), tmp_path, made=made)
    assert shown(found) == shown(expected)
    assert shown(found)[TOTAL] == pytest.approx(shown(found)["outputs/loss/model"], rel=1e-5)
    assert predictions(found) == predictions(expected)


@pytest.mark.parametrize("empty", [torch.empty(0), object()])
def test_something_empty_in_the_place_of_logits(empty: Any, tmp_path: Path) -> None:
    assert shown(step(fuse(make("Llama"), empty), tmp_path)) == shown(step(make("Llama"), tmp_path))


def test_labels_that_were_shifted_before(tmp_path: Path) -> None:
    made = batches()
    for batch in made:
        batch["shift_labels"] = shift_labels(batch["labels"])
    assert shown(step(fuse(make("Gemma2")), tmp_path, made=made)) == shown(step(make("Gemma2"), tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype: torch.dtype, tmp_path: Path) -> None:
    def mixed(model: Any) -> Any:
        model.forward = torch.autocast("cpu", dtype)(model.forward)
        return model

    assert shown(step(mixed(fuse(make("Granite"))), tmp_path)) == shown(step(mixed(make("Granite")), tmp_path))


def test_a_head_of_ones_own_is_the_models(tmp_path: Path) -> None:
    """Put in the place of one module's forward pass, as the one in a finer dtype is, say."""

    def own(model: Any) -> Any:
        head = model.lm_head
        head.forward = lambda hidden: torch.nn.functional.linear(hidden.double(), head.weight.double()).tanh().float()
        return model

    assert shown(step(own(fuse(make("Llama"))), tmp_path)) == shown(step(own(make("Llama")), tmp_path))


@pytest.mark.parametrize("adapted", [["q_proj"], ["q_proj", "lm_head"]])
def test_adapters(adapted: list[str], tmp_path: Path) -> None:
    def adapt(model: Any) -> Any:
        made = get_peft_model(model, LoraConfig(r=2, target_modules=adapted, init_lora_weights=False))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            for name, parameter in made.named_parameters():
                if "lora" in name:
                    torch.nn.init.normal_(parameter, std=0.3)
        return made

    assert shown(step(adapt(fuse(make("Llama"))), tmp_path)) == shown(step(adapt(make("Llama")), tmp_path))


def test_a_head_that_draws_at_random_is_not_run_again(tmp_path: Path) -> None:
    model = fuse(make("Llama"))
    model.lm_head = nn.Sequential(nn.Dropout(0.5), model.lm_head)
    found = step(model, tmp_path)
    assert set(shown(found)) == {"outputs/loss/model"}
    assert "draws at random" in why(found)["outputs/loss/text"]


def test_a_head_that_is_spread_over_ranks_is_not_gathered(
    tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    model = fuse(make("Llama"))
    model.lm_head.weight.device_mesh = "of two ranks"
    found = step(model, tmp_path)
    assert set(shown(found)) == {"outputs/loss/model"}
    assert why(found)["outputs/loss/text"] == SPREAD
    assert "Traceback" not in telemetry_log.text


def test_nothing_of_the_model_is_touched(tmp_path: Path) -> None:
    """Gradients and random state with everything on are as without; hooks on the head see no pass of telemetry's."""

    def trained(kind: Any) -> tuple[dict[str, Tensor], Tensor, list[str]]:
        model, called = fuse(make("Llama", attention_dropout=0.2)), []
        model.lm_head.register_forward_hook(lambda *_: called.append("head"))
        model.model.register_forward_hook(lambda *_: called.append("decoder"))
        torch.manual_seed(4)
        step(model, tmp_path, kind)
        assert all(module.training for module in model.modules())
        return gradients_of(model), torch.get_rng_state(), called

    gradients, state, called = trained(None)
    measured = trained(StrategicTelemetry)
    assert differing(measured[0], gradients) == []
    assert torch.equal(measured[1], state)
    assert measured[2] == called == ["decoder", "head"] * 2


# -- many tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("marked", ["none", "few", "as many", "more", "all"])
def test_even_rows(size: int, marked: str) -> None:
    places = torch.zeros(23, dtype=torch.bool)
    count = {"none": 0, "few": size - 1, "as many": size, "more": size + 5, "all": 23}[marked]
    places[torch.randperm(23, generator=torch.Generator().manual_seed(size))[:count]] = True
    rows, each = even_rows(places, size)
    known = [at for at in range(23) if places[at]]
    if count <= size:
        first, padding = rows[:count].tolist(), rows[count:].tolist()
        assert (first, float(each)) == (known, 1.0)
        assert not any(places[at] for at in padding)
    else:
        assert rows.tolist() == [known[i * count // size] for i in range(size)]
        assert float(each) == pytest.approx(count / size)


def test_of_many_tokens_a_sample_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass counts as much as its supervised tokens; the total is withheld, and nobody is accused."""
    monkeypatch.setattr(causal_lm, "SAMPLE", 8)
    found, model = step(fuse(make("Gemma2")), tmp_path), make("Gemma2")
    total = tokens = 0.0
    for batch in batches():
        with torch.no_grad():
            losses = cross_entropy(
                model(batch["input_ids"]).logits[:, :-1].flatten(0, 1),
                batch["labels"][:, 1:].flatten(),
                reduction="none",
            )
        supervised = losses[batch["labels"][:, 1:].flatten() != -100].tolist()
        chosen = [supervised[i * len(supervised) // 8] for i in range(8)]
        total, tokens = total + sum(chosen) / 8 * len(supervised), tokens + len(supervised)
    values = shown(found)
    assert values["outputs/loss/text"] == pytest.approx(total / tokens, rel=1e-5)
    assert TOTAL not in values
    assert why(found)[TOTAL] == PART_SAMPLED
    assert {row[1] for row in predictions(found)} == {"text (1 of 1.25)", "text tokens (1 of 1.25)"}
    assert sum(row[2] for row in predictions(found) if row[1] == "text tokens (1 of 1.25)") == 8
    note = "of at most 1,024 supervised tokens of a pass"
    assert note in found.last("outputs/loss/text", Scalar).note


def test_few_supervised_tokens_among_many_are_all_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = batches()
    for batch in made:
        batch["labels"][:, 3:] = -100
        batch["labels"][1, 2] = 5
    monkeypatch.setattr(causal_lm, "SAMPLE", 8)
    expected, found = step(make("Llama"), tmp_path, made=made), step(fuse(make("Llama")), tmp_path, made=made)
    assert shown(found) == pytest.approx(shown(expected))
    assert predictions(found) == predictions(expected)
