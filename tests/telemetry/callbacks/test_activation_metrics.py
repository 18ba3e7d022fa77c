"""What feed-forward networks add, over the positions that each really serves, against loops over positions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models
from support.attention import real_kinds
from support.batches import Voices, text_batch
from support.references import assert_same
from support.steps import watched_step
from torch import Tensor, nn

Kinds = list[list[str]]


class Collected:
    """Values of every position of every microbatch, as plain lists."""

    def __init__(self) -> None:
        self.output: list[list[float]] = []
        self.added: list[list[float]] = []
        self.residual: list[list[float]] = []

    def values(self, prefix: str) -> dict[str, float]:
        """Tag → value."""
        flat = [value for row in self.output for value in row]
        found = {
            "rms": math.sqrt(sum(value * value for value in flat) / len(flat)),
            "absmax": max(abs(value) for value in flat),
            "zero_fraction": flat.count(0.0) / len(flat),
            "nonfinite": float(sum(not math.isfinite(value) for value in flat)),
        }
        if self.residual:
            squares = [sum(v * v for row in rows for v in row) for rows in (self.added, self.residual)]
            found["residual_share"] = math.sqrt(squares[0] / squares[1])
        return {f"{prefix}/{name}": value for name, value in found.items()}


def layer_inputs(model: Any, layer: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """What goes into a layer and what comes out of its attention, ``[batch, sequence, hidden]``."""
    seen: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _m, args: seen.update(before=args[0].detach().clone())),
        layer.self_attn.register_forward_hook(lambda _m, _args, out: seen.update(attended=out[0].detach().clone())),
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return seen["before"], seen["attended"]


def collect(
    network: Any, residual: Tensor, given: Tensor, kinds: Kinds, serves: Sequence[str], behind: Any = None
) -> Collected:
    """One position at a time: ``given`` is what the network is run on, ``behind`` a norm of its output."""
    found = Collected()
    for row, row_kinds in enumerate(kinds):
        for at, kind in enumerate(row_kinds):
            if kind in serves:
                with torch.no_grad():
                    output = network(given[row, at][None, None])
                    added = output if behind is None else behind(output)
                found.output.append(output.flatten().tolist())
                found.added.append(added.flatten().tolist())
                found.residual.append(residual[row, at].tolist())
    return found


@pytest.mark.parametrize("left", [False, True], ids=["right padding", "left padding"])
def test_higgs_networks_over_their_own_positions(left: bool, higgs: Any, voices: Voices, tmp_path: Path) -> None:
    padded = [
        voices.pad([voices.conversation(), voices.conversation(reference=None, target=9, seed=3)], left),
        voices.pad([voices.conversation(reference=7, seed=5)], left),
    ]
    batches = [voices.batch(samples) for samples in padded]
    layer = higgs.model.layers[1]
    with torch.no_grad():
        layer.mlp.down_proj.weight[3] = 0.0  # one value of each output is exactly zero
    totals = {"text_ffn": Collected(), "audio_ffn": Collected()}
    for samples, batch in zip(padded, batches, strict=True):
        kinds = [[position.kind for position in sample] for sample in samples]
        before, attended = layer_inputs(higgs, layer, batch)
        residual = before + attended
        for name, serves in (("text_ffn", ["text"]), ("audio_ffn", ["reference", "target"])):
            norm, network = (
                (layer.post_attention_layernorm, layer.mlp)
                if name == "text_ffn"
                else (layer.audio_post_attention_layernorm, layer.audio_mlp)
            )
            with torch.no_grad():
                part = collect(network, residual, norm(residual), kinds, serves)
            for role in ("output", "added", "residual"):
                getattr(totals[name], role).extend(getattr(part, role))
    measured = watched_step(higgs, batches, tmp_path, layers=[1]).scalars("activations")
    expected = {
        tag: v for name, part in totals.items() for tag, v in part.values(f"activations/layer_1/{name}").items()
    }
    assert expected["activations/layer_1/text_ffn/zero_fraction"] == 1 / 16
    assert_same(measured, expected)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "olmo2"])
def test_text_models_wherever_their_norms_are(kind: str, tmp_path: Path) -> None:
    model = models.make(kind, "eager")
    batch = text_batch(8, 5)
    layer = model.model.layers[1]
    before, attended = layer_inputs(model, layer, batch)
    with torch.no_grad():
        if kind == "llama":
            residual = before + attended
            given, behind = layer.post_attention_layernorm(residual), None
        else:
            residual = before + layer.post_attention_layernorm(attended)
            given = residual if kind == "olmo2" else layer.pre_feedforward_layernorm(residual)
            behind = layer.post_feedforward_layernorm
    part = collect(layer.mlp, residual, given, real_kinds(batch), ["text"], behind)
    measured = watched_step(model, [batch], tmp_path, layers=[1]).scalars("activations")
    assert_same(measured, part.values("activations/layer_1/text_ffn"))


def test_a_batch_without_audio_leaves_the_audio_network_absent(
    higgs: Any, voices: Voices, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    batch = voices.batch([voices.conversation(reference=None, target=None)])
    batch = {name: value for name, value in batch.items() if not name.startswith("audio")}
    measured = watched_step(higgs, [batch], tmp_path, layers=[0]).scalars("activations")
    assert {tag.split("/")[2] for tag in measured} == {"text_ffn"}
    assert "no activations/layer_0/audio_ffn/rms: it has no positions in the step" in telemetry_log.text


def test_what_is_not_finite_is_counted_and_named(
    higgs: Any, voices: Voices, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    higgs.train().gradient_checkpointing_enable()  # which runs every layer twice
    samples = [voices.conversation()]
    with torch.no_grad():
        higgs.model.layers[0].audio_mlp.down_proj.weight[0, 0] = torch.nan
    measured = watched_step(higgs, [voices.batch(samples)], tmp_path, layers=[0]).scalars("activations")
    audio = sum(position.kind in ("reference", "target") for position in samples[0])
    assert measured["activations/layer_0/audio_ffn/nonfinite"] == audio
    assert measured["activations/layer_0/text_ffn/nonfinite"] == 0
    assert math.isnan(measured["activations/layer_0/audio_ffn/rms"])
    assert math.isfinite(measured["activations/layer_0/text_ffn/rms"])
    assert "not finite on rank 0: activations/layer_0/audio_ffn/" in telemetry_log.text


def test_a_dead_network_shows(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    with torch.no_grad():
        higgs.model.layers[0].audio_mlp.down_proj.weight.zero_()
    measured = watched_step(higgs, [voices.batch([voices.conversation()])], tmp_path, layers=[0]).scalars("activations")
    prefix = "activations/layer_0/audio_ffn"
    assert measured[f"{prefix}/rms"] == measured[f"{prefix}/absmax"] == measured[f"{prefix}/residual_share"] == 0
    assert measured[f"{prefix}/zero_fraction"] == 1


def test_a_layer_that_scales_what_it_adds_shows_no_residual_share(
    tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    model = models.make("llama")
    model.model.layers[0].residual_multiplier = 0.2  # as Granite's layers have
    measured = watched_step(model, [text_batch(5)], tmp_path, layers=[0]).scalars("activations")
    assert sorted(tag.rpartition("/")[2] for tag in measured) == ["absmax", "nonfinite", "rms", "zero_fraction"]
    assert "no activations/layer_0/text_ffn/residual_share: the layer does not show" in telemetry_log.text
