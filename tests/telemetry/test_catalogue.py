from __future__ import annotations

import itertools
import re

import pytest

from telemetry.catalogue import CATALOGUE, SECTIONS, Entry, describe, find

# The public tags, written out by hand: this list is what keeps them from changing unseen.
SETUP = [
    *(f"setup/asked/{group}/{what}" for group in ("text", "audio") for what in (
        "next", "at_offset", "declared", "offset", "undeclared", "padding", "reference",
    )),
    "setup/asked/audio/own_codebook",
    "setup/loss_weight/codebook_0",
    "setup/chance/text",
    "setup/modes/training_fraction",
    "setup/modes/evaluation_fraction",
    *(f"setup/optimizer/{what}" for what in ("held_fraction", "moved_fraction", "learning_rate")),
    "setup/norms/untouched_fraction",
    "setup/trained/audio_ffn",
    "setup/adapters/active_fraction",
    *(f"setup/references/{what}" for what in ("samples", "different", "equal_fraction", "constant_fraction")),
    *(f"setup/targets/{what}" for what in ("samples", "different", "commonest_fraction")),
    "setup/causality/earlier_changes",
    "setup/alone/changes",
    "setup/ranks/weights_apart",
    "setup/alone",
    "setup/ranks",
    *(f"setup/data_{name}" for name in ("pairs", "voices", "words", "rate", "sound")),
    "setup/data/samples",
    "setup/data/looked_at",
    "setup/data/equal_fraction",
    "setup/data/commonest_reference_fraction",
    "setup/data/commonest_target_fraction",
    *(f"setup/data/target/{name}_fraction" for name in ("silent", "clipped", "narrow", "noisy", "cut")),
    "setup/data/rate_ratio",
    "setup/data/other_voices_nearer",
    "setup/data/reference/other_texts_nearer",
    *(f"setup/{check}" for check in (
        "asked_labels", "loss_weight", "supervised", "recombined", "chance", "optimizer", "frozen", "adapters", "modes",
        "causality", "targets", "references",
    )),
]  # fmt: skip
INPUTS = [
    "inputs/tokens/hidden_fraction",
    "inputs/supervised/samples_fraction",
    "inputs/length_correlation/target",
    "inputs/length_correlation/reference",
    "inputs/tokens/total",
    "inputs/tokens/text_fraction",
    "inputs/tokens/reference_audio_fraction",
    "inputs/tokens/target_audio_fraction",
    "inputs/tokens/padding_fraction",
    "inputs/supervised/text_fraction",
    "inputs/supervised/audio_fraction",
    "inputs/invalid_ids",
    "inputs/tensor/input_ids/min",
    "inputs/tensor/input_ids/max",
    "inputs/tensor/audio_input_ids/mean",
    "inputs/tensor/labels/std",
    "inputs/tensor/labels/zero_fraction",
    "inputs/tensor/attention_mask/nonfinite",
]
OUTPUTS = [
    "outputs/loss/model",
    "outputs/loss/total",
    "steps/nonfinite_losses",
    "steps/zero_losses",
    "steps/median_loss",
    "steps/highest_rank/median_loss",
    "steps/lowest_rank/median_loss",
    "throughput/seconds_per_step",
    "throughput/slowest_rank/seconds_per_step",
    "throughput/fastest_rank/seconds_per_step",
    "throughput/slowest_loader/loader_fraction",
    "throughput/fastest_loader/loader_fraction",
    "throughput/tokens_per_second",
    "throughput/model_flops_per_second",
    "throughput/model_flops_utilization",
    "throughput/audio_seconds_per_second",
    "throughput/loader_fraction",
    "throughput/memory_bytes",
    "outputs/loss/router",
    "outputs/loss/flow",
    "outputs/loss/diffusion",
    "outputs/loss/text",
    "outputs/loss/audio",
    "outputs/loss/codebook_0",
    "outputs/loss/codebook_7",
    "outputs/accuracy/text",
    "outputs/accuracy/audio",
    "outputs/accuracy/codebook_0",
    "outputs/accuracy/codebook_11",
    "outputs/top5/text",
    "outputs/top5/audio",
    "outputs/top5/codebook_3",
    "outputs/entropy/text",
    "outputs/entropy/audio",
    "outputs/eos/probability",
    "outputs/eos/supervised",
    "outputs/codebook_0/used_fraction",
    "outputs/codebook_7/perplexity",
]
ATTENTION = [
    "attention/layer_0/text_to_text",
    "attention/layer_0/text_to_reference",
    "attention/layer_0/text_to_target",
    "attention/layer_1/reference_to_text",
    "attention/layer_1/reference_to_reference",
    "attention/layer_1/reference_to_target",
    "attention/layer_27/target_to_text",
    "attention/layer_27/target_to_reference",
    "attention/layer_27/target_to_target",
    "attention/layer_3/cross/entropy",
    "attention/layer_3/cross/entropy_fraction",
    "attention/layer_3/cross/max_logit",
    "attention/layer_3/cross/sink",
    "attention/layer_3/cross/nonfinite",
    "attention/layer_27/entropy",
    "attention/layer_27/entropy_fraction",
    "attention/layer_27/max_logit",
    "attention/layer_27/sink",
    "attention/layer_27/nonfinite",
    "activations/layer_0/text_ffn/rms",
    "activations/layer_0/text_ffn/absmax",
    "activations/layer_0/text_ffn/zero_fraction",
    "activations/layer_0/text_ffn/nonfinite",
    "activations/layer_0/text_ffn/residual_share",
    "activations/layer_12/audio_ffn/rms",
    "activations/layer_12/audio_ffn/absmax",
    "activations/layer_12/audio_ffn/zero_fraction",
    "activations/layer_12/audio_ffn/nonfinite",
    "activations/layer_12/audio_ffn/residual_share",
]
GROUPS = [
    "shared_attention",
    "text_ffn",
    "audio_ffn",
    "text_embedding",
    "audio_embedding",
    "text_head",
    "audio_head",
    "depth_decoder",
    "norms",
    "lora",
    "other",
]
GRADIENTS = [
    "gradients/total_norm",
    "gradients/clip_coefficient",
    "gradients/text_audio_cosine",
    "gradients/layer_0/shared_attention/norm",
    "gradients/layer_0/text_ffn/norm",
    "gradients/layer_12/audio_ffn/norm",
    *(f"gradients/{group}/norm" for group in GROUPS),
    *(f"gradients/{group}/update_ratio" for group in GROUPS),
    *(f"gradients/{group}/zero_fraction" for group in GROUPS),
    *(f"gradients/{group}/nonfinite" for group in GROUPS),
]
ZERO_SHOT = [
    "zero_shot/chatml/compliance",
    "zero_shot/reference/present_fraction",
    "zero_shot/reference/seconds",
    "zero_shot/chatml/violations/role_order",
    "zero_shot/chatml/violations/header",
    "zero_shot/chatml/violations/end_of_turn",
    "zero_shot/chatml/violations/reference",
    "zero_shot/chatml/violations/target",
    "zero_shot/chatml/violations/placeholders",
    "zero_shot/chatml/violations/delay_pattern",
    "zero_shot/chatml/violations/transcript",
    "zero_shot/chatml/violations/target_text",
    "zero_shot/chatml/violations/language",
    "zero_shot/reference/level_db",
    "zero_shot/reference/clipping_fraction",
    "zero_shot/reference/silence_fraction",
    "zero_shot/reference/sampling_rate",
    "zero_shot/reference/features_present",
    "zero_shot/reference/features_mean",
    "zero_shot/reference/features_std",
    "zero_shot/reference/features_nonfinite",
    "zero_shot/conditioning/gain",
    "zero_shot/conditioning/gain_without",
    "zero_shot/conditioning/codebook_0/gain",
    "zero_shot/conditioning/loss_own",
    "zero_shot/conditioning/loss_swapped",
    "zero_shot/conditioning/loss_none",
    "zero_shot/text_gain",
    "zero_shot/eval/text_gain",
    "zero_shot/conditioning/eval/gain",
    "zero_shot/conditioning/eval/gain_without",
    "zero_shot/conditioning/eval/codebook_7/gain",
    "zero_shot/conditioning/eval/loss_own",
    "zero_shot/speaker_similarity",
    "zero_shot/opinion_score",
    "zero_shot/wer",
    "zero_shot/cer",
    "zero_shot/duration_ratio",
    "zero_shot/silence_fraction",
    "zero_shot/eos_hit_rate",
    "zero_shot/reference_leak",
    "zero_shot/speaking_rate",
    "zero_shot/clipping_fraction",
    "zero_shot/codebook_use",
    "zero_shot/mel_distance",
    "zero_shot/mel_distance_shuffled",
    "zero_shot/language_pt-br/wer",
]
OTHERS = [
    "health/reference_ignored",
    "health/no_end_of_stream",
    "train/loss",
    "train/learning_rate",
    "train/grad_norm",
    "train/epoch",
    "train/train_runtime",
    "eval/loss",
    "eval/epoch",
    "eval/runtime",
    "telemetry/step_seconds",
    "telemetry/overhead_fraction",
    "telemetry/queue_depth",
    "telemetry/dropped_records",
]
SCALARS = [*INPUTS, *OUTPUTS, *ATTENTION, *GRADIENTS, *ZERO_SHOT, *OTHERS]
TABLES = [
    "inputs/tensors",
    "inputs/sequence",
    "inputs/hardest",
    "outputs/predictions",
    "gradients/largest",
    "gradients/missing",
    "zero_shot/chatml",
    "zero_shot/clips",
    "zero_shot/clips_by_speaker",
    "health/checks",
    "telemetry/absent",
]
AUDIO = [
    "inputs/reference",
    "inputs/target",
    "inputs/hardest/0",
    "inputs/hardest/10",
    "zero_shot/clip_0/reference",
    "zero_shot/clip_0/target",
    "zero_shot/clip_10/generated",
    "zero_shot/clip_10/teacher_forced",
]
IMAGES = ["attention/mass", "attention/heads", "zero_shot/clip_0/spectrogram"]
ALERTS = ["health/alerts"]
TAGS = [
    *((tag, "scalar") for tag in (*SETUP, *SCALARS)),
    *((tag, "table") for tag in (*TABLES, "setup/checks")),
    *((tag, "audio") for tag in AUDIO),
    *((tag, "image") for tag in IMAGES),
    *((tag, "alert") for tag in (*ALERTS, "setup/alerts")),
]
# Entries for whatever an earlier one does not name.
FALLBACKS = {"{train,eval,test}/<name>", "health/<name>"}


