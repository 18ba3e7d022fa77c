"""The original Higgs Audio model, by a stand-in with its published interface: known, read and measured."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.boson_stand_in import AUDIO_IN, AUDIO_OUT, IGNORED, PAD, HiggsAudioModel, StandInConfig, StandInOutput
from support.steps import Steps
from support.waiting import Watch
from torch import Tensor, nn

from telemetry import StrategicTelemetry
from telemetry.backends.memory import MemoryBackend
from telemetry.families import Absent, BatchView, HiggsAudioFamily, Seen, Stream, find_family

CODEBOOKS, BOS, EOS = 3, 10, 11
TEXT = range(3, 40)

# A sample is a list of text ids and clips; a clip is its placeholder, its length in codes and whether it is taught.
Item = int | tuple[int, int, bool]


def make(**config: Any) -> HiggsAudioModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return HiggsAudioModel(StandInConfig(**config))


def stream(length: int, seed: int) -> Tensor:
    """Codes in delay pattern, ``[codebooks, length + 1 + codebooks]``."""
    chance = random.Random(seed)
    rows = []
    for k in range(CODEBOOKS):
        codes = [chance.randrange(10) for _ in range(length)]
        rows.append([BOS] * (k + 1) + codes + [EOS] * (CODEBOOKS - k))
    return torch.tensor(rows)


def supervised(codes: Tensor, taught: bool) -> Tensor:
    labels = codes.clone()
    labels[(codes == BOS) | (not taught)] = IGNORED
    for k in range(CODEBOOKS):  # of the ends only the first is taught
        labels[k, codes.shape[1] - CODEBOOKS + k + 1 :] = IGNORED
    return labels


def batch(
    samples: list[list[Item]], left: bool = False, feature_frames: list[int] | None = None
) -> dict[str, Tensor | None]:
    """The model's inputs. Every text token is a label of its own; ``feature_frames`` adds features to ``<|AUDIO|>``."""
    longest = max(map(len, samples))
    ids, mask, labels = [], [], []
    clips: dict[int, list[tuple[Tensor, Tensor]]] = {AUDIO_IN: [], AUDIO_OUT: []}
    for row, sample in enumerate(samples):
        tokens = [item if isinstance(item, int) else item[0] for item in sample]
        padding = longest - len(tokens)
        taught = [token if token > AUDIO_OUT else IGNORED for token in tokens]
        for place, item in enumerate(sample):
            if not isinstance(item, int):
                codes = stream(item[1], 100 * row + place)
                clips[item[0]].append((codes, supervised(codes, item[2])))
        ids.append([PAD] * padding + tokens if left else tokens + [PAD] * padding)
        mask.append([0] * padding + [1] * len(tokens) if left else [1] * len(tokens) + [0] * padding)
        labels.append([IGNORED] * padding + taught if left else taught + [IGNORED] * padding)
    out_labels = [label for _, label in clips[AUDIO_OUT]]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "label_ids": torch.tensor(labels),
        "label_audio_ids": torch.cat(out_labels, dim=1) if out_labels else torch.zeros(0, 0, dtype=torch.long),
        **_joined("audio_in_ids", [codes for codes, _ in clips[AUDIO_IN]]),
        **_joined("audio_out_ids", [codes for codes, _ in clips[AUDIO_OUT]]),
        **_features(feature_frames),
    }


def _joined(name: str, clips: list[Tensor]) -> dict[str, Tensor]:
    if not clips:
        return {name: torch.zeros(0, 0, dtype=torch.long), f"{name}_start": torch.zeros(0, dtype=torch.long)}
    lengths = torch.tensor([0] + [clip.shape[1] for clip in clips[:-1]])
    return {name: torch.cat(clips, dim=1), f"{name}_start": lengths.cumsum(0)}


def _features(frames: list[int] | None) -> dict[str, Tensor]:
    if frames is None:
        return {}
    features = torch.randn(len(frames), 4, max(frames), generator=torch.Generator().manual_seed(1))
    return {
        "audio_features": features,
        "audio_feature_attention_mask": (torch.arange(max(frames)) < torch.tensor(frames)[:, None]).long(),
    }


def read(model: nn.Module, inputs: dict[str, Any]) -> tuple[BatchView, StandInOutput]:
    family = find_family(model)
    assert isinstance(family, HiggsAudioFamily)
    view = family.view(inputs)
    assert view is not None
    return view, model(**inputs)


