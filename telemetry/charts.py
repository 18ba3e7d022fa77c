"""Which metrics belong on one chart: declared once for every dashboard.

A chart shows tags whose values are read against each other: the parts of a loss, every codebook, every layer. Tags are
patterns as in :mod:`telemetry.catalogue`; their meaning, unit and better direction are said there and nowhere else.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from telemetry.catalogue import SECTIONS, tag_regex


@dataclass(frozen=True)
class Chart:
    """Scalars that share axes.

    Attributes:
        title: what the chart is called.
        tags: tags, or patterns of tags, in the order in which they are shown.
    """

    title: str
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """The charts that answer the question of one section.

    Attributes:
        section: the part of a tag before its first slash.
        title: the question.
        charts: most telling first.
    """

    section: str
    title: str
    charts: tuple[Chart, ...]


HEADLINES: tuple[tuple[str, ...], ...] = (
    ("outputs/loss/total", "train/loss"),
    ("eval/loss",),
    ("outputs/accuracy/audio", "outputs/accuracy/text"),
    ("zero_shot/conditioning/eval/gain", "zero_shot/conditioning/gain"),
    ("zero_shot/wer", "zero_shot/mel_distance"),
    ("zero_shot/speaker_similarity",),
)
"""What is looked at first: of each line the first tag that a run has."""


_HEADLINES = frozenset(tag for tags in HEADLINES for tag in tags)


def is_headline(tag: str) -> bool:
    """Whether a tag is among :data:`HEADLINES`."""
    return tag in _HEADLINES


def anchored(tag: str) -> str:
    """The regular expression of exactly the tags that a tag or pattern of tags stands for: ``^…$``.

    TensorBoard's Custom Scalars take a regular expression that matches the beginning of a tag for a match.
    """
    return f"^{tag_regex(tag)}$"


@functools.lru_cache(maxsize=4096)
def matcher(tag: str) -> re.Pattern[str]:
    """:func:`anchored`, compiled. Use ``fullmatch``: ``$`` also matches before a newline at the end."""
    return re.compile(anchored(tag))


def expanded(tag: str) -> list[str]:
    """A pattern with each of its ``{a,b}`` alternatives in their place, in their order."""
    match = re.search(r"\{([^{}]+)\}", tag)
    if match is None:
        return [tag]
    before, after = tag[: match.start()], tag[match.end() :]
    return [whole for choice in match[1].split(",") for whole in expanded(before + choice + after)]


def _question(section: str, *charts: Chart) -> Question:
    return Question(section, SECTIONS[section], charts)


QUESTIONS: tuple[Question, ...] = (
    _question(
        "setup",
        Chart("Labels that are the next token", ("setup/asked/{text,audio}/next",)),
        Chart("Weight of every part in the loss", ("setup/loss_weight/<name>",)),
        Chart("Loss over that of a guess", ("setup/chance/<name>",)),
        Chart("Share that is trained, by part of the model", ("setup/trained/<name>",)),
    ),
    _question(
        "inputs",
        Chart(
            "What positions are",
            ("inputs/tokens/{text_fraction,reference_audio_fraction,target_audio_fraction,padding_fraction}",),
        ),
        Chart("Share that is supervised", ("inputs/supervised/{text_fraction,audio_fraction}",)),
        Chart("Positions of a step", ("inputs/tokens/total",)),
        Chart("Ids outside their vocabulary", ("inputs/invalid_ids",)),
        Chart("Input values that are NaN or infinite", ("inputs/tensor/<name>/nonfinite",)),
    ),
    _question(
        "outputs",
        Chart("Loss by part", ("outputs/loss/{model,total,text,audio,router}",)),
        Chart("Loss by codebook", ("outputs/loss/codebook_<k>",)),
        Chart("Accuracy by modality", ("outputs/accuracy/{text,audio}",)),
        Chart("Accuracy by codebook", ("outputs/accuracy/codebook_<k>",)),
        Chart("Top-5 accuracy by modality", ("outputs/top5/{text,audio}",)),
        Chart("Top-5 accuracy by codebook", ("outputs/top5/codebook_<k>",)),
        Chart("End of stream", ("outputs/eos/{probability,supervised}",)),
        Chart("Entropy of the predictions", ("outputs/entropy/{text,audio}",)),
        Chart("Codebook entries in use", ("outputs/codebook_<k>/used_fraction",)),
        Chart("Perplexity of codebook use", ("outputs/codebook_<k>/perplexity",)),
    ),
    _question(
        "attention",
        Chart("Target audio to reference, by layer", ("attention/layer_<l>/target_to_reference",)),
        Chart("Target audio to text, by layer", ("attention/layer_<l>/target_to_text",)),
        Chart("Text to reference, by layer", ("attention/layer_<l>/text_to_reference",)),
        Chart("Entropy of attention, by layer", ("attention/layer_<l>/entropy",)),
        Chart("Largest attention logit, by layer", ("attention/layer_<l>/max_logit",)),
        Chart("Attention on the first token, by layer", ("attention/layer_<l>/sink",)),
    ),
    _question(
        "activations",
        Chart("Text feed-forward output, by layer", ("activations/layer_<l>/text_ffn/rms",)),
        Chart("Audio feed-forward output, by layer", ("activations/layer_<l>/audio_ffn/rms",)),
        Chart("Largest text feed-forward output, by layer", ("activations/layer_<l>/text_ffn/absmax",)),
        Chart("Largest audio feed-forward output, by layer", ("activations/layer_<l>/audio_ffn/absmax",)),
        Chart("Text feed-forward, share of the residual stream", ("activations/layer_<l>/text_ffn/residual_share",)),
        Chart("Audio feed-forward, share of the residual stream", ("activations/layer_<l>/audio_ffn/residual_share",)),
        Chart("Zeros in feed-forward outputs, by layer", ("activations/layer_<l>/{text_ffn,audio_ffn}/zero_fraction",)),
    ),
    _question(
        "gradients",
        Chart("Norm of all gradients", ("gradients/total_norm",)),
        Chart("Gradient norm by part of the model", ("gradients/<group>/norm",)),
        Chart("Size of the step relative to the weights", ("gradients/<group>/update_ratio",)),
        Chart("Agreement of text and audio gradients", ("gradients/text_audio_cosine",)),
        Chart("Shared attention, gradient norm by layer", ("gradients/layer_<l>/shared_attention/norm",)),
        Chart("Text feed-forward, gradient norm by layer", ("gradients/layer_<l>/text_ffn/norm",)),
        Chart("Audio feed-forward, gradient norm by layer", ("gradients/layer_<l>/audio_ffn/norm",)),
        Chart("Share of gradients that are zero", ("gradients/<group>/zero_fraction",)),
        Chart("Gradients that are NaN or infinite", ("gradients/<group>/nonfinite",)),
    ),
    _question(
        "zero_shot",
        Chart(
            "What a sample's own reference is worth",
            ("zero_shot/conditioning/{gain,gain_without,eval/gain,eval/gain_without}",),
        ),
        Chart("What a sample's own reference is worth, by codebook", ("zero_shot/conditioning/codebook_<k>/gain",)),
        Chart("What a sample's own words are worth", ("zero_shot/{text_gain,eval/text_gain}",)),
        Chart(
            "Audio loss with its own reference, another and none",
            ("zero_shot/conditioning/{loss_own,loss_swapped,loss_none}",),
        ),
        Chart("Speaker similarity, generated against reference", ("zero_shot/speaker_similarity",)),
        Chart("Predicted opinion of the sound", ("zero_shot/opinion_score",)),
        Chart("Word and character error rate", ("zero_shot/{wer,cer}",)),
        Chart("Length and speed against the target", ("zero_shot/{duration_ratio,speaking_rate}",)),
        Chart(
            "Speech that ends, is silent, clips or repeats the reference",
            ("zero_shot/{eos_hit_rate,silence_fraction,clipping_fraction,reference_leak}",),
        ),
        Chart("Distance from the target's spectrogram", ("zero_shot/{mel_distance,mel_distance_shuffled}",)),
        Chart(
            "Samples that are fit for voice cloning",
            ("zero_shot/chatml/compliance", "zero_shot/reference/present_fraction"),
        ),
        Chart(
            "Samples by what is wrong with them",
            (
                "zero_shot/chatml/violations/{role_order,header,end_of_turn,reference,transcript,target}",
                "zero_shot/chatml/violations/{placeholders,delay_pattern,target_text,language}",
            ),
        ),
        Chart("Length of the reference", ("zero_shot/reference/seconds",)),
    ),
    _question(
        "health",
        Chart("Verdict of every rule: 0 ok, 1 warning, 2 failing", ("health/<name>",)),
    ),
    _question(
        "steps",
        Chart("Losses of all steps that were bad", ("steps/{nonfinite_losses,zero_losses}",)),
        Chart("Median loss of all steps", ("steps/median_loss", "steps/{highest_rank,lowest_rank}/median_loss")),
    ),
    _question(
        "throughput",
        Chart(
            "Time of a step", ("throughput/seconds_per_step", "throughput/{slowest_rank,fastest_rank}/seconds_per_step")
        ),
        Chart("Tokens a second", ("throughput/tokens_per_second",)),
        Chart("Operations of the model a second", ("throughput/model_flops_per_second",)),
        Chart("Share of what the GPUs could do", ("throughput/model_flops_utilization",)),
        Chart("Seconds of audio a second", ("throughput/audio_seconds_per_second",)),
        Chart(
            "Share of a step that waits for data",
            ("throughput/loader_fraction", "throughput/{slowest_loader,fastest_loader}/loader_fraction"),
        ),
        Chart("Memory", ("throughput/memory_bytes",)),
    ),
    _question(
        "train",
        Chart("Loss as the Trainer logs it", ("train/loss", "eval/loss")),
        Chart("Learning rate", ("train/learning_rate",)),
        Chart("Gradient norm as the Trainer logs it", ("train/grad_norm",)),
    ),
    _question("eval", Chart("Loss at evaluation", ("eval/loss",))),
    _question(
        "telemetry",
        Chart("Share of the time that telemetry costs", ("telemetry/overhead_fraction",)),
        Chart("Time that telemetry takes of the training thread", ("telemetry/step_seconds",)),
        Chart("Steps waiting, records lost", ("telemetry/queue_depth", "telemetry/dropped_records")),
    ),
)
