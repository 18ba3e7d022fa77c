"""What a loss asks for, read from its gradient, against the labels and weights that the loss was made with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from telemetry.measures.asked_labels import Asked, asked_labels, codebook_matches, offset_matches, top_two


def read(logits: Tensor, labels: Tensor, weights: Tensor, **options: float) -> Asked:
    """Of the loss sum of weights × cross-entropy; a weight of 0 leaves a row out."""
    logits = logits.clone().requires_grad_()
    each = cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none", **options)  # type: ignore[arg-type]
    (each * weights.flatten()).sum().backward()
    assert logits.grad is not None
    return asked_labels(logits.grad, top_two(logits.detach()))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 3)),
    size=st.integers(2, 40),
    scale=st.sampled_from([0.01, 1.0, 8.0]),
)
def test_label_and_weight_of_every_row_are_those_of_the_loss(
    seed: int, shape: tuple[int, int, int], size: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, size, generator=generator, dtype=torch.float64).mul(scale).float()
    labels = torch.randint(size, shape, generator=generator)
    weights = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.4)
    asked = read(logits, labels, weights)
    sure = cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(shape) > 1e-4
    taught = (weights > 0.01) & sure  # of a row that is known for certain, the gradient is rounding
    assert torch.equal(asked.labels[taught], labels[taught])
    assert asked.supervised[taught].all()
    assert not asked.supervised[weights == 0].any()
    torch.testing.assert_close(asked.weights[taught].double(), weights[taught].double(), rtol=2e-2, atol=1e-3)
    assert (asked.weights[weights == 0] == 0).all()


def test_a_loss_that_adds_to_the_cross_entropy_or_smooths_it_leaves_the_label() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(4, 5, 30, generator=generator), torch.randint(30, (4, 5), generator=generator)
    ones = torch.ones(4, 5)
    smoothed = read(logits, labels, ones, label_smoothing=0.1)
    assert torch.equal(smoothed.labels, labels)
    assert smoothed.clear.all()
    assert 0.8 < smoothed.weights.mean() < 1.05
    grown = logits.clone().requires_grad_()
    (
        cross_entropy(grown.flatten(0, 1), labels.flatten(), reduction="sum") + 1e-3 * grown.logsumexp(-1).pow(2).sum()
    ).backward()
    assert grown.grad is not None
    assert torch.equal(asked_labels(grown.grad, top_two(logits)).labels, labels)


def test_bfloat16_gradients_are_read_too() -> None:
    generator = torch.Generator().manual_seed(2)
    logits, labels = torch.randn(64, 50, generator=generator).bfloat16(), torch.randint(50, (64,), generator=generator)
    asked = read(logits, labels, torch.ones(64, dtype=torch.bfloat16))
    assert torch.equal(asked.labels, labels)
    assert asked.weights.mean() == pytest.approx(1, abs=0.02)


def matches_one_by_one(labels: Tensor, clear: Tensor, tokens: Tensor, real: Tensor, offset: int) -> int:
    count = 0
    for row in range(labels.shape[0]):
        for at in range(labels.shape[1] - offset):
            count += bool(clear[row, at] and real[row, at + offset] and labels[row, at] == tokens[row, at + offset])
    return count


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 3), length=st.integers(1, 7), codebooks=st.integers(1, 4))
def test_matches_are_counted_as_one_by_one(seed: int, batch: int, length: int, codebooks: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(3, (batch, length, codebooks), generator=generator)
    labels = torch.randint(3, (batch, length, codebooks), generator=generator)
    clear = torch.rand(batch, length, codebooks, generator=generator) > 0.3
    real = torch.rand(batch, length, generator=generator) > 0.2
    asked = Asked(labels, torch.ones(batch, length, codebooks), clear, clear)
    for k in range(codebooks):
        own = Asked(labels[..., k], asked.weights[..., k], clear[..., k], clear[..., k])
        expected = [matches_one_by_one(labels[..., k], clear[..., k], codes[..., k], real, d) for d in range(4)]
        assert offset_matches(own, codes[..., k], real, 4).tolist() == expected
    found = codebook_matches(asked, codes, real, 1)
    for k in range(codebooks):
        for j in range(codebooks):
            assert found[k, j] == matches_one_by_one(labels[..., k], clear[..., k], codes[..., j], real, 1)
