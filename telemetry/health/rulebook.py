"""The rules. Each is silent on healthy trainings, and known by a mistake that it names."""

from __future__ import annotations

import itertools
import math
import re
import statistics

from telemetry.health.history import History
from telemetry.health.rules import NAMED, Level, Limits, Rule, Verdict, at_least, at_most, evidence, noted
from telemetry.health.setup_rules import SETUP_RULES


def _nonfinite(history: History, limits: Limits) -> Verdict | None:
    """NaN and infinity among the values of the step, or counted by one of them; not what telemetry says of itself."""
    now = {tag: value for tag, value in history.now().items() if not tag.startswith("telemetry/")}
    if not now:
        return None
    found = {
        tag: value for tag, value in now.items() if not math.isfinite(value) or (tag.endswith("/nonfinite") and value)
    }
    if not found:
        return Verdict(Level.OK, f"{len(now)} values, all finite")
    return Verdict(Level.FAILING, evidence(found))


_GROUP_NORM = re.compile(r"gradients/[^/]+/norm")
_UPDATE_RATIO = re.compile(r"gradients/[^/]+/update_ratio")
_TO_REFERENCE = re.compile(r"attention/layer_[0-9]+/target_to_reference")
_EVALUATION_GAIN = re.compile(r"zero_shot/conditioning/eval/([^/]+/)?gain")


def _gradients_arrive(history: History, limits: Limits) -> Verdict | None:
    norms = history.matching(_GROUP_NORM)
    if not norms:
        return None
    zero = {tag: value for tag, value in norms.items() if value == 0}
    if zero:
        return Verdict(Level.FAILING, evidence(zero))
    newest = max(history.last_step(tag) for tag in norms)
    gone = [f"{tag} last seen at step {history.last_step(tag)}" for tag in norms if history.last_step(tag) < newest]
    if gone:
        return Verdict(Level.WARNING, ", ".join(gone[:NAMED]))
    return Verdict(Level.OK, evidence(dict(sorted(norms.items(), key=lambda item: item[1])[:1])))


def _updates_arrive(history: History, limits: Limits) -> Verdict | None:
    """Of a group that has a gradient, twice: a warm-up may begin with a learning rate of 0."""
    norms = history.matching(_GROUP_NORM)
    tags = [
        tag for tag in history.matching(_UPDATE_RATIO) if not norms or norms.get(tag.replace("update_ratio", "norm"))
    ]
    ratios = {tag: history.values(tag, last=2) for tag in tags}
    known = {tag: values for tag, values in ratios.items() if len(values) == 2 and all(map(math.isfinite, values))}
    if not known:
        return None
    still = {tag: values[-1] for tag, values in known.items() if max(values) <= limits["least"]}
    if still:
        return Verdict(Level.FAILING, f"{evidence(still)}, twice in a row")
    smallest = min(known.items(), key=lambda item: item[1][-1])
    return Verdict(Level.OK, evidence({smallest[0]: smallest[1][-1]}))


def _updates_are_small(history: History, limits: Limits) -> Verdict | None:
    """A step of a tenth of the weights' size rewrites them in a few."""
    ratios = history.matching(_UPDATE_RATIO)
    large = {tag: ratio for tag, ratio in ratios.items() if ratio > limits["most"]}
    if large:
        return Verdict(Level.WARNING, evidence(large))
    return Verdict(Level.OK, evidence(dict(sorted(ratios.items(), key=lambda item: -item[1])[:1]))) if ratios else None


def _reference_is_masked(history: History, limits: Limits) -> Verdict | None:
    """Audio that is supervised is none that the model is given: no reference is left where there are such clips."""
    present = history.latest("zero_shot/reference/present_fraction")
    seconds = history.latest("zero_shot/reference/seconds")
    share = history.latest("inputs/tokens/reference_audio_fraction")
    if share is None or not (seconds or 0) > 0:
        return None
    said = {"inputs/tokens/reference_audio_fraction": share, "zero_shot/reference/seconds": float(seconds or 0)}
    if present is not None:
        said["zero_shot/reference/present_fraction"] = present
    return Verdict(Level.OK if share > 0 else Level.FAILING, evidence(said))