def concrete(tag: str) -> list[str]:
    """Some tags of an entry: every alternative, two indices, two names."""
    choices = []
    for part in re.split(r"(\{.+?\}(?![^{]*\})|<[^<>]+>)", tag):
        if part.startswith("{"):
            choices.append([tag for choice in part[1:-1].split(",") for tag in concrete(choice)])
        elif part in ("<k>", "<l>", "<i>"):
            choices.append(["0", "12"])
        elif part.startswith("<"):
            choices.append(["some_name", "other.name"])
        else:
            choices.append([part])
    return ["".join(parts) for parts in itertools.product(*choices)]


@pytest.mark.parametrize(("tag", "kind"), TAGS)
def test_every_public_tag_is_in_the_catalogue(tag: str, kind: str) -> None:
    entry = find(tag)
    assert entry is not None
    assert entry.kind == kind
    assert tag.split("/")[0] in SECTIONS


def test_every_entry_but_the_fallbacks_is_of_a_public_tag() -> None:
    public = {find(tag) for tag, _ in TAGS}
    assert [entry.tag for entry in CATALOGUE if entry not in public and entry.tag not in FALLBACKS] == []


@pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.tag)
def test_every_entry_says_what_it_means(entry: Entry) -> None:
    assert entry.meaning.endswith((".", "!"))
    assert entry.meaning in describe(concrete(entry.tag)[0]) or entry.tag in FALLBACKS
    # "test" is where the Trainer puts what predict() logs: shown, but no question of its own.
    assert {tag.split("/")[0] for tag in concrete(entry.tag)} <= {*SECTIONS, "test"}
    assert all(SECTIONS.values())


@pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.tag)
def test_no_other_entry_has_its_tags(entry: Entry) -> None:
    for tag in concrete(entry.tag):
        others = {other.tag for other in CATALOGUE if other is not entry and other.pattern.fullmatch(tag)}
        if entry.tag in FALLBACKS:
            assert others == set(), tag
        else:
            assert others <= FALLBACKS, tag
            assert find(tag) is entry


@pytest.mark.parametrize(
    "tag",
    [
        "outputs/loss/codebook_",
        "outputs/loss/codebook_x",
        "outputs/loss/codebook_<k>",
        "outputs/loss/text/more",
        "more/outputs/loss/text",
        "inputs/tensor/a/b/min",
        "gradients/layer_1/lora/norm",
        "attention/layer_0/text_to_padding",
        "train",
        "",
    ],
)
def test_other_tags_are_not_found(tag: str) -> None:
    assert find(tag) is None
    assert describe(tag) == ""
    assert describe(tag, "as measured here") == "as measured here"


def test_a_description_has_meaning_unit_direction_and_note() -> None:
    assert describe("outputs/loss/text", "Fused.") == (
        "Cross-entropy of supervised text tokens. Unit: nats per token. Lower is better. Fused."
    )
    assert describe("train/grad_norm") == "Gradient norm before clipping, as the Trainer logs it."


def test_a_section_is_the_first_part_of_a_tag() -> None:
    entry = find("zero_shot/clip_3/target")
    assert entry is not None
    assert entry.section == "zero_shot"