def seen(view: BatchView, tensor: Tensor) -> Tensor:
    """What a view says of the positions that the model has."""
    assert view.exists is not None
    return torch.stack([row[exists] for row, exists in zip(tensor, view.exists, strict=True)])


def assert_as_the_model(model: HiggsAudioModel, inputs: dict[str, Any]) -> None:
    view, outputs = read(model, inputs)
    assert view.audio is not None
    assert torch.equal(seen(view, view.input_ids), outputs.expanded_input_ids)
    assert int(view.positions) == outputs.expanded_input_ids.numel()
    assert torch.equal(seen(view, view.real), outputs.attention_mask.bool())
    assert view.real.sum() == outputs.attention_mask.sum()
    assert view.text_labels is not None
    assert torch.equal(seen(view, view.text_labels), outputs.expanded_labels)
    audio = view.audio
    is_audio = audio.reference | audio.target
    assert torch.equal(seen(view, is_audio), outputs.audio_in_mask | outputs.audio_out_mask)
    assert torch.equal(seen(view, view.text), outputs.attention_mask.bool() & ~seen(view, is_audio))
    assert audio.embedded is not None
    coded = seen(view, is_audio & ~audio.embedded)
    assert torch.equal(coded, outputs.audio_in_discrete_codes_mask | outputs.audio_out_mask)
    codes = seen(view, audio.codes)
    assert torch.equal(codes[outputs.audio_out_mask], _frames(inputs["audio_out_ids"]))
    assert torch.equal(seen(view, audio.labels)[outputs.audio_out_mask], _frames(inputs["label_audio_ids"]))
    assert not (audio.labels != IGNORED).any(dim=-1)[~audio.target].any()
    if model.config.encode_audio_in_tokens:
        assert torch.equal(codes[outputs.audio_in_discrete_codes_mask], _frames(inputs["audio_in_ids"]))
    assert torch.equal(audio.frames, audio.placeholders)


def _frames(codes: Tensor) -> Tensor:
    return codes.t() if codes.numel() else torch.zeros(0, CODEBOOKS, dtype=torch.long)


clips = st.tuples(st.sampled_from([AUDIO_IN, AUDIO_OUT]), st.integers(1, 6), st.booleans())
samples_strategy = st.lists(
    st.lists(st.one_of(st.sampled_from(TEXT), clips), min_size=1, max_size=7), min_size=1, max_size=3
)


@settings(max_examples=40)
@given(samples_strategy, st.booleans(), st.booleans(), st.data())
def test_any_batch_is_laid_out_as_the_model_lays_it_out(
    samples: list[list[Item]], left: bool, encodes_features: bool, data: st.DataObject
) -> None:
    model = make(skip_audio_tower=not encodes_features)
    placeholders = sum(isinstance(item, tuple) and item[0] == AUDIO_IN for sample in samples for item in sample)
    frames = data.draw(st.lists(st.integers(4, 30), min_size=placeholders, max_size=placeholders))
    inputs = batch(samples, left, frames if encodes_features and frames else None)
    assert_as_the_model(model, inputs)


def test_audio_that_is_given_as_features_alone() -> None:
    """A model that encodes no reference codes: the encoder's embeddings are the reference."""
    model = make(skip_audio_tower=False, encode_audio_in_tokens=False)
    inputs = batch([[5, (AUDIO_IN, 4, False), 6, (AUDIO_OUT, 2, True)], [7, (AUDIO_IN, 2, False)]], False, [16, 9])
    view, outputs = read(model, inputs)
    assert view.audio is not None
    assert torch.equal(seen(view, view.audio.reference), outputs.audio_in_mask)
    assert torch.equal(view.audio.embedded, view.audio.reference)
    assert view.audio.reference.sum(dim=1).tolist() == [4, 2]  # 16 and 9 frames behind the encoder
    assert_as_the_model(model, inputs)


def test_what_is_taught_is_the_target_and_all_other_audio_the_reference() -> None:
    view, _ = read(make(), batch([[5, (AUDIO_IN, 2, False), (AUDIO_OUT, 3, False), 6, (AUDIO_OUT, 1, True), 7]]))
    audio = view.audio
    assert audio is not None
    assert audio.reference.sum() == (2 + 1 + CODEBOOKS) + (3 + 1 + CODEBOOKS)
    assert audio.target.sum() == 1 + 1 + CODEBOOKS
    assert audio.starts.sum() == 3
    assert (audio.bos_id, audio.eos_id, audio.vocabulary) == (BOS, EOS, 12)


