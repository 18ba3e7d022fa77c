"""Every metric once: tag, unit, section, reduction, meaning, better direction, and why it may be absent.

Tags are a public interface. ``<k>``, ``<l>`` and other names in angle brackets stand for one path part; ``{a,b}``
for each alternative. Backends, dashboards and the metric reference read descriptions from here and nowhere else.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Literal

Better = Literal["higher", "lower"] | None
Kind = Literal["scalar", "table", "text", "audio", "image"]


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue.

    Attributes:
        tag: a tag, or a pattern of tags.
        meaning: one sentence for whoever looks at the chart.
        unit: "" for a plain number.
        kind: how it is shown.
        reduction: how microbatches and ranks combine.
        better: which way is better, None where neither is.
        absent: why there may be no value.
    """

    tag: str
    meaning: str
    unit: str = ""
    kind: Kind = "scalar"
    reduction: str = ""
    better: Better = None
    absent: str = ""

    @property
    def section(self) -> str:
        """The part of the tag before the first slash: the question that it answers."""
        return self.tag.split("/", 1)[0]

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the tags of this entry, whole."""
        return re.compile(tag_regex(self.tag))

    @property
    def description(self) -> str:
        """Meaning, unit and direction in one line, as shown beside a chart."""
        parts = [self.meaning]
        if self.unit:
            parts.append(f"Unit: {self.unit}.")
        if self.better:
            parts.append(f"{self.better.capitalize()} is better.")
        return " ".join(parts)


def tag_regex(tag: str) -> str:
    """The regular expression, not anchored, of the tags that a pattern (``outputs/loss/codebook_<k>``) stands for."""
    return "".join(_part(part) for part in re.split(r"(\{[^{}]+\}|<[^<>]+>)", tag))


def _part(part: str) -> str:
    if part.startswith("{"):
        return "(?:" + "|".join(tag_regex(choice) for choice in part[1:-1].split(",")) + ")"
    if part.startswith("<"):
        return "[0-9]+" if len(part) == 3 else "[^/]+"  # <k>, <l>, <i> are indices; <name>, <group> are names
    return re.escape(part)


SECTIONS: dict[str, str] = {
    "inputs": "Is the data what I think it is?",
    "outputs": "What does it predict, per modality and per codebook?",
    "attention": "Do text and audio really talk to each other?",
    "activations": "Are both feed-forward networks alive?",
    "gradients": "Do gradients reach every part?",
    "zero_shot": "Does the model use the reference voice, and can I hear it?",
    "health": "What is wrong, in one line, with the evidence and what to do?",
    "train": "What the Trainer logs while training.",
    "eval": "What the Trainer logs at evaluation.",
    "telemetry": "What telemetry itself costs.",
}

_TOKENS = "over all positions of the step"
_NO_TEXT = "no supervised text token in the step, or the model computed no text logits"
_NO_AUDIO = "no supervised audio token in the step, or the model computed no audio logits"

CATALOGUE: tuple[Entry, ...] = (
    # inputs
    Entry("inputs/tokens/total", "Positions of the step's batches, padding included.", "tokens", reduction="sum"),
    Entry("inputs/tokens/text_fraction", "Share of positions that are text.", reduction=f"mean {_TOKENS}"),
    Entry(
        "inputs/tokens/reference_audio_fraction",
        "Share of positions that are reference audio: given to the model, not supervised.",
        reduction=f"mean {_TOKENS}",
    ),
    Entry(
        "inputs/tokens/target_audio_fraction",
        "Share of positions that are target audio: supervised.",
        reduction=f"mean {_TOKENS}",
    ),
    Entry(
        "inputs/tokens/padding_fraction",
        "Share of positions that are padding.",
        reduction=f"mean {_TOKENS}",
        better="lower",
    ),
    Entry(
        "inputs/supervised/text_fraction",
        "Share of the text tokens that have a label.",
        reduction="mean over text tokens",
        absent="no text in the step",
    ),
    Entry(
        "inputs/supervised/audio_fraction",
        "Share of the audio codes (reference and target, every codebook) that have a label.",
        reduction="mean over audio codes",
        absent="no audio in the step",
    ),
    Entry(
        "inputs/invalid_ids",
        "Token ids, audio codes and labels outside their vocabulary. Anything but 0 is a data fault.",
        "ids",
        reduction="sum",
        better="lower",
    ),
    Entry(
        "inputs/tensor/<name>/{min,max,mean,std}",
        "Of one input tensor's finite values.",
        reduction="over all values of the step",
        absent="the tensor has no finite value",
    ),
    Entry(
        "inputs/tensor/<name>/zero_fraction",
        "Share of one input tensor's values that are exactly zero.",
        reduction="mean over values",
        absent="the tensor is empty",
    ),
    Entry(
        "inputs/tensor/<name>/nonfinite",
        "NaN and infinite values in one input tensor.",
        "values",
        reduction="sum",
        better="lower",
    ),
    Entry(
        "inputs/tensors",
        "Shape, dtype, device, statistics and first values of every tensor in the batch.",
        kind="table",
    ),
    Entry(
        "inputs/sequence",
        "The sequence of a sample span by span: role or modality, tokens, whether supervised, decoded text.",
        kind="table",
        absent="the batch has no token ids",
    ),
    Entry(
        "inputs/reference",
        "Reference audio as the data set holds it.",
        kind="audio",
        absent="the batch carries no reference waveform",
    ),
    Entry(
        "inputs/target",
        "Target audio as the data set holds it.",
        kind="audio",
        absent="the batch carries no target waveform",
    ),
    # outputs
    Entry(
        "outputs/loss/total",
        "Mean text loss plus the sum over codebooks of each codebook's mean loss: what HiggsAudioTrainer minimizes.",
        "nats",
        reduction="sum of the parts' means",
        better="lower",
        absent="nothing is supervised in the step, or the model computed no logits",
    ),
    Entry(
        "outputs/loss/text",
        "Cross-entropy of supervised text tokens.",
        "nats per token",
        "scalar",
        "mean",
        "lower",
        _NO_TEXT,
    ),
    Entry(
        "outputs/loss/audio",
        "Cross-entropy of supervised audio codes, all codebooks together.",
        "nats per code",
        reduction="mean",
        better="lower",
        absent=_NO_AUDIO,
    ),
    Entry(
        "outputs/loss/codebook_<k>",
        "Cross-entropy of one codebook's supervised codes.",
        "nats per code",
        reduction="mean",
        better="lower",
        absent=_NO_AUDIO,
    ),
    Entry(
        "outputs/accuracy/{text,audio,codebook_<k>}",
        "Share of supervised tokens whose most likely prediction is right (teacher-forced).",
        reduction="mean over supervised tokens",
        better="higher",
        absent="nothing of that modality is supervised in the step, or the model computed no logits",
    ),
    Entry(
        "outputs/top5/{text,audio,codebook_<k>}",
        "Share of supervised tokens that are among the five most likely predictions.",
        reduction="mean over supervised tokens",
        better="higher",
        absent="nothing of that modality is supervised in the step, or the model computed no logits",
    ),
    Entry(
        "outputs/entropy/{text,audio}",
        "Mean entropy of the predicted distribution at supervised tokens.",
        "nats",
        reduction="mean over supervised tokens",
        absent="nothing of that modality is supervised in the step, or the model computed no logits",
    ),
    Entry(
        "outputs/eos/probability",
        "Mean probability of end of stream where it is the label. Near 0: generation will not stop.",
        reduction="mean over codebooks and clips",
        better="higher",
        absent="no end of stream is supervised in the step",
    ),
    Entry(
        "outputs/eos/supervised",
        "Share of the target clips' stream ends (one per codebook) with a label. Below 1: it is not taught to stop.",
        reduction="mean over codebooks and clips",
        better="higher",
        absent="no target audio in the step",
    ),
    Entry(
        "outputs/codebook_<k>/used_fraction",
        "Share of one codebook's entries that are predicted at least once in the step.",
        reduction="histogram over the step",
        better="higher",
        absent=_NO_AUDIO,
    ),
    Entry(
        "outputs/codebook_<k>/perplexity",
        "Perplexity of the distribution of one codebook's predicted entries. Near 1: the predictions have collapsed.",
        "entries",
        reduction="histogram over the step",
        better="higher",
        absent=_NO_AUDIO,
    ),
    Entry(
        "outputs/predictions",
        "Target against prediction: text decoded, first and last tokens of text and of every codebook, accuracy.",
        kind="table",
        absent="the model computed no logits",
    ),
    # attention
    Entry(
        "attention/layer_<l>/{text,reference,target}_to_{text,reference,target}",
        "Attention mass from one kind of position to another; a row sums to 1.",
        reduction="mean over sampled queries",
    ),
    Entry("attention/layer_<l>/entropy", "Entropy of attention rows.", "nats", reduction="mean over sampled queries"),
    Entry("attention/layer_<l>/max_logit", "Largest pre-softmax attention logit.", reduction="max", better="lower"),
    Entry("attention/layer_<l>/sink", "Share of attention on the first token.", reduction="mean over sampled queries"),
    Entry("attention/{mass,heads}", "Attention mass by layer, and by layer and head.", kind="image"),
    # activations
    Entry(
        "activations/layer_<l>/{text_ffn,audio_ffn}/{rms,absmax,zero_fraction}",
        "Size of one feed-forward network's output.",
        reduction="over its positions",
    ),
    # gradients
    Entry(
        "gradients/total_norm",
        "Norm of all gradients before clipping; equals the Trainer's grad_norm.",
        reduction="root of the sum of squares",
        absent="no parameter has a gradient",
    ),
    Entry(
        "gradients/<group>/norm",
        "Norm of the gradients of one part of the model, before clipping.",
        reduction="root of the sum of squares",
        absent="frozen, or none of its parameters has a gradient",
    ),
    Entry(
        "gradients/<group>/update_ratio",
        "Size of the optimizer's step relative to the weights.",
        reduction="ratio of norms",
        absent="frozen",
    ),
    Entry("gradients/<group>/zero_fraction", "Share of gradient values that are exactly zero.", reduction="mean"),
    Entry(
        "gradients/<group>/nonfinite", "NaN and infinite gradient values.", "values", reduction="sum", better="lower"
    ),
    Entry(
        "gradients/layer_<l>/{shared_attention,text_ffn,audio_ffn}/norm",
        "Norm of one layer's gradients, before clipping.",
        reduction="root of the sum of squares",
    ),
    Entry(
        "gradients/text_audio_cosine",
        "Cosine between the gradients of the text and of the audio loss on the shared attention.",
        better="higher",
    ),
    # zero-shot
    Entry(
        "zero_shot/chatml/compliance",
        "Share of samples whose token sequence is well-formed ChatML with a reference and its transcript.",
        reduction="mean over samples",
        better="higher",
        absent="the family has no ChatML structure, or the batch has no token ids",
    ),
    Entry(
        "zero_shot/chatml",
        "Violations by sample: role order, headers, placeholders, reference, transcript.",
        kind="table",
    ),
    Entry(
        "zero_shot/reference/present_fraction",
        "Share of samples with reference audio.",
        reduction="mean over samples",
        better="higher",
        absent="the family has no audio",
    ),
    Entry(
        "zero_shot/reference/seconds",
        "Mean length of the reference audio of a sample that has one.",
        "seconds",
        reduction="mean over samples with a reference",
        absent="no sample has a reference, or the batch does not say how long it is",
    ),
    Entry(
        "zero_shot/conditioning/gain",
        "Audio loss with another sample's reference minus loss with its own. Near 0: the reference is ignored.",
        "nats per audio token",
        better="higher",
    ),
    Entry(
        "zero_shot/speaker_similarity", "Cosine of speaker embeddings, generated against reference.", better="higher"
    ),
    Entry("zero_shot/{wer,cer}", "Word and character error rate of generated speech.", better="lower"),
    Entry("zero_shot/duration_ratio", "Generated over target duration."),
    Entry("zero_shot/silence_fraction", "Share of generated audio that is silent.", better="lower"),
    Entry("zero_shot/eos_hit_rate", "Share of generations that end by themselves.", better="higher"),
    Entry("zero_shot/reference_leak", "Share of generations that begin with the reference's words.", better="lower"),
    Entry("zero_shot/clips", "Reference, target and generated speech, sample by sample.", kind="table"),
    Entry("zero_shot/clip_<i>/{reference,target,generated}", "Speech to compare by ear.", kind="audio"),
    # health
    Entry("health/checks", "Every rule's verdict, evidence and what to do.", kind="table"),
    Entry("health/alerts", "What a rule has just found, with its evidence and what to do.", kind="text"),
    Entry("health/<name>", "0 ok, 1 warning, 2 failing.", reduction="max", better="lower"),
    # the Trainer's own
    Entry("{train,eval}/loss", "Loss as the Trainer logs it: the mean since it last logged.", "nats", better="lower"),
    Entry("train/grad_norm", "Gradient norm before clipping, as the Trainer logs it."),
    Entry("train/learning_rate", "Learning rate of the first parameter group."),
    Entry("{train,eval}/epoch", "Passes over the training data.", "epochs"),
    Entry("{train,eval,test}/<name>", "As the Trainer logs it."),
    # telemetry
    Entry(
        "telemetry/step_seconds", "Time telemetry took of the training thread on this step.", "seconds", better="lower"
    ),
    Entry("telemetry/overhead_fraction", "That time as a share of the step.", better="lower"),
    Entry("telemetry/queue_depth", "Steps waiting to be written.", "steps", better="lower"),
    Entry("telemetry/dropped_records", "Records lost so far.", "records", reduction="sum", better="lower"),
)


@functools.lru_cache(maxsize=65536)
def find(tag: str) -> Entry | None:
    """The entry of a tag, or None for a tag that is not in the catalogue."""
    return next((entry for entry in CATALOGUE if entry.pattern.fullmatch(tag)), None)


def describe(tag: str, note: str = "") -> str:
    """One line of description for a tag, with ``note`` (how it was measured on this run) behind it."""
    entry = find(tag)
    return " ".join(part for part in (entry.description if entry else "", note) if part)
