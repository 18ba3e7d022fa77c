"""What a step's scalars must be, worked out one number at a time in Python's own float64."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from telemetry.backends.memory import MemoryBackend
from telemetry.health.setup_rules import SETUP_RULES
from telemetry.records import Record, Scalar

from .batches import IGNORED, Position, Sample, every

OWN_SECTIONS = ("telemetry", "health", "setup", "steps", "throughput")

# What each parameter of the models is, written from their architecture: pattern of the whole name → group.
HIGGS_GROUPS = {
    r"model\.embed_tokens\.weight": "text_embedding",
    r"model\.embed_audio_tokens\.embed_audio_tokens\.weight": "audio_embedding",
    r"model\.layers\.\d+\.self_attn\.[qkvo]_proj\.weight": "shared_attention",
    r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj\.weight": "text_ffn",
    r"model\.layers\.\d+\.audio_mlp\.(gate|up|down)_proj\.weight": "audio_ffn",
    r"model\.layers\.\d+\.(audio_)?(input|post_attention)_layernorm\.weight": "norms",
    r"model\.norm\.weight": "norms",
    r"audio_lm_head\.weight": "audio_head",
    r"text_lm_head\.weight": "text_head",
}
LLAMA_GROUPS = {
    r"model\.embed_tokens\.weight": "text_embedding",
    r"model\.layers\.\d+\.self_attn\.[qkvo]_proj\.weight": "shared_attention",
    r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj\.weight": "text_ffn",
    r"model\.layers\.\d+\.(input|post_attention)_layernorm\.weight": "norms",
    r"model\.norm\.weight": "norms",
    r"lm_head\.weight": "text_head",
}


def group_of(name: str, groups: Mapping[str, str]) -> str:
    """The group of a parameter by its whole name, which exactly one pattern knows."""
    found = [group for pattern, group in groups.items() if re.fullmatch(pattern, name)]
    assert len(found) == 1, f"{name}: {found}"
    return found[0]


def gradient_values(model: nn.Module, groups: Mapping[str, str], scale: float = 1.0) -> dict[str, float]:
    """``gradients/`` of a model's gradients, each of them times ``scale``."""
    squares: dict[str, float] = defaultdict(float)
    values: dict[str, list[float]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        group, layer = group_of(name, groups), re.search(r"\.layers\.(\d+)\.", name)
        tags = ["gradients/total_norm", f"gradients/{group}/norm"]
        if layer and group != "norms":
            tags.append(f"gradients/layer_{layer[1]}/{group}/norm")
        found = parameter.grad.double().flatten().tolist()
        values[group] += found
        for tag in tags:
            squares[tag] += math.fsum(value * value for value in found)
    norms = {tag: scale * math.sqrt(total) for tag, total in squares.items()}
    zeros = {f"gradients/{group}/zero_fraction": found.count(0) / len(found) for group, found in values.items()}
    broken = {
        f"gradients/{group}/nonfinite": float(sum(not math.isfinite(value) for value in found))
        for group, found in values.items()
    }
    return norms | zeros | broken


def update_values(before: nn.Module, after: nn.Module, groups: Mapping[str, str]) -> dict[str, float]:
    """``gradients/<group>/update_ratio`` of a step that has led from one model to another."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        if old.requires_grad:
            held = sums[group_of(name, groups)]
            for was, now in zip(old.flatten().tolist(), new.flatten().tolist(), strict=True):
                held[0] += (now - was) ** 2
                held[1] += was**2
    return {f"gradients/{group}/update_ratio": math.sqrt(step / size) for group, (step, size) in sums.items()}


def token_values(samples: Sequence[Sample], codebooks: int) -> dict[str, float]:
    """``inputs/tokens`` and ``inputs/supervised`` of all positions of a step."""
    positions = every(samples)
    kinds = [position.kind for position in positions]
    values = {"inputs/tokens/total": float(len(positions))}
    for name, kind in (
        ("text", "text"), ("reference_audio", "reference"), ("target_audio", "target"), ("padding", "padding"),
    ):  # fmt: skip
        values[f"inputs/tokens/{name}_fraction"] = kinds.count(kind) / len(positions)
    labelled = sum(position.label != IGNORED for position in positions if position.kind == "text")
    values["inputs/supervised/text_fraction"] = labelled / kinds.count("text")
    values["inputs/tokens/hidden_fraction"] = 0.0
    has = [any(p.label != IGNORED or any(c != IGNORED for c in p.code_labels or ()) for p in one) for one in samples]
    values["inputs/supervised/samples_fraction"] = sum(has) / len(has)
    taught = sum(label != IGNORED for position in positions for label in position.code_labels or ())
    audio = kinds.count("reference") + kinds.count("target")
    if audio:
        values["inputs/supervised/audio_fraction"] = taught / (audio * codebooks)
    return values


def tensor_values(name: str, tensors: Sequence[Tensor]) -> dict[str, float]:
    """``inputs/tensor/<name>`` of all values of a step."""
    values = [float(value) for tensor in tensors for value in tensor.flatten().tolist()]
    finite = [value for value in values if math.isfinite(value)]
    prefix = f"inputs/tensor/{name}"
    found = {
        f"{prefix}/zero_fraction": sum(value == 0 for value in values) / len(values),
        f"{prefix}/nonfinite": float(len(values) - len(finite)),
    }
    if finite:
        mean = math.fsum(finite) / len(finite)
        found |= {
            f"{prefix}/min": min(finite),
            f"{prefix}/max": max(finite),
            f"{prefix}/mean": mean,
            f"{prefix}/std": math.sqrt(math.fsum((value - mean) ** 2 for value in finite) / len(finite)),
        }
    return found


@dataclass
class Stream:
    """Every supervised token of one stream (text, or one codebook) of a step."""

    losses: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    hits: list[bool] = field(default_factory=list)
    top5: list[bool] = field(default_factory=list)
    predicted: list[int] = field(default_factory=list)
    end_probabilities: list[float] = field(default_factory=list)

    def add(self, logits: Sequence[float], target: int, end: int | None = None) -> None:
        """One token: the logits that predict it, and what it is."""
        highest = max(logits)
        normalizer = highest + math.log(math.fsum(math.exp(value - highest) for value in logits))
        probabilities = [math.exp(value - normalizer) for value in logits]
        order = sorted(range(len(logits)), key=lambda index: (-logits[index], index))
        self.losses.append(normalizer - logits[target])
        self.entropies.append(-math.fsum(p * math.log(p) for p in probabilities if p > 0))
        self.hits.append(order[0] == target)
        self.top5.append(target in order[:5])
        self.predicted.append(order[0])
        if target == end:
            self.end_probabilities.append(probabilities[target])


@dataclass
class Outputs:
    """Every supervised token of a step, by stream: ``text``, and 0, 1, ... for the codebooks."""

    streams: dict[str | int, Stream] = field(default_factory=lambda: defaultdict(Stream))

    def add_text(self, labels: Sequence[Sequence[int]], logits: Tensor) -> None:
        """A microbatch's text: labels by row, unshifted, and logits ``[batch, sequence, vocabulary]``."""
        for row, row_labels in enumerate(labels):
            for at in range(1, len(row_labels)):
                if row_labels[at] != IGNORED:
                    self.streams["text"].add(logits[row, at - 1].double().tolist(), row_labels[at])

    def add_audio(self, samples: Sequence[Sample], logits: Tensor, end: int) -> None:
        """A microbatch's audio: logits ``[batch, sequence, codebooks, vocabulary]``."""
        for row, sample in enumerate(samples):
            for at in range(1, len(sample)):
                for k, label in enumerate(sample[at].code_labels or ()):
                    if label != IGNORED:
                        self.streams[k].add(logits[row, at - 1, k].double().tolist(), label, end)

    def values(self, special: Sequence[int] = (), codebook_size: int = 0) -> dict[str, float]:
        """Every ``outputs/`` scalar that the tokens give."""
        found: dict[str, float] = {}
        codebooks = {k: stream for k, stream in self.streams.items() if isinstance(k, int)}
        for modality, streams in (("text", [self.streams["text"]]), ("audio", list(codebooks.values()))):
            _add_means(found, modality, streams, with_entropy=True)
        for k, stream in codebooks.items():
            _add_means(found, f"codebook_{k}", [stream], with_entropy=False)
            _add_use(
                found, k, [entry for entry in stream.predicted if entry not in special], codebook_size - len(special)
            )
        means = [_mean(stream.losses) for stream in self.streams.values() if stream.losses]
        if means:
            found["outputs/loss/total"] = found["outputs/loss/model"] = math.fsum(means)
        ends = [p for stream in codebooks.values() for p in stream.end_probabilities]
        if ends:
            found["outputs/eos/probability"] = _mean(ends)
        return found


def supervised_ends(samples: Iterable[Sample], end: int) -> float:
    """The share of the stream ends that target clips should have (one a codebook) that are there with a label."""
    found: list[bool] = []
    for clip in clips_of(samples):
        if clip[0].kind == "target":
            for k in range(len(clip[0].codes or ())):
                first = next((position for position in clip if position.codes and position.codes[k] == end), None)
                found.append(bool(first and first.code_labels and first.code_labels[k] == end))
    return sum(found) / len(found)


def clips_of(samples: Iterable[Sample]) -> list[list[Position]]:
    """The clips of some samples, one after the other."""
    clips: list[list[Position]] = []
    for position in every(samples):
        if position.begins:
            clips.append([])
        if position.codes is not None:
            clips[-1].append(position)
    return clips


def differing(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """Names of what is not the same value by value; both have the same names."""
    assert ours.keys() == theirs.keys()
    return [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]


def measured_records(backend: MemoryBackend) -> dict[str, list[tuple[int, Record]]]:
    """Everything that a backend was given but what telemetry makes of it and of itself, which every step carries."""
    return {tag: records for tag, records in backend.records.items() if tag.split("/")[0] not in OWN_SECTIONS}


def setup_findings(backend: MemoryBackend) -> set[str]:
    """Names of the set-up checks that have fired."""
    return {rule.name for rule in SETUP_RULES if any(backend.scalars(rule.tag).values())}


def scalars_at(backend: MemoryBackend, step: int, *sections: str) -> dict[str, float]:
    """Tag → value of the scalars that a backend was given for a step, each exactly once."""
    found: dict[str, float] = {}
    for tag in backend.tags():
        for at, record in backend.records[tag]:
            if tag == "gradients/clip_coefficient":  # made of the total norm, and tested by itself
                continue
            if at == step and isinstance(record, Scalar) and tag.split("/")[0] in sections:
                assert tag not in found, f"{tag} twice at step {step}"
                found[tag] = record.value
    return found


def assert_same(measured: Mapping[str, float], expected: Mapping[str, float], rel: float = 1e-5) -> None:
    """The same tags with the same values."""
    assert sorted(measured) == sorted(expected)
    for tag, value in expected.items():
        assert measured[tag] == pytest.approx(value, rel=rel, abs=1e-7), tag


def _add_means(found: dict[str, float], name: str, streams: Sequence[Stream], with_entropy: bool) -> None:
    columns: dict[str, list[Any]] = {
        "loss": [value for stream in streams for value in stream.losses],
        "accuracy": [value for stream in streams for value in stream.hits],
        "top5": [value for stream in streams for value in stream.top5],
    }
    if with_entropy:
        columns["entropy"] = [value for stream in streams for value in stream.entropies]
    for column, values in columns.items():
        if values:
            found[f"outputs/{column}/{name}"] = _mean(values)


def _add_use(found: dict[str, float], k: int, entries: Sequence[int], size: int) -> None:
    if not entries:
        return
    shares = [entries.count(entry) / len(entries) for entry in sorted(set(entries))]
    found[f"outputs/codebook_{k}/used_fraction"] = len(shares) / size
    found[f"outputs/codebook_{k}/perplexity"] = math.exp(-math.fsum(share * math.log(share) for share in shares))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
