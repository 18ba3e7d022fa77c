"""A model that was run aside is, to the last flag and random number, what it was."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.batches import Voices
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from telemetry.probes.quiet import set_aside


def random_states() -> list[Any]:
    numpy = np.random.get_state()  # noqa: NPY002  # the one that data sets draw from
    return [random.getstate(), numpy[1].tolist(), numpy[2:], torch.get_rng_state().tolist()]


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(1))]  # noqa: NPY002


def flags(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def inputs_of(voices: Voices) -> dict[str, Tensor]:
    return voices.batch(voices.pad([voices.conversation(seed=1), voices.conversation(reference=7, seed=2)]))


class Noisy(nn.Module):
    """Draws from every generator, and says whether it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        draw()
        return self.drop(self.linear(x))


def test_random_states_are_put_back() -> None:
    model = Noisy()
    before = random_states()
    with set_aside(model):
        model(torch.ones(1, 2))
        drawn = random_states()
        assert all(drawn[at] != before[at] for at in (0, 2, 3))
    assert random_states() == before


def test_every_module_gets_its_own_flag_back_and_is_in_eval_mode_inside() -> None:
    model = nn.Sequential(Noisy(), nn.Sequential(nn.Linear(2, 2), Noisy()))
    model[1].eval()
    model[1][0].train()
    before = flags(model)
    assert len(set(before)) == 2
    with set_aside(model):
        assert not any(flags(model))
        first, second = model(torch.ones(3, 2)), model(torch.ones(3, 2))
        assert torch.equal(first, second)  # no dropout
        assert not first.requires_grad
    assert flags(model) == before
    assert torch.is_grad_enabled()


def test_modes_are_set_without_the_modules_own_idea_of_it() -> None:
    class Merging(nn.Linear):
        """Does more than set the flag, as some adapters do."""

        def train(self, mode: bool = True) -> Any:
            self.weight.data += 1
            return super().train(mode)

    model = Merging(2, 2)
    weight = model.weight.clone()
    with set_aside(model):
        assert not model.training
    assert model.training
    assert torch.equal(model.weight, weight)


def fail_after(action: Callable[[], Any]) -> None:
    action()
    raise ZeroDivisionError


def test_everything_is_put_back_when_the_inside_raises() -> None:
    model = Noisy()
    before = random_states(), flags(model)
    with pytest.raises(ZeroDivisionError), set_aside(model):
        fail_after(draw)
    assert (random_states(), flags(model)) == before
    assert torch.is_grad_enabled()


def test_tensors_made_inside_can_be_trained_on_later() -> None:
    """Of inference mode they could not."""
    model = nn.Linear(2, 2)
    with set_aside(model):
        model.register_buffer("scale", torch.ones(2) * 2)
    (model(torch.ones(1, 2)) * model.scale).sum().backward()
    assert model.weight.grad is not None


def test_weights_cast_without_gradients_are_not_found_again() -> None:
    model = nn.Linear(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with set_aside(model):
            model(torch.ones(1, 2))
        model(torch.ones(1, 2)).float().sum().backward()
    assert model.weight.grad is not None


def test_buffers_that_a_longer_sequence_replaces_are_put_back() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        rope_parameters=rope,
    )
    model = LlamaForCausalLM(config).eval()
    tokens = torch.arange(7)[None]
    rotary = model.model.rotary_emb
    before = model(tokens).logits, rotary.inv_freq, rotary.max_seq_len_cached
    with set_aside(model):
        model(torch.arange(15)[None])
        assert not torch.equal(rotary.inv_freq, before[1])
        assert rotary.max_seq_len_cached != before[2]
    assert rotary.inv_freq is before[1]
    assert rotary.max_seq_len_cached == before[2]
    assert torch.equal(model(tokens).logits, before[0])


def test_configurations_are_put_back() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    before = model.config.to_dict(), model.generation_config.to_dict()
    rope = model.config.rope_parameters
    with set_aside(model):
        model.config.use_cache = not model.config.use_cache
        model.config.rope_parameters["rope_theta"] = 1.0
        model.generation_config.max_length = 3
        model.generation_config.left_over = 1
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before
    assert not hasattr(model.generation_config, "left_over")
    assert rope is not None


def test_generation_leaves_the_model_as_it_was(make_higgs: Callable[..., Any], voices: Voices) -> None:
    model = make_higgs().train()
    sample = voices.conversation()
    asked = next(at for at, position in enumerate(sample) if position.kind == "target")
    prompt = {name: tensor for name, tensor in voices.batch([sample[:asked]]).items() if "labels" not in name}
    before = random_states(), flags(model), copy.deepcopy(model.state_dict()), vars(model).keys()
    configs = model.config.to_dict(), model.generation_config.to_dict()
    with set_aside(model):
        model.generate(**prompt, max_new_tokens=3, do_sample=True)
        assert random_states() != before[0]
    assert (random_states(), flags(model)) == before[:2]
    assert (model.config.to_dict(), model.generation_config.to_dict()) == configs
    assert all(torch.equal(tensor, before[2][name]) for name, tensor in model.state_dict().items())
    assert vars(model).keys() == before[3]


def test_gradient_checkpointing_does_not_run(make_higgs: Callable[..., Any], voices: Voices) -> None:
    model = make_higgs().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    for layer in model.model.layers:
        checkpoint = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = lambda *args, _run=checkpoint: calls.append(1) or _run(*args)
    inputs = inputs_of(voices)
    with set_aside(model):
        model(**inputs)
    assert calls == []
    model(**inputs)
    assert len(calls) == 2


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_a_compiled_model_is_run_as_it_was_written() -> None:
    compiled: list[int] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    model = Doubling(2, 2)
    model.compile(backend=backend)
    with set_aside(model):
        expected = model(torch.ones(1, 2))
    assert compiled == []
    assert torch.equal(model(torch.ones(1, 2)), expected)
    assert compiled == [1]
