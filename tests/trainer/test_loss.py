"""The trained loss and its gradients are those of the whole accumulated batch, however it is cut up."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import one_step
import pytest
import torch
from one_step import Job, TrainerFactory, train_one_step
from support.programs import finish
from torch import Tensor
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from trainer.collator import VoiceCloningCollator
from trainer.dataset import IGNORE_INDEX, Example
from trainer.loss import AccumulatedLoss, supervised_counts

TOLERANCE = 1e-5


def make_example(
    config: HiggsAudioV2Config, seed: int, text: int, reference: int, target: int, muted: int = 0
) -> Example:
    """Random ids: ``text`` supervised tokens, clips of ``reference`` and ``target`` frames.

    The first ``muted`` codebooks of the target have no labels, so that codebooks have unequal counts too.
    """
    random = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=random)

    first_text_id = 10  # behind the special tokens
    words = draw(config.vocab_size - first_text_id, 3 + text) + first_text_id
    placeholders = torch.full((reference + target,), config.audio_token_id)
    codes = draw(config.codebook_size, reference + target, config.num_codebooks)
    audio_labels = codes.clone()
    audio_labels[:reference] = IGNORE_INDEX
    audio_labels[:, :muted] = IGNORE_INDEX
    labels = torch.full((3 + reference + text + target,), IGNORE_INDEX)
    labels[3 + reference : 3 + reference + text] = words[3:]
    input_ids = torch.cat([words[:3], placeholders[:reference], words[3:], placeholders[reference:]])
    return Example(input_ids, labels, codes, audio_labels)


@pytest.fixture(scope="module")
def config(tiny_config: HiggsAudioV2Config) -> HiggsAudioV2Config:
    return tiny_config


@pytest.fixture(scope="module")
def examples(config: HiggsAudioV2Config) -> list[Example]:
    """Eight samples with unequal counts: one without a text label, one without target audio, one first-token label.

    They have 63 text labels: two ranks or microbatches never have equally many.
    """
    shapes = [
        (1, 3, 9, 0),
        (12, 4, 2, 3),
        (0, 2, 7, 0),
        (5, 6, 0, 0),
        (30, 1, 1, 7),
        (2, 9, 17, 1),
        (4, 5, 5, 0),
        (9, 2, 11, 2),
    ]
    made = [make_example(config, seed, *shape) for seed, shape in enumerate(shapes)]
    made[6].labels[0] = made[6].input_ids[0]  # nothing stands before it to predict it from: it must not count
    return made


@pytest.fixture
def model(tiny_model: HiggsAudioV2ForConditionalGeneration) -> HiggsAudioV2ForConditionalGeneration:
    tiny_model.config.attention_dropout = 0.0
    for layer in tiny_model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    return tiny_model


def log_probabilities(model: HiggsAudioV2ForConditionalGeneration, example: Example) -> list[list[tuple[Tensor, int]]]:
    """For text and every codebook: (log probabilities, label) of every supervised token; one sample, no padding."""
    config = model.config
    hidden = model.model(
        input_ids=example.input_ids[None],
        audio_input_ids=example.audio_input_ids[None],
        audio_input_ids_mask=torch.ones(1, len(example.audio_input_ids), dtype=torch.bool),
    ).last_hidden_state[0]
    text = model.text_lm_head(hidden).log_softmax(-1)
    audio = model.audio_lm_head(hidden).view(-1, config.num_codebooks, config.codebook_size).log_softmax(-1)
    parts: list[list[tuple[Tensor, int]]] = [[] for _ in range(1 + config.num_codebooks)]
    frame = 0
    for position, token in enumerate(example.input_ids.tolist()):
        if position > 0 and example.labels[position] != IGNORE_INDEX:
            parts[0].append((text[position - 1], int(example.labels[position])))
        if token != config.audio_token_id:
            continue
        for codebook in range(config.num_codebooks):
            label = int(example.audio_labels[frame, codebook])
            if label != IGNORE_INDEX:
                parts[1 + codebook].append((audio[position - 1, codebook], label))
        frame += 1
    assert frame == len(example.audio_input_ids)
    return parts


def reference(
    model: HiggsAudioV2ForConditionalGeneration, examples: Sequence[Example]
) -> tuple[float, dict[str, Tensor]]:
    """Text mean plus each codebook's mean, every one over all its tokens in all samples; float64, by definition."""
    exact = copy.deepcopy(model).double()
    by_sample = [log_probabilities(exact, example) for example in examples]
    total = torch.zeros((), dtype=torch.float64)
    for part in range(1 + model.config.num_codebooks):
        tokens = [token for sample in by_sample for token in sample[part]]
        if tokens:
            total = total - torch.stack([values[label] for values, label in tokens]).sum() / len(tokens)
    total.backward()
    gradients = {name: weight.grad for name, weight in exact.named_parameters() if weight.grad is not None}
    return total.item(), gradients


def assert_same_step(
    measured: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]], tolerance: float = TOLERANCE
) -> None:
    assert measured[0] == pytest.approx(expected[0], rel=tolerance)
    for name, gradient in expected[1].items():
        size = float(gradient.norm())
        # A part of the model that no label reaches may have no gradient at all instead of one of zeros.
        found = measured[1].get(name, torch.zeros_like(gradient)).double()
        assert float((found - gradient).norm()) <= tolerance * size, name
    for name in measured[1].keys() - expected[1].keys():
        assert not measured[1][name].any(), name
    assert math.isfinite(measured[0])