def _reference_is_attended(history: History, limits: Limits) -> Verdict | None:
    masses = {tag: mass for tag, mass in history.matching(_TO_REFERENCE).items() if math.isfinite(mass)}
    if not masses:
        return None
    most = max(masses, key=lambda tag: masses[tag])
    return Verdict(Level.OK if masses[most] >= limits["least"] else Level.WARNING, evidence({most: masses[most]}))


def _reference_is_used(history: History, limits: Limits) -> Verdict | None:
    """By the gain at evaluation, where there is one: training samples may be known by heart.

    Of a model that has learnt to predict audio: at the beginning none uses the reference.
    """
    tags = sorted(history.matching(_EVALUATION_GAIN)) or ["zero_shot/conditioning/gain"]
    wanted = int(limits["evaluations" if tags[0] != "zero_shot/conditioning/gain" else "measurements"])
    gains = {tag: [gain for step, gain in history.past(tag) if step > 0][-wanted:] for tag in tags}
    told = {tag: gain for tag, gain in gains.items() if len(gain) == wanted and all(map(math.isfinite, gain))}
    accuracy = history.latest("outputs/accuracy/audio")
    if not told or (accuracy is not None and accuracy < limits["accuracy"]):
        return None
    tag, values = max(told.items(), key=lambda item: max(item[1]))
    said = f"{tag} at most {max(values):.4g} in the last {wanted} measurements"
    return Verdict(Level.OK if max(values) >= limits["least"] else Level.WARNING, said)


def _loss_is_steady(history: History, limits: Limits) -> Verdict | None:
    """Few values tell less of what is usual: a larger jump is needed then."""
    tag = "train/loss"
    values = history.values(tag, last=int(limits["past"]) + 1)
    past = [value for value in values[:-1] if math.isfinite(value)]
    if len(past) < limits["fewest"] or not math.isfinite(values[-1]):
        return None
    usual, largest = statistics.median(past), max(past)
    times = limits["times"] if len(past) >= limits["past"] / 2 else 2 * limits["times"]
    jumped = usual > 0 and values[-1] > times * usual and values[-1] > largest
    said = f"{tag} = {values[-1]:.4g}, median of the {len(past)} before {usual:.4g}"
    return Verdict(Level.WARNING if jumped else Level.OK, said)


def _step_skipped(history: History, limits: Limits) -> Verdict | None:
    """A loss of exactly 0 where it is not near 0: something has put it in the place of a bad one."""
    tag = "steps/zero_losses"
    count = history.latest(tag)
    # Of a loss that is 0 as a rule (GRPO's first ones), a 0 says nothing.
    if count and (history.latest("steps/median_loss") or 0) > limits["least"]:
        return Verdict(Level.FAILING, noted(history, {tag: count}))
    past = [value for value in history.values("train/loss") if math.isfinite(value)]
    if len(past) < limits["fewest"] or not any(past):
        return None if count is None else Verdict(Level.OK, evidence({tag: count}))
    usual, zeros = statistics.median(past), [step for step, loss in history.past("train/loss") if loss == 0]
    if usual > limits["least"] and zeros:
        return Verdict(Level.FAILING, f"train/loss = 0 at step {zeros[-1]}, median {usual:.4g}")
    return Verdict(Level.OK, f"train/loss = {past[-1]:.4g}, median {usual:.4g}")


