"""The attention of a step as it is shown: right once a step, the same training, faults seen and named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from support import models
from support.attention import KINDS, AttentionSums, attention_of
from support.batches import Sample, Voices, text_batch
from support.references import differing
from support.steps import watched_step
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from telemetry.callbacks.questions import SharedAttentionLoggerCallback
from telemetry.instruments.attention_images import heads_image, mass_image
from telemetry.records import Image

EVERY = 600


def padded(voices: Voices) -> list[Sample]:
    return voices.pad([voices.conversation(), voices.conversation(target=9, seed=3)])


# The same training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_losses_and_gradients_are_the_same_bits(
    implementation: str, checkpointing: bool, make_higgs: Any, voices: Voices, tmp_path: Path
) -> None:
    batches = [voices.batch(padded(voices))] * 2
    steps = []
    for watch in (False, True):
        model = make_higgs().train()
        model.set_attn_implementation(implementation)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.2
        if checkpointing:
            model.gradient_checkpointing_enable()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)  # dropout shows a random number that is taken
            steps.append(watched_step(model, batches, tmp_path, watch, queries=EVERY))
    plain, watched = steps
    assert watched.losses == plain.losses
    assert differing(watched.gradients, plain.gradients) == []


# Faults ---------------------------------------------------------------------------------------------------------------


def test_a_reference_that_is_masked_away(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    samples = padded(voices)
    batch: dict[str, Any] = dict(voices.batch(samples))
    length = len(samples[0])
    seen = torch.ones(length, length).tril().bool().expand(2, 1, -1, -1).clone()
    for row, sample in enumerate(samples):
        reference = torch.tensor([position.kind == "reference" for position in sample])
        target = torch.tensor([position.kind == "target" for position in sample])
        seen[row, 0] &= ~(target[:, None] & reference)
    whole = watched_step(higgs, [batch], tmp_path, layers=[0]).scalars("attention")
    assert whole["attention/layer_0/target_to_reference"] > 0.01

    def forward(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **{**kwargs, "attention_mask": seen})

    inner = higgs.model.forward
    higgs.model.forward = forward
    masked = watched_step(higgs, [batch], tmp_path, layers=[0]).scalars("attention")
    assert masked["attention/layer_0/target_to_reference"] == 0.0
    assert masked["attention/layer_0/text_to_reference"] == pytest.approx(whole["attention/layer_0/text_to_reference"])


def test_queries_that_explode(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    batch = voices.batch(padded(voices))
    before = watched_step(higgs, [batch], tmp_path, queries=EVERY).scalars("attention")
    with torch.no_grad():
        higgs.model.layers[1].self_attn.q_proj.weight *= 1e4
    after = watched_step(higgs, [batch], tmp_path, queries=EVERY).scalars("attention")
    assert after["attention/layer_0/max_logit"] == before["attention/layer_0/max_logit"]
    assert after["attention/layer_1/max_logit"] == pytest.approx(1e4 * before["attention/layer_1/max_logit"], rel=1e-4)
    assert after["attention/layer_1/entropy"] < before["attention/layer_1/entropy"]


def test_queries_that_are_not_finite_are_counted_and_named(
    higgs: Any, voices: Voices, tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    with torch.no_grad():
        higgs.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    higgs.train().gradient_checkpointing_enable()  # which runs every layer twice
    found = watched_step(higgs, [voices.batch(padded(voices))], tmp_path, queries=9).scalars("attention")
    assert found["attention/layer_0/nonfinite"] == 0
    assert found["attention/layer_1/nonfinite"] == 18  # one of two heads, nine queries of two samples
    assert np.isnan(found["attention/layer_1/entropy"])
    assert re.search("not finite on rank 0: .*attention/layer_1/", telemetry_log.text)


# What is there to be looked at ----------------------------------------------------------------------------------------


def test_what_is_not_in_the_step_is_absent(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    batch = voices.batch([voices.conversation(reference=None)])
    step = watched_step(higgs, [batch], tmp_path, layers=[0])
    tags = {tag.rpartition("/")[2] for tag in step.scalars("attention") if "_to_" in tag}
    assert tags == {"text_to_text", "text_to_target", "target_to_text", "target_to_target"}
    assert "attention/heads" not in step.backend.tags()
    assert "attention/mass" in step.backend.tags()


def test_a_text_model_has_text_alone(tmp_path: Path) -> None:
    step = watched_step(models.make("llama"), [text_batch(9, 4)], tmp_path, layers=[0])
    tags = [tag for tag in step.scalars("attention") if "_to_" in tag]
    assert tags == ["attention/layer_0/text_to_text"]
    assert step.scalars("attention")[tags[0]] == pytest.approx(1)
    assert not {"attention/heads", "attention/mass"} & set(step.backend.tags())


def test_the_first_the_middle_and_the_last_layer_or_those_that_are_chosen(
    tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    def layers_of(model: Any, **options: Any) -> set[str]:
        scalars = watched_step(model, [text_batch(5)], tmp_path, **options)
        return {tag.split("/")[1] for section in ("attention", "activations") for tag in scalars.scalars(section)}

    model = models.make("llama", num_hidden_layers=6)
    assert layers_of(model) == {"layer_0", "layer_3", "layer_5"}
    assert layers_of(model, layers=[4, 1, 9]) == {"layer_1", "layer_4"}
    assert "layers [9] do not exist: the model has 6" in telemetry_log.text
    with pytest.raises(ValueError, match="counted from 0"):
        SharedAttentionLoggerCallback(layers=[-1])
    with pytest.raises(ValueError, match="at least 1"):
        SharedAttentionLoggerCallback(queries=0)


def test_another_step_looks_at_other_queries(tmp_path: Path) -> None:
    model = models.make("llama")
    found = [
        watched_step(model, [text_batch(40)], tmp_path, step=step, layers=[0], queries=3).scalars("attention")
        for step in (1, 1, 2)
    ]
    assert found[0] == found[1] != found[2]


def test_a_compiled_model_is_absent_and_said(tmp_path: Path, telemetry_log: pytest.LogCaptureFixture) -> None:
    model = models.make("llama")
    model._compiled_call_impl = model._call_impl  # as torch.nn.Module.compile leaves it
    step = watched_step(model, [text_batch(5)], tmp_path)
    assert step.scalars("attention") == step.scalars("activations") == {}
    assert "no attention: a compiled model is not watched by hooks" in telemetry_log.text
    assert "no activations: a compiled model is not watched by hooks" in telemetry_log.text


def test_a_measure_that_fails_leaves_the_rest_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, telemetry_log: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise ArithmeticError("planted")

    monkeypatch.setattr("telemetry.instruments.attention.attention_rows", fail)
    plain = watched_step(models.make("llama"), [text_batch(5)], tmp_path, watch=False)
    step = watched_step(models.make("llama"), [text_batch(5)], tmp_path)
    assert step.losses == plain.losses
    assert step.scalars("attention") == {}
    assert step.scalars("activations")
    assert telemetry_log.text.count("AttentionInstrument failed; training goes on") == 1


class OwnAttention(nn.Module):
    """Attention that does not look its function up."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return scaled_dot_product_attention(hidden_states, hidden_states, hidden_states, is_causal=True), None


