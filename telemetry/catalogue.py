"""Every metric once: tag, unit, section, reduction, meaning, better direction, and why it may be absent.

Tags are a public interface. ``<k>``, ``<l>`` and other names in angle brackets stand for one path part; ``{a,b}``
for each alternative. Backends, dashboards and the metric reference read descriptions from here and nowhere else.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

Better = Literal["higher", "lower"] | None
Kind = Literal["scalar", "table", "alert", "audio", "image"]


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
    if part == "<set>":  # of evaluation data, beside which the codebooks of the only one stand
        return "(?!codebook_[0-9]+/)[^/]+"
    if part.startswith("<"):
        return "[0-9]+" if len(part) == 3 else "[^/]+"  # <k>, <l>, <i> are indices; <name>, <group> are names
    return re.escape(part)


SECTIONS: dict[str, str] = {
    "setup": "Is this the training that I meant?",
    "inputs": "Is the data what I think it is?",
    "outputs": "What does it predict, per modality and per codebook?",
    "attention": "Do text and audio really talk to each other?",
    "activations": "Are both feed-forward networks alive?",
    "gradients": "Do gradients reach every part?",
    "zero_shot": "Does the model use the reference voice, and can I hear it?",
    "health": "What is wrong, in one line, with the evidence and what to do?",
    "steps": "Was every step trained on, those between due steps too?",
    "throughput": "How fast does it go, and what does it wait for?",
    "train": "What the Trainer logs while training.",
    "eval": "What the Trainer logs at evaluation.",
    "telemetry": "What telemetry itself costs.",
}

CHECKS = ("health/checks", "setup/checks")
"""Tables of verdicts."""

VERDICTS = ("ok", "warning", "failing")
"""As words, where a value is 0, 1 or 2."""

HEALTH_FILE = "health.json"
"""What a run keeps for programs, in its output directory and in every checkpoint."""

TRAINER_SECTIONS = ("train", "eval", "test")
"""Where what the Trainer logs goes: ``eval_`` and ``test_`` at the beginning of a name say the section, else it is the
first."""

_EACH_RANKS_OWN = ("attention/", "gradients/", "setup/optimizer/", "telemetry/", "throughput/")

_UNLABELLED = "no labels of the batch are known"
_NO_TEXT = "no supervised text token in the step, or the model computed no text logits"
_ONLY_ENDS = "nothing that the codebook predicts is an entry of its own"
_NO_AUDIO = "no supervised audio token in the step, or the model computed no audio logits"
_DATA = "the data set was not gone through (telemetry.check_data)"
_NO_ATTENTION = "the layer's attention could not be read"
_NO_POSITIONS = "it has no positions in the step"
_NO_GRADIENT = "frozen, or none of its parameters has a gradient"
_NO_WAVEFORM = "the batch carries no reference waveform"
_NO_FORMAT = "the family's chat format is not known"
_CUT_OFF = "every clip was cut off when its time was up"
_NO_TRANSCRIPT = f"no transcriber was given, the batch does not say the target's text, or {_CUT_OFF}"
_NO_SPEECH = "nothing was generated"


def _all(*entries: Entry, **said: str) -> Iterator[Entry]:
    """Entries with what is said of all of them, where they say nothing else themselves."""
    for entry in entries:
        yield replace(entry, **{name: text for name, text in said.items() if not getattr(entry, name)})  # type: ignore[arg-type]


def _count(tag: str, meaning: str, unit: str = "", absent: str = "") -> Entry:
    """A number of things of which there should be none."""
    return Entry(tag, meaning, unit, reduction="sum", better="lower", absent=absent)


def _of_clips(
    name: str,
    meaning: str,
    unit: str = "",
    reduction: str = "mean over clips",
    better: Better = None,
    absent: str = _NO_SPEECH,
) -> Entry:
    """A number of all generated clips, and of those of each language."""
    tag = f"zero_shot/{{{name},language_<code>/{name}}}"
    return Entry(tag, meaning, unit, reduction=reduction, better=better, absent=absent)


CATALOGUE: tuple[Entry, ...] = (
    # inputs
    Entry("inputs/tokens/total", "Positions of the step's batches, padding included.", "tokens", reduction="sum"),
    *_all(
        Entry("inputs/tokens/text_fraction", "Share of positions that are text."),
        Entry(
            "inputs/tokens/reference_audio_fraction",
            "Share of positions that are reference audio: given to the model, not supervised.",
            absent=_UNLABELLED,
        ),
        Entry(
            "inputs/tokens/target_audio_fraction",
            "Share of positions that are target audio: supervised.",
            absent=_UNLABELLED,
        ),
        Entry("inputs/tokens/padding_fraction", "Share of positions that are padding.", better="lower"),
        Entry(
            "inputs/tokens/hidden_fraction",
            "Share of positions that the attention mask hides between others that it shows.",
            better="lower",
            absent="the batch has no attention mask of its token ids",
        ),
        reduction="mean over all positions of the step",
    ),
    Entry(
        "inputs/supervised/samples_fraction",
        "Share of the samples that have any label.",
        reduction="mean over samples",
        better="higher",
        absent="the batch has no labels that could be read",
    ),
    Entry(
        "inputs/supervised/text_fraction",
        "Share of the text tokens that have a label.",
        reduction="mean over text tokens",
        absent="no text in the step, or no labels are known of its token ids",
    ),
    Entry(
        "inputs/supervised/audio_fraction",
        "Share of the audio codes (reference and target, every codebook) that have a label; audio that is given as "
        "embeddings has none.",
        reduction="mean over audio codes",
        absent=f"no audio codes in the step, or {_UNLABELLED}",
    ),
    Entry(
        "inputs/length_correlation/{reference,target}",
        "Correlation of the lengths of transcripts with those of their clips, over all due steps so far. Near 0: they "
        "do not belong together.",
        reduction="over the samples of all due steps",
        better="higher",
        absent="the batch carries no transcripts with waveforms, or too few so far",
    ),
    _count(
        "inputs/invalid_ids",
        "Token ids, audio codes and labels outside their vocabulary, and codec tokens at the place of another "
        "codebook. Anything but 0 is a data fault.",
        "ids",
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
    _count("inputs/tensor/<name>/nonfinite", "NaN and infinite values in one input tensor.", "values"),
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
        absent="the batch carries no reference waveform, or sound is off",
    ),
    Entry(
        "inputs/target",
        "Target audio as the data set holds it.",
        kind="audio",
        absent="the batch carries no target waveform, or sound is off",
    ),
    Entry(
        "inputs/hardest",
        "The training samples whose losses on due steps are furthest above the mean of their step, of all ranks: "
        "noise, wrong transcripts, another voice. What is remembered is in hardest.csv in the output directory.",
        kind="table",
        absent="the batch does not name its samples (sample_id)",
    ),
    Entry(
        "inputs/hardest/<i>",
        "The target audio of the hardest samples, of rank 0's own.",
        kind="audio",
        absent="the batch carries no target waveform, or sound is off",
    ),
    # outputs
    Entry(
        "outputs/loss/total",
        "The model's loss, added up again from every stream and part of it that is read: what training minimizes, "
        "unless the trainer has a loss of its own (label smoothing, say). Then it is plain cross-entropy.",
        "nats",
        reduction="as outputs/loss/model",
        better="lower",
        absent="a part of it could not be read, or from a sample of its tokens only (a fused loss), or it differs from"
        " the loss that the model returned",
    ),
    Entry(
        "outputs/loss/model",
        "The loss that the model returned: what training minimizes, unless the trainer has a loss of its own.",
        "nats",
        reduction="sum over microbatches and ranks where the Trainer has it divided by the tokens of all, else mean",
        better="lower",
        absent="the model returned no loss",
    ),
    Entry(
        "outputs/loss/router",
        "Part of the loss that balances the experts of a mixture of experts, weighted as it is added.",
        "nats",
        reduction="as outputs/loss/model",
        absent="the model has no experts, or does not train their router",
    ),
    Entry(
        "outputs/loss/{diffusion,flow,depth_decoder,spectrogram,end_of_speech,guided_attention}",
        "Part of the loss that is no stream of tokens, weighted as it is added. Diffusion, flow and guided attention do"
        " not show: they are what all other parts leave of the loss; so is a sub-talker whose codes are not known.",
        reduction="as outputs/loss/model",
        absent="the model's loss has no such part",
    ),
    *_all(
        Entry("outputs/loss/text", "Cross-entropy of supervised text tokens.", "nats per token", absent=_NO_TEXT),
        Entry(
            "outputs/loss/audio",
            "Cross-entropy of supervised audio codes, all codebooks together.",
            "nats per code",
            absent=_NO_AUDIO,
        ),
        Entry(
            "outputs/loss/codebook_<k>",
            "Cross-entropy of one codebook's supervised codes.",
            "nats per code",
            absent=_NO_AUDIO,
        ),
        reduction="mean",
        better="lower",
    ),
    *_all(
        Entry(
            "outputs/accuracy/{text,audio,codebook_<k>}",
            "Share of supervised tokens whose most likely prediction is right (teacher-forced).",
            better="higher",
        ),
        Entry(
            "outputs/top5/{text,audio,codebook_<k>}",
            "Share of supervised tokens that are among the five most likely predictions.",
            better="higher",
        ),
        Entry(
            "outputs/entropy/{text,audio}", "Mean entropy of the predicted distribution at supervised tokens.", "nats"
        ),
        reduction="mean over supervised tokens",
        absent="nothing of that modality is supervised in the step, or the model computed no logits",
    ),
    *_all(
        Entry(
            "outputs/eos/probability",
            "Mean probability of end of stream where it is the label. Near 0: generation will not stop.",
            absent="no end of stream is supervised in the step",
        ),
        Entry(
            "outputs/eos/supervised",
            "Share of the target clips' stream ends (one per codebook) that are there and have a label. Below 1: it is"
            " not taught to stop.",
            absent=f"no target audio in the step, or {_UNLABELLED}",
        ),
        reduction="mean over codebooks and clips",
        better="higher",
    ),
    *_all(
        Entry(
            "outputs/codebook_<k>/used_fraction",
            "Share of one codebook's entries (begin and end of stream are none) that are predicted at least once in the"
            " step.",
        ),
        Entry(
            "outputs/codebook_<k>/perplexity",
            "Perplexity of the distribution of one codebook's predicted entries, without predictions of begin and end "
            "of stream. Near 1: the predictions have collapsed.",
            "entries",
        ),
        reduction="histogram over the step",
        better="higher",
        absent=f"{_NO_AUDIO}, or {_ONLY_ENDS}",
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
        "Attention mass from one kind of position to another, mean over heads; those from one kind sum to 1.",
        reduction="mean over sampled queries",
        absent="no position of that kind in the step",
    ),
    *_all(
        Entry("attention/layer_<l>/entropy", "Entropy of attention: low where heads look at few positions.", "nats"),
        Entry(
            "attention/layer_<l>/entropy_fraction",
            "Entropy of attention as a share of the largest possible one: 1 where all visible positions weigh the"
            " same.",
            absent="no query sees more than itself",
        ),
        Entry(
            "attention/layer_<l>/max_logit",
            "Largest pre-softmax attention logit. Growing without bound: attention is about to collapse.",
            reduction="max over sampled queries",
            better="lower",
        ),
        Entry("attention/layer_<l>/sink", "Share of attention on the first token of the sequence."),
        reduction="mean over sampled queries",
        absent=_NO_ATTENTION,
    ),
    _count(
        "attention/layer_<l>/nonfinite",
        "Attention rows of sampled queries, one for each head, with a NaN or infinity.",
        "rows",
        _NO_ATTENTION,
    ),
    *_all(
        Entry(
            "attention/layer_<l>/cross/entropy",
            "Entropy of a decoder's attention to its encoder's text: high where it does not follow the words.",
            "nats",
        ),
        Entry(
            "attention/layer_<l>/cross/entropy_fraction",
            "The same as a share of the largest possible one: 1 where all of the text weighs the same.",
            absent="the text has one token",
        ),
        Entry(
            "attention/layer_<l>/cross/max_logit",
            "Largest pre-softmax logit of a decoder's attention to its encoder's text.",
            reduction="max over sampled queries",
            better="lower",
        ),
        Entry("attention/layer_<l>/cross/sink", "Share of it on the first token of the text."),
        reduction="mean over sampled queries",
        absent=f"the model has no encoder of text, or {_NO_ATTENTION}",
    ),
    _count(
        "attention/layer_<l>/cross/nonfinite",
        "Rows of a decoder's attention to its encoder's text, one for each head, with a NaN or infinity.",
        "rows",
        _NO_ATTENTION,
    ),
    Entry(
        "attention/mass",
        "Attention mass between text, reference and target, layer by layer.",
        kind="image",
        absent="the step has positions of one kind only",
    ),
    Entry(
        "attention/heads",
        "Attention from target positions to the reference, by layer and head. Dark everywhere: the voice is ignored.",
        kind="image",
        absent="no reference or no target audio in the step",
    ),
    # activations
    *_all(
        Entry(
            "activations/layer_<l>/{text_ffn,audio_ffn}/rms",
            "Root mean square of one feed-forward network's output. Near 0: the network is dead.",
            reduction="over the positions that it serves",
        ),
        Entry(
            "activations/layer_<l>/{text_ffn,audio_ffn}/absmax",
            "Largest magnitude in one feed-forward network's output.",
            reduction="max",
        ),
        Entry(
            "activations/layer_<l>/{text_ffn,audio_ffn}/zero_fraction",
            "Share of one feed-forward network's output that is exactly zero.",
            reduction="over the positions that it serves",
            better="lower",
        ),
        _count(
            "activations/layer_<l>/{text_ffn,audio_ffn}/nonfinite",
            "NaN and infinite values in one feed-forward network's output.",
            "values",
        ),
        absent=_NO_POSITIONS,
    ),
    Entry(
        "activations/layer_<l>/{text_ffn,audio_ffn}/residual_share",
        "Norm of what one feed-forward network adds to the residual stream, over the norm of what it is added to.",
        reduction="ratio of norms over its positions",
        absent="it has no positions in the step, or the layer does not show its residual stream",
    ),
    # gradients
    Entry(
        "gradients/clip_coefficient",
        "What the trainer's clipping multiplies all gradients by: 1 where they are not clipped.",
        absent="the trainer does not clip, or does not say to what, or gradients are not finite",
    ),
    Entry(
        "gradients/total_norm",
        "Norm of all gradients before clipping; equals the Trainer's grad_norm.",
        reduction="root of the sum of squares",
        absent="no parameter has a gradient, or none within reach",
    ),
    *_all(
        Entry(
            "gradients/<group>/norm",
            "Norm of the gradients of one part of the model, before clipping; depth_decoder is a second decoder, of the"
            " codebooks of one frame.",
            reduction="root of the sum of squares",
        ),
        Entry(
            "gradients/<group>/update_ratio",
            "Norm of the optimizer's step over the norm of the weights before it. Of a parameter (or one rank's "
            "shard of it) of more than 32,768 values the rows with the largest gradients, and 8,192 values at most "
            "that are spread evenly. 0: the optimizer has not moved them.",
            reduction="ratio of norms",
            absent="frozen, all weights are 0, or the trainer does not show when its optimizer steps",
        ),
        Entry(
            "gradients/<group>/zero_fraction",
            "Share of the gradient values of one part of the model that are exactly zero.",
            reduction="mean over values",
        ),
        _count(
            "gradients/<group>/nonfinite",
            "NaN and infinite gradient values of one part of the model. gradients/largest names the parameters.",
            "values",
        ),
        absent=_NO_GRADIENT,
    ),
    Entry(
        "gradients/layer_<l>/{shared_attention,text_ffn,audio_ffn}/norm",
        "Norm of the gradients of one layer's attention or feed-forward network, before clipping.",
        reduction="root of the sum of squares",
        absent="frozen, or none of its parameters has a gradient; adapters are in gradients/lora",
    ),
    Entry(
        "gradients/text_audio_cosine",
        "Cosine between the gradients of the text and of the audio loss on the attention (or its adapters) of"
        " the first, middle and last layer; of the last microbatch, with the weights after the step. Below 0:"
        " they pull against each other.",
        reduction="mean over ranks",
        better="higher",
        absent="nothing of the text or of the audio is supervised in the batch",
    ),
    Entry(
        "gradients/largest",
        "The parameters with the largest gradient norm, with the fastest growing one since the due step "
        "before, and every one with a NaN or infinite value.",
        kind="table",
        absent="no parameter has a gradient",
    ),
    Entry(
        "gradients/missing",
        "Parameters that are to be trained but have no gradient in the step, or that the optimizer does not hold.",
        kind="table",
        absent="nothing is missing",
    ),
    # zero-shot
    Entry(
        "zero_shot/chatml/compliance",
        "Share of samples that are well-formed voice-cloning prompts: none of the violations below.",
        reduction="mean over samples",
        better="higher",
        absent=f"the family's chat format is not known, the batch has no audio, or {_UNLABELLED}",
    ),
    *_all(
        _count(
            "zero_shot/chatml/violations/{role_order,header,end_of_turn}",
            "Samples whose roles are out of order, whose headers do not balance, whose turns do not end.",
        ),
        _count(
            "zero_shot/chatml/violations/{reference,transcript,target}",
            "Samples without reference audio or with several clips in one turn, with a reference that no words "
            "stand before, without supervised audio.",
        ),
        _count(
            "zero_shot/chatml/violations/{placeholders,delay_pattern}",
            "Samples whose placeholders are not as many as their codes, or whose codes are not a stream: from BOS"
            " to EOS, codebook k shifted by k frames.",
            absent="the family's chat format is not known, or it is not known which codes belong to which clip",
        ),
        _count(
            "zero_shot/chatml/violations/{target_text,language}",
            "Samples whose target text is not its transcript, or whose language tag is missing (where others have"
            " one) or not what the prompt says.",
            absent="the samples come without transcripts or language tags",
        ),
        unit="samples",
        absent=_NO_FORMAT,
    ),
    Entry("zero_shot/chatml", "Violations by sample, each with its place.", kind="table"),
    Entry(
        "zero_shot/reference/present_fraction",
        "Share of samples with reference audio.",
        reduction="mean over samples",
        better="higher",
        absent=f"the family has no audio, or {_UNLABELLED}",
    ),
    Entry(
        "zero_shot/reference/seconds",
        "Mean length of the reference audio of a sample that has one, as the batch says it: the training script counts "
        "code frames.",
        "seconds",
        reduction="mean over samples with a reference",
        absent="no sample has a reference, or the batch does not say how long it is",
    ),
    *_all(
        Entry(
            "zero_shot/reference/level_db",
            "Mean level of the reference clips: root mean square; a full-scale sine is at -3, digital silence at -120.",
            "dB full scale",
        ),
        Entry(
            "zero_shot/reference/clipping_fraction",
            "Share of a reference clip's samples that are at or beyond 0.999 of full scale.",
            better="lower",
        ),
        Entry(
            "zero_shot/reference/silence_fraction",
            "Share of a reference clip's time that is silent: in frames of 20 ms below -50 dB of full scale.",
            better="lower",
        ),
        Entry(
            "zero_shot/reference/sampling_rate",
            "Lowest sampling rate among the reference files. Below the codec's: the voice has no high frequencies.",
            "hertz",
            reduction="min",
        ),
        reduction="mean over clips",
        absent=_NO_WAVEFORM,
    ),
    *_all(
        Entry(
            "zero_shot/reference/features_present",
            "Share of the samples with reference audio that give it to the model's audio encoder (Whisper).",
            reduction="mean over samples with a reference",
            better="higher",
            absent="the model has no audio encoder for reference audio, or no sample has a reference",
        ),
        Entry(
            "zero_shot/reference/{features_mean,features_std}",
            "Of the features that the audio encoder is given, padding left out.",
            reduction="over all finite values of the step",
        ),
        _count(
            "zero_shot/reference/features_nonfinite",
            "NaN and infinite values in the features that the audio encoder is given.",
            "values",
        ),
        absent="the model's audio encoder is given nothing",
    ),
    *_all(
        Entry(
            "zero_shot/conditioning/{gain,eval/gain,eval/<set>/gain}",
            "Audio loss with another speaker's reference from the batch, cut or repeated to the length of its own, "
            "minus loss with its own, over all codebooks' supervised codes. Near 0: the reference is ignored.",
            better="higher",
        ),
        Entry(
            "zero_shot/conditioning/{gain_without,eval/gain_without,eval/<set>/gain_without}",
            "Audio loss with the reference hidden from attention minus loss with it. Near 0: the reference is ignored.",
            better="higher",
        ),
        Entry(
            "zero_shot/conditioning/{codebook_<k>/gain,eval/codebook_<k>/gain,eval/<set>/codebook_<k>/gain}",
            "One codebook's loss with another speaker's reference minus loss with its own.",
            better="higher",
        ),
        Entry(
            "zero_shot/{text_gain,eval/text_gain,eval/<set>/text_gain}",
            "Audio loss with the text of another sample of the batch, cut or repeated to the length of its own, minus "
            "loss with its own text. Near 0: the words are ignored, or samples are known by heart.",
            better="higher",
        ),
        Entry(
            "zero_shot/conditioning/{loss_own,loss_swapped,loss_none,eval/loss_own,eval/loss_swapped,eval/loss_none,"
            "eval/<set>/loss_own,eval/<set>/loss_swapped,eval/<set>/loss_none}",
            "Audio loss in eval mode with its own reference, with another speaker's at the length of its own, and with "
            "none.",
        ),
        unit="nats per audio token",
        reduction="mean over supervised codes of the samples that could be swapped",
        absent="not measured on this step, or no sample of the batch has another speaker's reference to swap in, or "
        "ranks could not run the model together",
    ),
    _of_clips(
        "speaker_similarity",
        "Cosine of the speaker vectors of generated speech and of its reference.",
        better="higher",
        absent="no speaker encoder was given, or no clip has a reference and is long enough to tell a voice",
    ),
    _of_clips(
        "opinion_score",
        "Mean opinion that people would have of the sound of generated speech, as a network predicts it: 1 is bad, 5 "
        "excellent.",
        better="higher",
        absent="no opinion scorer was given",
    ),
    _of_clips(
        "wer",
        "Word error rate of generated speech: wrong words for each word that should be said.",
        reduction="errors over words of all clips",
        better="lower",
        absent=_NO_TRANSCRIPT,
    ),
    _of_clips(
        "cer",
        "Character error rate of generated speech: wrong characters for each character that should be said.",
        reduction="errors over characters of all clips",
        better="lower",
        absent=_NO_TRANSCRIPT,
    ),
    _of_clips("duration_ratio", "Length of generated speech over its target's. 1 is right.", absent=_CUT_OFF),
    _of_clips(
        "speaking_rate",
        "Characters per second that is not silent, generated over target. 1 is right; rising: speech gets faster.",
        absent=f"the batch does not say the target's text, nothing but silence was generated, or {_CUT_OFF}",
    ),
    _of_clips(
        "silence_fraction",
        "Share of generated speech's time that is silent: in frames of 20 ms below -50 dB of full scale.",
        better="lower",
    ),
    _of_clips(
        "clipping_fraction",
        "Share of the samples of generated speech at or beyond 0.999 of full scale.",
        better="lower",
    ),
    _of_clips(
        "eos_hit_rate",
        "Share of generated clips that end by themselves before the bound on their tokens.",
        better="higher",
        absent=_CUT_OFF,
    ),
    _of_clips(
        "reference_leak",
        "Share of the reference's words that generated speech begins with in place of its own.",
        better="lower",
        absent=f"no transcriber was given, the batch does not say the reference's text, or {_CUT_OFF}",
    ),
    _of_clips(
        "codebook_use",
        "Different codes that generated speech uses, over those of as many frames of its target. Near 0: collapsed.",
        absent=f"{_NO_SPEECH}, or {_CUT_OFF}",
    ),
    _of_clips(
        "mel_distance",
        "Distance of mel spectrograms, generated against target, after dynamic time warping.",
        unit="dB",
        better="lower",
        absent=f"{_NO_SPEECH}, or {_CUT_OFF}",
    ),
    _of_clips(
        "mel_distance_shuffled",
        "The same against another sample's target: what mel_distance is where nothing is said that was asked for.",
        unit="dB",
        absent=f"{_NO_SPEECH}, there is one clip only, or {_CUT_OFF}",
    ),
    Entry(
        "zero_shot/clips",
        "What the model says freely of rank 0's first evaluation samples: sounds, spectrogram, transcript, numbers, "
        "and how far they have moved since before training.",
        kind="table",
        absent="there is no evaluation set, codec or target audio, or the model cannot generate",
    ),
    Entry("zero_shot/clips_by_speaker", "The numbers of the clips, by speaker.", kind="table"),
    Entry(
        "zero_shot/clip_<i>/{reference,target,generated,teacher_forced}",
        "Speech to compare by ear: the data set's, what the model says freely, and with the target's past given.",
        kind="audio",
    ),
    Entry(
        "zero_shot/clip_<i>/spectrogram",
        "Mel spectrograms of reference, target and generated speech, in dB below their own peak.",
        kind="image",
    ),
    # set-up
    *_all(
        Entry("setup/checks", "Every set-up check's verdict, evidence and what to do.", kind="table"),
        Entry("setup/alerts", "What a set-up check has found, with its evidence and what to do.", kind="alert"),
        Entry(
            "setup/asked/{text,audio}/{next,at_offset,declared}",
            "Share of the labels that the loss really asks for, read from its gradient, which are the next token of "
            "the input; the token at the offset that fits best; what the batch's labels say.",
        ),
        Entry("setup/asked/{text,audio}/offset", "How many places further on the asked labels are. 1 is right."),
        Entry(
            "setup/asked/{text,audio}/{undeclared,padding,reference}",
            "Share of the rows that the loss asks something of which have no label, are followed by padding, or by the "
            "reference.",
            better="lower",
        ),
        Entry("setup/asked/audio/own_codebook", "Share of the codebooks that are asked for their own codes."),
        Entry(
            "setup/loss_weight/<name>",
            "Sum of the weights that the tokens of a stream have in the loss, over what it should be. 1 is right.",
            reduction="mean over ranks",
        ),
        Entry("setup/chance/<name>", "Loss of a stream over that of a guess, the logarithm of its vocabulary."),
        Entry(
            "setup/modes/{training_fraction,evaluation_fraction}",
            "Share of the modules with dropout or batch norm that are in training mode, in training and in evaluation.",
        ),
        Entry("setup/optimizer/held_fraction", "Share of the trained parameters that the optimizer holds."),
        Entry("setup/optimizer/moved_fraction", "Share of some weights with a gradient that the first step moves."),
        Entry("setup/optimizer/learning_rate", "Largest learning rate of the first step."),
        Entry(
            "setup/norms/untouched_fraction", "Share of the norms that are as they were made: 1 of an untrained model."
        ),
        Entry("setup/trained/<name>", "Share of a group's parameters that are trained."),
        Entry(
            "setup/adapters/active_fraction",
            "Share of the adapted layers whose adapters take part in the forward pass.",
        ),
        Entry(
            "setup/references/{samples,different,equal_fraction,constant_fraction}",
            "Samples of rank 0's first step with a reference; how many different ones; shares that equal their target, "
            "and that hold one frame again and again.",
        ),
        Entry("setup/targets/{samples,different}", "Samples of rank 0's first step with a target; how many different."),
        Entry("setup/targets/commonest_fraction", "Share of them that have the commonest target."),
        Entry(
            "setup/data/{samples,looked_at}",
            "Samples of the data set, and how many of them there was time to listen to.",
            "samples",
            absent=_DATA,
        ),
        Entry(
            "setup/data/{equal_fraction,commonest_reference_fraction,commonest_target_fraction}",
            "Samples whose reference is their target; the share of the commonest reference (of several speakers) and "
            "of the commonest target.",
            absent=_DATA,
        ),
        Entry(
            "setup/data/{reference,target}/{silent,clipped,narrow,noisy,cut}_fraction",
            "Share of the clips that are silent; that are clipped; without anything above 4 kHz; as flat as noise;"
            " that end in the middle of a sound.",
            absent=_DATA,
        ),
        Entry(
            "setup/data/rate_ratio",
            "Characters a second of targets over those of their references, the median.",
            absent=f"{_DATA}, or there are no transcripts",
        ),
        Entry(
            "setup/data/other_voices_nearer",
            "Share of other speakers' references that are nearer in voice to a target than its own: 0.5 is chance.",
            absent=f"{_DATA}, there is no speaker encoder, or all are one speaker",
        ),
        Entry(
            "setup/data/{reference,target}/other_texts_nearer",
            "Share of others' transcripts that are nearer to what a clip is heard to say than its own: 0.5 is chance.",
            absent=f"{_DATA}, or there is no transcriber",
        ),
        Entry(
            "setup/alone/changes",
            "Largest change of the logits of samples whose neighbours and padding are changed, over that of the"
            " neighbours' own. Above 0: samples see padding, or each other.",
            reduction="max",
            absent="the batch has one sample, or could not be run a second time",
        ),
        Entry(
            "setup/ranks/weights_apart",
            "How far ranks' weights lie apart after the step, over their size: 0 where all have the same.",
            reduction="over ranks",
            absent="one process, or parameters are sharded",
        ),
        Entry(
            "setup/causality/earlier_changes",
            "How far logits move when later tokens are changed, over how far those of the changed tokens do. 0 is "
            "right.",
        ),
        Entry(
            "setup/{asked_labels,loss_weight,supervised,recombined,chance,optimizer,frozen,adapters,modes,causality,"
            "alone,ranks,targets,references,data_pairs,data_voices,data_words,data_rate,data_sound}",
            "0 ok, 1 warning, 2 failing.",
            reduction="max",
            better="lower",
        ),
        absent="there is nothing of the kind, or the first due step did not show it",
    ),
    # health
    Entry("health/checks", "Every rule's verdict, evidence and what to do.", kind="table"),
    Entry("health/alerts", "What a rule has just found, with its evidence and what to do.", kind="alert"),
    Entry("health/<name>", "0 ok, 1 warning, 2 failing.", reduction="max", better="lower"),
    # the Trainer's own
    Entry("{train,eval}/loss", "Loss as the Trainer logs it: the mean since it last logged.", "nats", better="lower"),
    _count(
        "steps/nonfinite_losses",
        "Microbatches since the last due step whose loss, as it was trained on, was NaN or infinite.",
        "microbatches",
        "only the Trainer shows the loss of every step",
    ),
    Entry(
        "steps/median_loss",
        "Median loss of the microbatches since the last due step, as they were trained on.",
        reduction="mean over ranks",
        absent="only the Trainer shows the loss of every step",
    ),
    Entry(
        "steps/{highest_rank,lowest_rank}/median_loss",
        "The same of the ranks with the highest and the lowest, which are named.",
        reduction="max, min over ranks",
        absent="one process, or only the Trainer shows the loss of every step",
    ),
    _count(
        "steps/zero_losses",
        "Microbatches since the last due step whose loss was exactly 0: they had no labels, or were skipped.",
        "microbatches",
        "only the Trainer shows the loss of every step",
    ),
    # throughput
    *_all(
        Entry(
            "throughput/seconds_per_step",
            "Time of a step, from waiting for its data to the end of its update; not what is logged, evaluated and "
            "saved between.",
            "seconds",
            reduction="mean over steps and ranks",
            better="lower",
        ),
        Entry(
            "throughput/{slowest_rank,fastest_rank}/seconds_per_step",
            "The same of the slowest and of the fastest rank, which are named.",
            "seconds",
            reduction="max, min over ranks",
            better="lower",
            absent="one process",
        ),
        Entry(
            "throughput/{slowest_loader,fastest_loader}/loader_fraction",
            "Share of a step that the rank waits for its data which waits longest, and which waits least; they are "
            "named. All others wait for the slowest where gradients are averaged.",
            reduction="max, min over ranks",
            better="lower",
            absent="one process, or only the Trainer shows how long it waits for data",
        ),
        Entry(
            "throughput/tokens_per_second",
            "Positions of the model's main input that are trained on in a second, padding included.",
            "tokens/second",
            better="higher",
            reduction="sum over ranks, over the seconds of the slowest",
            absent="the batch has no ids, or only due steps are seen",
        ),
        Entry(
            "throughput/model_flops_per_second",
            "Floating-point operations of the model that are trained a second: 6 × positions × weights that multiply "
            "them. Attention between positions, and what is computed again, is not in it.",
            better="higher",
            reduction="sum over ranks, over the seconds of the slowest",
            absent="parameters are frozen, or only some of them work on a position of the main input",
        ),
        Entry(
            "throughput/model_flops_utilization",
            "Share of what the GPUs could do of dense 16-bit operations, by their makers' data sheets.",
            better="higher",
            reduction="mean over steps and ranks",
            absent="no GPU that is known, or another precision",
        ),
        Entry(
            "throughput/audio_seconds_per_second",
            "Seconds of target audio that are trained on in a second.",
            better="higher",
            reduction="sum over ranks, over the seconds of the slowest",
            absent="batches do not say how long their target audio is",
        ),
        Entry(
            "throughput/loader_fraction",
            "Share of a step that waits for its data.",
            better="lower",
            reduction="mean over steps and ranks",
            absent="only the Trainer shows how long it waits for data",
        ),
        Entry(
            "throughput/memory_bytes",
            "Most memory that tensors have had on the GPU so far; without one, what the process has of the machine's.",
            "bytes",
            better="lower",
            reduction="max over ranks",
        ),
        absent="fewer than two steps have ended",
    ),
    Entry("train/grad_norm", "Gradient norm before clipping, as the Trainer logs it."),
    Entry("train/learning_rate", "Learning rate of the first parameter group."),
    Entry("{train,eval}/epoch", "Passes over the training data: once a step, under train/.", "epochs"),
    Entry("{train,eval,test}/<name>", "As the Trainer logs it."),
    # telemetry
    Entry(
        "telemetry/step_seconds", "Time telemetry took of the training thread on this step.", "seconds", better="lower"
    ),
    Entry(
        "telemetry/overhead_fraction",
        "What telemetry costs as a share of the time since the last due step: its time on the training thread, and "
        "by how much longer a due step and the next take than others. Where these are not known, or fewer than three, "
        "it is estimated: from what the training thread waits for telemetry's own threads, and what it takes itself.",
        better="lower",
    ),
    Entry("telemetry/queue_depth", "Steps waiting to be written.", "steps", better="lower"),
    Entry("telemetry/absent", "What could not be measured so far, and why.", kind="table"),
    _count("telemetry/dropped_records", "Records lost so far.", "records"),
)


@functools.lru_cache(maxsize=65536)
def find(tag: str) -> Entry | None:
    """The entry of a tag, or None for a tag that is not in the catalogue."""
    return next((entry for entry in CATALOGUE if entry.pattern.fullmatch(tag)), None)


def is_each_ranks_own(tag: str) -> bool:
    """Return whether ranks that are given one batch, and have parts of layers, each measure something else of a tag."""
    return tag.startswith(_EACH_RANKS_OWN)


def is_the_trainers(tag: str) -> bool:
    """Whether a tag is of what the Trainer logs."""
    return tag.split("/", 1)[0] in TRAINER_SECTIONS


def describe(tag: str, note: str = "") -> str:
    """One line of description for a tag, with ``note`` (how it was measured on this run) after it."""
    entry = find(tag)
    return " ".join(part for part in (entry.description if entry else "", note) if part)