@pytest.mark.parametrize(("kept", "frames", "placeholders"), [(1, [1, 0], [1, 1]), (3, [1, 2], [1, 1])])
def test_clips_that_nothing_asks_for_or_that_are_missing(kept: int, frames: list[int], placeholders: list[int]) -> None:
    inputs = batch([[5, (AUDIO_OUT, 2, True)], [6, (AUDIO_OUT, 2, True)]])
    clips_given = [stream(2, index) for index in range(kept)]
    inputs |= _joined("audio_out_ids", clips_given)
    inputs["label_audio_ids"] = torch.cat([supervised(clip, True) for clip in clips_given], dim=1)
    view = HiggsAudioFamily(make()).view(inputs)
    assert view is not None
    assert view.audio is not None
    assert view.audio.frames.tolist() == frames
    assert view.audio.placeholders.tolist() == placeholders


@pytest.mark.parametrize(("pattern", "delay"), [(True, (0, 1, 2)), (False, (0, 0, 0))])
def test_codebooks_are_delayed_where_the_model_is_set_so(pattern: bool, delay: tuple[int, ...]) -> None:
    view = HiggsAudioFamily(make(use_delay_pattern=pattern)).view(batch([[5, (AUDIO_OUT, 2, True)]]))
    assert view is not None
    assert view.audio is not None
    assert view.audio.delay == delay


def test_a_batch_without_token_ids_has_no_view() -> None:
    assert HiggsAudioFamily(make()).view({"audio_features": torch.zeros(1)}) is None


# -- what is measured -----------------------------------------------------------------------------------------------


def measure(model: nn.Module, inputs: dict[str, Any], directory: Path, hand_over: bool = False) -> MemoryBackend:
    backend = MemoryBackend()
    callback = StrategicTelemetry(["inputs", "outputs", "zero_shot"], 1, [backend])
    with Steps(model, [callback], directory) as run, run.taken() as handed, torch.set_grad_enabled(not hand_over):
        outputs = HiggsAudioModel.forward(model, **inputs) if hand_over else model(**inputs)
        handed.update(inputs=inputs, outputs=outputs)
    return backend


def slow_losses(inputs: dict[str, Any], outputs: StandInOutput) -> dict[str, float]:
    """Loop by loop from what the model returns."""
    found: dict[str, list[float]] = {"text": [], "audio": [], **{f"codebook_{k}": [] for k in range(CODEBOOKS)}}
    for row in range(outputs.logits.shape[0]):
        for place in range(outputs.logits.shape[1] - 1):
            label = int(outputs.expanded_labels[row, place + 1])
            if label != IGNORED:
                found["text"].append(-float(outputs.logits[row, place].double().log_softmax(-1)[label]))
    starts = set(inputs["audio_out_ids_start"].tolist())
    for frame in range(inputs["audio_out_ids"].shape[1]):
        for k in range(CODEBOOKS):
            label = int(inputs["label_audio_ids"][k, frame])
            if label != IGNORED:
                assert frame not in starts  # a stream begins with a code that nothing predicts
                nats = -float(outputs.audio_logits[frame - 1, k].double().log_softmax(-1)[label])
                found[f"codebook_{k}"].append(nats)
                found["audio"].append(nats)
    return {name: sum(values) / len(values) for name, values in found.items()}