@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_accumulated_step_equals_the_reference_on_the_whole_batch(
    accumulation: int,
    model: HiggsAudioV2ForConditionalGeneration,
    examples: list[Example],
    tmp_path: Path,
) -> None:
    expected = reference(model, examples)
    arguments = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 8 // accumulation}
    assert_same_step(train_one_step(model, examples, tmp_path, **arguments), expected)


def test_an_accumulation_that_the_epoch_cuts_short_counts_its_own_labels(
    model: HiggsAudioV2ForConditionalGeneration, examples: list[Example], tmp_path: Path
) -> None:
    """Three microbatches where four would make a step."""
    expected = reference(model, examples[:3])
    arguments = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}
    assert_same_step(train_one_step(model, examples[:3], tmp_path, **arguments), expected)


@pytest.mark.parametrize(
    ("chosen", "accumulation"), [([2], 1), ([3], 1), ([2, 2], 2), ([3, 3], 2), ([2, 3], 2), ([4], 1)]
)
def test_a_part_without_labels_adds_nothing_and_no_nan(
    chosen: list[int],
    accumulation: int,
    model: HiggsAudioV2ForConditionalGeneration,
    examples: list[Example],
    tmp_path: Path,
) -> None:
    """No text label at all, no audio label at all, and codebooks without any."""
    batch = [examples[index] for index in chosen]
    expected = reference(model, batch)
    arguments = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 1}
    measured = train_one_step(model, batch, tmp_path, **arguments)
    assert_same_step(measured, expected)
    assert all(gradient.isfinite().all() for gradient in measured[1].values())


def test_without_any_label_the_loss_is_zero(
    model: HiggsAudioV2ForConditionalGeneration, config: HiggsAudioV2Config, tmp_path: Path
) -> None:
    loss, gradients = train_one_step(model, [make_example(config, 0, 0, 4, 0)], tmp_path)
    assert loss == 0.0
    assert gradients
    assert not any(gradient.any() for gradient in gradients.values())


def test_two_ranks_equal_one_process(
    model: HiggsAudioV2ForConditionalGeneration, tiny_model_path: Path, examples: list[Example], tmp_path: Path
) -> None:
    """Two processes, two microbatches of two samples each, every rank with its own number of labels."""
    expected = reference(model, examples)
    arguments = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    model.save_pretrained(tmp_path / "model")
    torch.save(Job(tmp_path / "model", examples, arguments), tmp_path / "job")
    program = [one_step.__file__, str(tmp_path / "job"), str(tmp_path / "result")]
    finish(program, tmp_path, ranks=2)
    world_size, *measured = torch.load(tmp_path / "result")
    assert world_size == 2
    assert_same_step((measured[0], measured[1]), expected)


def test_evaluation_loss_is_the_mean_over_batches_of_each_batchs_own_loss(
    model: HiggsAudioV2ForConditionalGeneration, examples: list[Example], train: TrainerFactory
) -> None:
    """The Trainer's own definition: batches are weighed by their samples, here 3 + 3 + 2."""
    batches = [examples[:3], examples[3:6], examples[6:]]
    expected = sum(len(batch) * reference(model, batch)[0] for batch in batches) / len(examples)
    made = train(model, examples, eval_dataset=examples, per_device_eval_batch_size=3, prediction_loss_only=True)
    assert made.evaluate()["eval_loss"] == pytest.approx(expected, rel=TOLERANCE)


def test_counts_are_those_of_predicted_labels(config: HiggsAudioV2Config, examples: list[Example]) -> None:
    collator = VoiceCloningCollator(config.pad_token_id, config.audio_stream_eos_id)
    expected = [0] * (1 + config.num_codebooks)
    for example in examples:
        for label in example.labels[1:].tolist():
            expected[0] += label != IGNORE_INDEX
        for frame in example.audio_labels.tolist():
            for codebook, label in enumerate(frame):
                expected[1 + codebook] += label != IGNORE_INDEX
    for size in (1, 3, 8):
        batches = [collator(examples[at : at + size]) for at in range(0, len(examples), size)]
        assert supervised_counts(batches, config.num_codebooks).tolist() == expected


def test_a_batch_without_audio_counts_text_alone(config: HiggsAudioV2Config) -> None:
    labels = torch.tensor([[5, IGNORE_INDEX, 6, 7]])
    assert supervised_counts([{"labels": labels}], config.num_codebooks).tolist() == [2] + [0] * config.num_codebooks


def test_a_forward_pass_that_was_cut_short_does_not_shift_the_codebooks(
    model: HiggsAudioV2ForConditionalGeneration, examples: list[Example], train: TrainerFactory
) -> None:
    """A failure between two codebooks leaves the loss in the middle of its count."""
    made = train(model, examples, per_device_train_batch_size=8)
    batch = made.data_collator(examples)
    counts = supervised_counts([batch], model.config.num_codebooks)
    before = made.training_step(model, dict(batch), counts)
    model.loss_function(
        torch.zeros(1, 2, model.config.codebook_size), torch.zeros(1, 2).long(), model.config.codebook_size
    )
    assert torch.equal(made.training_step(model, dict(batch), counts), before)


def test_equal_vocabularies_are_refused(config: HiggsAudioV2Config) -> None:
    same = copy.deepcopy(config)
    same.codebook_size = same.vocab_size
    with pytest.raises(ValueError, match=f"text and audio vocabulary are both of {config.vocab_size} entries"):
        AccumulatedLoss(same)