def _steps_take_as_long(history: History, limits: Limits) -> Verdict | None:
    """Twice in a row, and by more than a machine with other work would explain of a short step."""
    tag = "throughput/seconds_per_step"
    values = history.values(tag, last=int(limits["past"]) + 2)
    past = values[:-2]
    if len(past) < limits["fewest"]:
        return None
    usual = statistics.median(past)
    slow = all(value > limits["times"] * usual and value - usual > limits["seconds"] for value in values[-2:])
    said = f"{tag} = {values[-1]:.4g}, median of the {len(past)} before {usual:.4g}"
    loading = history.latest("throughput/loader_fraction")
    if slow and loading is not None:
        said += f"; throughput/loader_fraction = {loading:.4g}"
        if note := history.note("throughput/slowest_loader/loader_fraction"):
            said += f", most on {note}"
    if slow and (note := history.note("throughput/slowest_rank/seconds_per_step")):
        said += f"; slowest: {note}"
    return Verdict(Level.WARNING if slow else Level.OK, said)


def _memory_is_steady(history: History, limits: Limits) -> Verdict | None:
    """From measurement to measurement: what warms up, or had its longest batch, grows a few times and stays."""
    tag, wanted = "throughput/memory_bytes", int(limits["measurements"])
    values = history.values(tag, last=wanted)
    if len(values) < wanted:
        return None
    first, last = values[0], values[-1]
    always = all(later > earlier for earlier, later in itertools.pairwise(values))
    grows = always and last > limits["times"] * first and last - first > limits["bytes"]
    said = f"{tag} = {last:.4g}, {first:.4g} {wanted - 1} measurements before"
    return Verdict(Level.WARNING if grows else Level.OK, said)


def _losses_are_finite(history: History, limits: Limits) -> Verdict | None:
    tag = "steps/nonfinite_losses"
    count = history.latest(tag)
    return None if count is None else Verdict(Level.FAILING if count > 0 else Level.OK, noted(history, {tag: count}))


def _rate_is_positive(history: History, limits: Limits) -> Verdict | None:
    """A warm-up may begin at 0: twice in a row. What is logged is the first group's: others may move."""
    tag = "train/learning_rate"
    last = history.past(tag, last=2)
    if len(last) < 2:
        return None
    newest = (history.past(one, last=1)[0] for one in history.matching(_UPDATE_RATIO))
    moves = any(step >= last[0][0] and ratio > 0 for step, ratio in newest)
    still = not any(rate for _, rate in last) and not moves
    return Verdict(Level.FAILING if still else Level.OK, evidence({tag: last[-1][1]}))


def _prompt_is_masked(history: History, limits: Limits) -> Verdict | None:
    """Of a batch with speech to be learnt: text alone may all be there to be learnt."""
    if history.latest("inputs/tokens/target_audio_fraction") is None:
        return None
    return at_most("inputs/supervised/text_fraction", Level.WARNING)(history, limits)


def _transcripts_fit(history: History, limits: Limits) -> Verdict | None:
    tags = [f"inputs/length_correlation/{kind}" for kind in ("target", "reference")]
    known = {tag: value for tag in tags if (value := history.latest(tag)) is not None and math.isfinite(value)}
    bad = {tag: value for tag, value in known.items() if value < limits["least"]}
    return Verdict(Level.WARNING if bad else Level.OK, evidence(bad or known)) if known else None


def _generation_ends(history: History, limits: Limits) -> Verdict | None:
    """Of a model that predicts audio well and yet gives the end of stream no chance where it should come."""
    tag = "zero_shot/eos_hit_rate"
    rates = [rate for step, rate in history.past(tag) if step > 0][-int(limits["evaluations"]) :]
    accuracy, ending = history.latest("outputs/accuracy/audio"), history.latest("outputs/eos/probability")
    if len(rates) < limits["evaluations"] or accuracy is None or not accuracy >= limits["accuracy"]:
        return None
    said = f"{tag} = {', '.join(f'{rate:.4g}' for rate in rates)}"
    if ending is not None:
        said += f", outputs/eos/probability = {ending:.4g}"
    never = max(rates) == 0 and (ending is None or not ending >= limits["probability"])
    return Verdict(Level.WARNING if never else Level.OK, said)