@pytest.mark.parametrize("hand_over", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_losses_are_those_of_the_models_own_output(rows: int, hand_over: bool, tmp_path: Path) -> None:
    samples: list[list[Item]] = [
        # 24 positions, a multiple of 8: the view's room for two placeholders more is room for 8 positions more.
        [5, 6, (AUDIO_IN, 4, False), 7, 8, (AUDIO_OUT, 5, True), 9, 13, 14],
        [10, (AUDIO_OUT, 2, False), 11, 12, (AUDIO_OUT, 3, True)],
    ]
    inputs, model = batch(samples[:rows]), make()
    backend = measure(model, inputs, tmp_path, hand_over)
    with torch.no_grad():
        expected = slow_losses(inputs, model(**inputs))
    measured = {name: backend.scalars(f"outputs/loss/{name}")[1] for name in expected}
    assert measured == pytest.approx(expected, rel=1e-5)
    total = expected["text"] + sum(expected[f"codebook_{k}"] for k in range(CODEBOOKS))
    assert backend.scalars("outputs/loss/total")[1] == pytest.approx(total, rel=1e-5)
    assert backend.scalars("outputs/loss/model")[1] == pytest.approx(total, rel=1e-5)
    assert backend.scalars("outputs/eos/supervised") == {1: 1.0}


def test_predictions_stand_beside_the_sample_that_they_are_of(tmp_path: Path) -> None:
    inputs = batch([[5, (AUDIO_OUT, 3, True), 9], [10, 11, 12, (AUDIO_OUT, 2, True)]])
    table = measure(make(), inputs, tmp_path).records["outputs/predictions"][0][1]
    targets = {(row[0], row[1]): row[4] for row in table.rows}  # type: ignore[union-attr]
    assert targets[("row 0", "text tokens")] == "9"
    assert targets[("row 1", "text tokens")] == "11 12"
    for row, clip in ((0, stream(3, 1)), (1, stream(2, 103))):
        for k in range(CODEBOOKS):
            codes = [code for code in clip[k].tolist() if code not in (BOS, EOS)]
            assert targets[(f"row {row}", f"codebook {k}")] == " ".join(map(str, [*codes, EOS]))


def test_shares_are_of_the_positions_that_the_model_has(tmp_path: Path) -> None:
    samples: list[list[Item]] = [[5, (AUDIO_IN, 4, False), (AUDIO_OUT, 5, True), 9], [10, 11]]
    inputs = batch(samples)
    backend = measure(make(), inputs, tmp_path)
    positions = 2 * 24  # 2 text tokens and 8 + 9 frames, rounded up to a multiple of 8
    expected = {"total": positions, "text_fraction": 4 / positions, "padding_fraction": (positions - 21) / positions}
    expected |= {"reference_audio_fraction": 8 / positions, "target_audio_fraction": 9 / positions}
    assert {name: backend.scalars(f"inputs/tokens/{name}")[1] for name in expected} == pytest.approx(expected)
    spans = backend.records["inputs/sequence"][0][1].rows  # type: ignore[union-attr]
    assert sum(span[2] for span in spans) == positions
    assert [span[1] for span in spans[:5]] == ["text", "reference audio", "target audio", "text", "padding"]


def test_what_is_embedded_is_no_code_that_could_have_a_label(tmp_path: Path) -> None:
    inputs = batch([[5, (AUDIO_IN, 4, False)], [6, (AUDIO_OUT, 2, False), (AUDIO_OUT, 5, True)]], False, [9])
    model = make(skip_audio_tower=False)
    view, outputs = read(model, inputs)
    coded = outputs.audio_in_discrete_codes_mask | outputs.audio_out_mask
    assert view.audio is not None
    assert view.audio.embedded is not None
    assert view.audio.embedded.any()
    backend = measure(model, inputs, tmp_path)
    taught = int((inputs["label_audio_ids"] != IGNORED).sum())
    expected = taught / (int(coded.sum()) * CODEBOOKS)
    assert backend.scalars("inputs/supervised/audio_fraction") == {1: pytest.approx(expected)}


def test_what_the_audio_encoder_is_given(tmp_path: Path) -> None:
    inputs = batch([[5, (AUDIO_IN, 4, False)], [6, (AUDIO_OUT, 2, False), (AUDIO_OUT, 2, True)], [7]], False, [9])
    features = inputs["audio_features"]
    assert features is not None
    features = torch.cat([features, torch.full((1, 4, 5), 77.0)], dim=2)  # padding, which must not count
    features[0, 0, 0], features[0, 1, 1] = torch.nan, torch.inf
    inputs |= {"audio_features": features, "audio_feature_attention_mask": (torch.arange(14) < 9).long()[None]}
    backend = measure(make(skip_audio_tower=False), inputs, tmp_path)
    kept = features[0, :, :9].double()
    kept = kept[kept.isfinite()]
    expected = {"features_present": 0.5, "features_mean": kept.mean().item(), "features_nonfinite": 2.0}
    expected |= {"features_std": kept.std(correction=0).item(), "present_fraction": 2 / 3}
    measured = {name: backend.scalars(f"zero_shot/reference/{name}")[1] for name in expected}
    assert measured == pytest.approx(expected, rel=1e-6)


def test_features_that_are_missing_are_seen_and_those_without_an_encoder_are_absent(tmp_path: Path) -> None:
    inputs = batch([[5, (AUDIO_IN, 4, False)]])
    with_encoder = measure(make(skip_audio_tower=False), inputs, tmp_path)
    assert with_encoder.scalars("zero_shot/reference/features_present") == {1: 0.0}
    assert "zero_shot/reference/features_mean" not in with_encoder.tags()
    without = measure(make(), inputs, tmp_path)
    assert not [tag for tag in without.tags() if "features" in tag]


# -- which model it is ----------------------------------------------------------------------------------------------


def test_it_is_known_by_its_name_and_configuration() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.model = module

    assert isinstance(find_family(Wrapper(make())), HiggsAudioFamily)

    class Finetuned(HiggsAudioModel):
        pass

    assert isinstance(find_family(Finetuned(StandInConfig())), HiggsAudioFamily)
    stranger = make()
    stranger.config = object()  # type: ignore[assignment]
    assert find_family(stranger) is None
    headless = make()
    del headless.audio_decoder_proj
    assert find_family(headless) is None
    assert find_family(nn.Linear(2, 2)) is None


def test_every_parameter_has_its_group() -> None:
    family = HiggsAudioFamily(make(skip_audio_tower=False))
    groups = {
        "embed_tokens.weight": "text_embedding",
        "audio_codebook_embeddings.weight": "audio_embedding",
        "layers.0.self_attn.o_proj.weight": "shared_attention",
        "layers.0.mlp.weight": "text_ffn",
        "layers.0.audio_mlp.weight": "audio_ffn",
        "layers.1.post_attention_layernorm.weight": "norms",
        "layers.1.audio_post_attention_layernorm.bias": "norms",
        "norm.weight": "norms",
        "audio_tower.self_attn.weight": "other",
        "audio_decoder_proj.text_lm_head.weight": "text_head",
        "audio_decoder_proj.audio_lm_head.weight": "audio_head",
    }
    names = {name for name, _ in make(skip_audio_tower=False).named_parameters()}
    assert set(groups) <= names
    groups |= {"layers.0.audio_attn.q_proj.weight": "other", "base.layers.0.mlp.up_proj.lora_A.weight": "lora"}
    groups |= {"layers.0.audio_post_audio_attn_layer_norm.weight": "norms"}
    assert {name: family.group_of(name) for name in groups} == groups
    assert "other" not in {family.group_of(name) for name in names if not name.startswith("audio_tower")}


@pytest.mark.parametrize(("shape", "fits"), [((1, 1000, 40), False), ((2, 8, 40), False), ((1, 8, 40), True)])
def test_rows_of_logits_that_do_not_fit_are_not_read(shape: tuple[int, ...], fits: bool) -> None:
    family, inputs = HiggsAudioFamily(make()), batch([[5, 6]])
    outputs = StandInOutput(logits=torch.zeros(shape), audio_logits=torch.zeros(0, 3, 12))
    declared = [*family.streams(inputs, outputs, Seen(family.view(inputs)))]
    if not fits:
        absent = next(one for one in declared if isinstance(one, Absent))
        assert absent == Absent("text", f"logits {shape} are not of the {(1, 8)} positions that the batch has room for")
        return
    text = next(one for one in declared if isinstance(one, Stream))
    assert text.fault() == ""
    assert text.predicted.tolist() == [IGNORED] * 5 + [5, 6, IGNORED]


def test_reading_a_batch_waits_for_nothing() -> None:
    """How long the expanded sequence is, is on the device: nobody asks."""
    model = make(skip_audio_tower=False)
    family = HiggsAudioFamily(model)
    text_and_audio: list[list[Item]] = [[5, (AUDIO_IN, 4, False)], [6, (AUDIO_OUT, 2, True)]]
    for inputs in (batch(text_and_audio, False, [9]), batch(text_and_audio[:1]), batch([[5, 6]])):
        outputs = model(**inputs)
        with Watch() as watch:
            view = family.view(inputs)
            assert view is not None
            streams = [one for one in family.streams(inputs, outputs, Seen(view)) if isinstance(one, Stream)]
            assert [stream.fault() for stream in streams] == [""] * 2
            assert [len(stream.predicted) for stream in streams]
        assert watch.operations
        assert watch.waits == []