def test_attention_that_cannot_be_seen_is_absent_and_said(
    tmp_path: Path, telemetry_log: pytest.LogCaptureFixture
) -> None:
    model = models.make("llama")
    model.model.layers[0].self_attn = OwnAttention(model.model.layers[0].self_attn)
    step = watched_step(model, [text_batch(5)], tmp_path, layers=[0, 1])
    assert {tag.split("/")[1] for tag in step.scalars("attention")} == {"layer_1"}
    assert "no attention/layer_0: its attention does not go through" in telemetry_log.text


# Pictures -------------------------------------------------------------------------------------------------------------


def colours(image: Image) -> set[tuple[int, ...]]:
    return {tuple(pixel) for pixel in image.pixels.reshape(-1, 3).tolist()}


LOWEST, HIGHEST = (colormaps["cividis"](value, bytes=True)[:3] for value in (0.0, 1.0))


def test_pictures_of_a_step(higgs: Any, voices: Voices, tmp_path: Path) -> None:
    step = watched_step(higgs, [voices.batch(padded(voices))], tmp_path, layers=[0, 1], queries=EVERY)
    mass, heads = (step.backend.last(f"attention/{name}", Image) for name in ("mass", "heads"))
    for image in (mass, heads):
        assert image.pixels.dtype == np.uint8
        assert image.pixels.ndim == 3
        assert image.pixels.shape[0] <= 400
        assert image.pixels.shape[1] <= 720
        assert "all ranks" in image.caption
    scalars = step.scalars("attention")
    drawn = {
        layer: np.array([[scalars[f"attention/layer_{layer}/{q}_to_{k}"] for k in KINDS] for q in KINDS])
        for layer in (0, 1)
    }
    assert np.array_equal(mass.pixels, mass_image(drawn).pixels)
    shares = {}
    kinds = [[position.kind for position in sample] for sample in padded(voices)]
    attentions = [layer.self_attn for layer in higgs.model.layers]
    for layer, attention in enumerate(attention_of(higgs, attentions, voices.batch(padded(voices)))):
        sums = AttentionSums()
        sums.add(attention, kinds)
        shares[layer] = np.array([np.mean(sums.heads[head]) for head in range(2)])
    assert np.abs(heads.pixels.astype(int) - heads_image(shares).pixels).max() <= 1  # of 255, for rounding
    shares[1] = shares[1][::-1]
    assert np.abs(heads.pixels.astype(int) - heads_image(shares).pixels).max() > 1


def test_colours_mean_the_same_at_every_step() -> None:
    low, high = np.full((3, 3), 0.0), np.full((3, 3), 1.0)
    for image in (mass_image({0: low}), heads_image({0: low[0]})):
        assert LOWEST in colours(image)
    for image in (mass_image({0: high}), heads_image({0: high[0]})):
        assert HIGHEST in colours(image)
    faint, strong = heads_image({0: np.array([0.1, 0.2])}), heads_image({0: np.array([0.8, 0.9])})
    assert faint.pixels[80, 120].sum() < strong.pixels[80, 120].sum()
    assert mass_image({0: np.full((3, 3), np.nan)}).pixels.shape == mass_image({0: low}).pixels.shape
    assert heads_image(dict.fromkeys(range(40), low[0])).pixels.shape[0] <= 400