# What speech is better or worse by, and by how much it may be worse before that says something.
_SPEECH = {
    "zero_shot/speaker_similarity": ("higher", "similarity"),
    "zero_shot/wer": ("lower", "wer"),
    "zero_shot/silence_fraction": ("lower", "silence"),
    "zero_shot/mel_distance": ("lower", "mel_distance"),
}


def _worse(tag: str, now: float, then: float, limits: Limits) -> bool:
    better, limit = _SPEECH[tag]
    return (then - now if better == "higher" else now - then) > limits[limit]


def _speech_is_no_worse(history: History, limits: Limits) -> Verdict | None:
    """Against the baseline before the first step, at the last two evaluations."""
    heard = {tag: past for tag in _SPEECH if len(past := history.past(tag)) > 1 and past[0][0] == 0}
    if not heard:
        return None
    worse = []
    for tag, past in heard.items():
        (_, then), (_, now) = past[0], past[-1]
        if len(past) > 2 and all(_worse(tag, value, then, limits) for _, value in past[-2:]):
            worse.append(f"{tag} = {now:.4g}, {then:.4g} before training")
    if worse:
        return Verdict(Level.WARNING, "; ".join(worse))
    tag, past = next(iter(heard.items()))
    return Verdict(Level.OK, f"{tag} = {past[-1][1]:.4g}, {past[0][1]:.4g} before training")


def _generalizes(history: History, limits: Limits) -> Verdict | None:
    """The evaluation loss alone rises while speech still gets better: both are to be worse than at its best."""
    past = [(step, loss) for step, loss in history.past("eval/loss") if math.isfinite(loss)]
    if len(past) < limits["evaluations"]:
        return None
    best_step, best = min(past, key=lambda pair: pair[1])
    last = past[-1][1]
    said = f"eval/loss = {last:.4g}, {best:.4g} at step {best_step}"
    if not (best > 0 and last > limits["times"] * best and past[-2][1] > best):
        return Verdict(Level.OK, said)
    heard = {tag: history.past(tag) for tag in _SPEECH if history.past(tag)}
    then = {tag: next((value for step, value in past if step >= best_step), None) for tag, past in heard.items()}
    worse = [tag for tag, value in then.items() if value is not None and _worse(tag, heard[tag][-1][1], value, limits)]
    if heard and not worse:
        return Verdict(Level.OK, f"{said}, and speech is no worse than then")
    named = "".join(f", {tag} = {heard[tag][-1][1]:.4g}, {then[tag]:.4g} then" for tag in worse[:NAMED])
    return Verdict(Level.WARNING, said + named)


def _sound_is_good(history: History, limits: Limits) -> Verdict | None:
    """Level, clipping and sampling rate of the references."""
    kinds = {
        "zero_shot/reference/level_db": lambda value: value < limits["level_db"],
        "zero_shot/reference/clipping_fraction": lambda value: value > limits["clipping_fraction"],
        "zero_shot/reference/sampling_rate": lambda value: value < limits["sampling_rate"],
        "zero_shot/reference/silence_fraction": lambda value: value > limits["silence_fraction"],
    }
    known = {tag: value for tag in kinds if (value := history.latest(tag)) is not None and math.isfinite(value)}
    bad = {tag: value for tag, value in known.items() if kinds[tag](value)}
    return Verdict(Level.WARNING if bad else Level.OK, evidence(bad or known)) if known else None


_SPEECH_LIMITS = {"similarity": 0.2, "wer": 0.2, "silence": 0.5, "mel_distance": 4.0}

RULES: tuple[Rule, ...] = (
    *SETUP_RULES,
    Rule(
        "nonfinite",
        "every value is finite",
        "values are not finite",
        _nonfinite,
        "gradients/largest and inputs/tensors name the parameter and the tensor; lower the learning rate, check the "
        "data",
        "float16 that overflows, a step that a loss scaler leaves out; a batch without a single label",
        follows=("loss_finite",),
        absent="nothing but telemetry's own numbers was recorded",
        proof="NaN from one sample",
    ),
    Rule(
        "loss_finite",
        "every step's loss is finite",
        "a step's loss was not finite",
        _losses_are_finite,
        "look at the samples that are named; train without them, or lower the learning rate",
        "float16 that overflows; a batch without a single label",
        absent="the trainer does not show the loss of every step",
        proof="NaN from one sample, between two due steps",
    ),
    Rule(
        "learning_rate",
        "the learning rate is above 0",
        "the learning rate is 0",
        _rate_is_positive,
        "look at the scheduler: a warm-up that never ends, or more steps than it was made for",
        "a scheduler that is meant to end before the training does",
        {},
        absent="fewer than two values are logged",
        proof="learning rate 0; a schedule that ends too early",
    ),
    Rule(
        "invalid_ids",
        "ids lie in their vocabulary",
        "ids lie outside their vocabulary",
        at_most("inputs/invalid_ids", Level.FAILING),
        "codec, tokenizer and model do not belong together",
        "tokens that were added to the tokenizer after the embeddings were made",
        {"most": 0},
        absent="the batch has no ids",
        proof="wrong tokenizer",
    ),
    Rule(
        "labels",
        "every sample has labels",
        "samples have no label at all",
        at_least("inputs/supervised/samples_fraction"),
        "see why all of a sample is masked: a length limit, a template that is not found, a wrong role",
        "padding a last batch with empty samples",
        {"least": 1, "failing": 0.5},
        absent="the batch has no labels that could be read",
        proof="no labels in some batches",
    ),
    Rule(
        "prompt_masked",
        "the prompt's text is not trained on",
        "the prompt's text may be trained on",
        _prompt_is_masked,
        "mask the prompt in the labels",
        "pre-training on whole texts, where this is meant",
        {"most": 0.95},
        follows=("asked_labels",),
        absent="the batch has no text labels, or no audio: then nobody knows what is a prompt",
        proof="prompt text supervised",
    ),
    Rule(
        "mask_holes",
        "the attention mask hides padding alone",
        "the attention mask hides tokens in the middle",
        at_most("inputs/tokens/hidden_fraction", Level.FAILING),
        "build the mask from the padding, and from nothing else",
        "span masking as augmentation",
        {"most": 0},
        absent="the batch has no positions",
        proof="reference hidden by the attention mask",
    ),
    Rule(
        "transcripts",
        "transcripts are as long as their clips are",
        "transcripts do not fit their clips",
        _transcripts_fit,
        "listen to inputs/target beside its transcript; see that files and texts are joined by the same key",
        "very few or very alike clips; languages of very unlike scripts in one data set",
        {"least": 0.3},
        absent="the batch carries no transcripts with waveforms, or too few so far",
        proof="transcripts shuffled; reference transcript of another clip",
    ),
    Rule(
        "step_skipped",
        "every step is trained on",
        "a step was skipped: its loss is exactly 0",
        _step_skipped,
        "find what replaces a bad loss by 0, and the samples of that step",
        "a batch without a single label",
        {"fewest": 5, "least": 0.01},
        ("labels",),
        absent="fewer than three values",
        proof="NaN from one sample, its step skipped",
    ),
    Rule(
        "clipping",
        "gradients are clipped a little at most",
        "clipping leaves next to nothing of the gradients",
        at_least("gradients/clip_coefficient"),
        "look at max_grad_norm beside gradients/total_norm",
        "a spike of the loss at this step",
        {"least": 1e-4, "failing": 1e-4},
        ("nonfinite",),
        absent="gradients are not clipped",
        proof="gradients clipped to 1e-6",
    ),
    Rule(
        "reference_masked",
        "reference audio is not trained on",
        "reference audio is trained on",
        _reference_is_masked,
        "mask the reference clip's codes in the audio labels",
        "samples whose reference clips are lost on the way into the batch",
        follows=(
            "mask_holes",
            "asked_labels",
        ),
        absent="the batch carries no reference waveform",
        proof="reference audio supervised",
    ),
    Rule(
        "eos_supervised",
        "the model is taught where to stop",
        "the model is not taught where to stop",
        at_least("outputs/eos/supervised"),
        "see that targets have an end of stream, that labels do not mask it, and that no length limit cuts it off",
        "labels that are shifted twice: the end of stream is then the last one to go",
        {"least": 1, "failing": 0.5},
        follows=(
            "labels",
            "asked_labels",
        ),
        absent="there is no target audio",
        proof="audio end of stream masked; targets truncated by a length limit",
    ),
    Rule(
        "reference_present",
        "every sample has a reference voice",
        "samples lack a reference voice",
        at_least("zero_shot/reference/present_fraction"),
        "zero_shot/chatml names the samples; look at the data file",
        "plain text-to-speech samples among the others, where that is meant",
        {"least": 1, "failing": 0.5},
        ("mask_holes", "reference_masked", "labels", "asked_labels"),
        absent="the family has no audio",
        proof="reference dropped",
    ),
    Rule(
        "chatml",
        "every sample is a well-formed prompt",
        "samples are not well-formed prompts",
        at_least("zero_shot/chatml/compliance"),
        "zero_shot/chatml lists the violations by sample",
        "a chat template other than the one that the model was trained with",
        {"least": 1, "failing": 0.5},
        (
            "mask_holes",
            "reference_masked",
            "reference_present",
            "eos_supervised",
            "labels",
            "asked_labels",
            "references",
        ),
        absent="the family's chat format is not known",
        proof="codebooks that are not delayed",
    ),
    Rule(
        "reference_attended",
        "some layer attends to the reference",
        "no probed layer attends to the reference",
        _reference_is_attended,
        "check the attention mask over the reference",
        "layers that were not probed: --attention_layers",
        {"least": 1e-3},
        ("mask_holes", "reference_masked", "reference_present", "asked_labels"),
        absent="attention was not read, or there is no reference",
        proof="reference hidden by the attention mask",
    ),
    Rule(
        "reference_used",
        "the loss is lower with the right reference voice",
        "the loss does not depend on the reference voice",
        _reference_is_used,
        "check that references and targets are of one speaker, and that several speakers share a batch",
        "speakers that sound alike; a model that knows its training voices by heart",
        {"least": 0.01, "measurements": 5, "evaluations": 2, "accuracy": 0.3},
        (
            "reference_masked",
            "reference_present",
            "reference_attended",
            "asked_labels",
            "references",
            "chance",
            "loss_weight",
        ),
        absent="the gain was measured too seldom, or the model has not learnt to predict audio yet",
        proof="reference of another speaker",
    ),
    Rule(
        "reference_sound",
        "reference clips sound as they should",
        "reference clips are silent, clipped or narrow",
        _sound_is_good,
        "listen to inputs/reference; look at how the clips were made",
        "a loud or a telephone recording among few clips of a step",
        {"level_db": -60, "clipping_fraction": 0.005, "sampling_rate": 16000, "silence_fraction": 0.9},
        absent="the batch carries no reference waveform",
        proof="digital silence as reference; all clips clipped; all clips of 8 kHz",
    ),
    Rule(
        "gradients_arrive",
        "gradients reach every part",
        "gradients do not reach every part",
        _gradients_arrive,
        "the part is cut off from the loss, or the batch has no use for it",
        "batches of text alone beside batches with audio",
        follows=("loss_finite", "nonfinite", "labels", "loss_weight", "adapters", "frozen"),
        absent="no parameter has a gradient",
        proof="audio loss × 0",
    ),
    Rule(
        "updates_arrive",
        "the optimizer changes every part",
        "the optimizer leaves parts as they are",
        _updates_arrive,
        "see that the optimizer holds the part and that its learning rate is above 0",
        "bfloat16 weights that swallow steps smaller than their precision: keep float32 weights, or raise the rate",
        {"least": 0},
        ("loss_finite", "nonfinite", "labels", "learning_rate", "gradients_arrive", "optimizer"),
        absent="fewer than two due steps",
        proof="learning rate 0; parameters outside of the optimizer",
    ),
    Rule(
        "update_size",
        "the optimizer's steps are small beside the weights",
        "the optimizer's steps are large beside the weights",
        _updates_are_small,
        "lower the learning rate or warm up longer",
        "weights that begin at 0 (LoRA's B), of which the first steps are large",
        {"most": 0.1},
        absent="the update was not measured",
        proof="learning rate × 100",
    ),
    Rule(
        "loss_steady",
        "the loss does not jump",
        "the loss has jumped",
        _loss_is_steady,
        "look at the batch of that step in inputs/sequence; lower the learning rate",
        "one odd sample in a small batch",
        {"times": 3, "past": 20, "fewest": 3},
        ("nonfinite", "update_size", "asked_labels"),
        absent="fewer than three values before",
        proof="learning rate × 100",
    ),
    Rule(
        "padding",
        "batches are not mostly padding",
        "batches are mostly padding",
        at_most("inputs/tokens/padding_fraction", Level.WARNING),
        "group samples by length, or pack them",
        "one very long sample in a step",
        {"most": 0.8},
        absent="the batch has no positions",
        proof="one sample of fifty times the others' length",
    ),
    Rule(
        "generation_ends",
        "free-running speech ends by itself",
        "free-running speech does not end by itself",
        _generation_ends,
        "check outputs/eos/supervised and outputs/eos/probability",
        "a bound on length that is shorter than what is to be said",
        {"evaluations": 2, "accuracy": 0.5, "probability": 0.1},
        ("eos_supervised", "nonfinite", "asked_labels", "loss_weight", "chance"),
        absent="fewer than two evaluations with clips, or the model does not predict audio well yet",
        proof="audio end of stream masked",
    ),
    Rule(
        "speech_worse",
        "speech is no worse than before training",
        "speech is worse than before training",
        _speech_is_no_worse,
        "listen to zero_shot/clips of both; lower the learning rate, look at the data",
        "few clips: look at more (--zero_shot_clips)",
        _SPEECH_LIMITS,
        (
            "nonfinite",
            "update_size",
            "eos_supervised",
            "reference_masked",
            "asked_labels",
            "loss_weight",
            "chance",
            "references",
            "optimizer",
        ),
        absent="there were no clips before the first step, or none since",
        proof="garbled text; learning rate × 100 on a trained model",
    ),
    Rule(
        "overfitting",
        "what is learnt holds for evaluation data",
        "the model learns its training data by heart",
        _generalizes,
        "stop earlier, train on more data, or lower the learning rate",
        "evaluation data of another kind than training data",
        {"evaluations": 3, "times": 1.1, **_SPEECH_LIMITS},
        ("nonfinite", "update_size", "asked_labels", "chance", "references"),
        absent="fewer than three evaluations",
        proof="one sample is 80 % of the data",
    ),
    Rule(
        "step_time",
        "steps take as long as before",
        "steps take much longer than before",
        _steps_take_as_long,
        "where throughput/loader_fraction is high, look at storage and at the loader's workers; else at what else "
        "runs on the machine, or at the slowest rank",
        "batches that are longer than before",
        {"times": 2, "past": 20, "fewest": 5, "seconds": 0.5},
        absent="fewer than seven measurements",
        proof="a data loader that becomes slow",
    ),
    Rule(
        "memory_grows",
        "memory does not grow for ever",
        "memory grows from measurement to measurement",
        _memory_is_steady,
        "something keeps tensors of every step: losses without detach(), outputs in a list, caches without a bound",
        "batches that get longer from step to step",
        {"measurements": 10, "times": 1.2, "bytes": 2**28},
        absent="fewer than ten measurements",
        proof="a list that keeps something of every step",
    ),
    Rule(
        "records_lost",
        "nothing measured was lost",
        "measured records were lost",
        at_most("telemetry/dropped_records", Level.WARNING),
        "the log names the destination that failed or was too slow",
        "",
        {"most": 0},
        absent="before the first due step",
        proof="a full disk",
    ),
)
