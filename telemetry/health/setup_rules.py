"""Set-up checks: is this the training that was meant? Judged on the first due step, without a history."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from telemetry.health.history import History
from telemetry.health.rules import Judge, Level, Limits, Rule, Verdict, at_most, evidence, noted

_GROUPS = ("text", "audio")
_WEIGHT = re.compile(r"setup/loss_weight/.+")
_CHANCE = re.compile(r"setup/chance/.+")
_TRAINED = re.compile(r"setup/trained/.+")
_OF_AUDIO = ("audio_ffn", "audio_embedding", "audio_head", "depth_decoder")
_OF_THE_REST = ("text_ffn", "shared_attention")


def _asked_labels(history: History, limits: Limits) -> Verdict | None:
    """The label of every row is to be the token that follows in the input, and of its own codebook."""
    said, worst = [], Level.OK
    for group in _GROUPS:
        following = history.latest(f"setup/asked/{group}/next")
        offset = history.latest(f"setup/asked/{group}/offset")
        share = history.latest(f"setup/asked/{group}/at_offset")
        if following is None or offset is None or share is None:
            continue
        place = f"{group}: {following:.3f} of the labels are the next token"
        if following < limits["least"]:
            worst = Level.FAILING
            place += f", {share:.3f} the one at +{offset:.0f}" if offset != 1 else ""
        said.append(place)
    own = history.latest("setup/asked/audio/own_codebook")
    if own is not None and own < 1:
        worst = Level.FAILING
        said.append(f"audio: {own:.3f} of the codebooks are asked for their own codes")
    return Verdict(worst, "; ".join(said)) if said else None


def _loss_weight(history: History, limits: Limits) -> Verdict | None:
    """The weights of every part sum to 1 where its loss is a mean over the whole step."""
    weights = {tag: value for tag, value in history.matching(_WEIGHT).items() if math.isfinite(value)}
    if not weights:
        return None
    bad = {tag: value for tag, value in weights.items() if not limits["least"] <= value <= limits["most"]}
    return Verdict(Level.FAILING if bad else Level.OK, evidence(bad or weights))


def _supervised(history: History, limits: Limits) -> Verdict | None:
    """Neither padding nor a reference is asked for."""
    tags = [f"setup/asked/{group}/{place}" for group in _GROUPS for place in ("padding", "reference", "undeclared")]
    known = {tag: value for tag in tags if (value := history.latest(tag)) is not None}
    bad = {tag: value for tag, value in known.items() if value > limits["most"]}
    return Verdict(Level.FAILING if bad else Level.OK, evidence(bad or known)) if known else None


def _recombined(history: History, limits: Limits) -> Verdict | None:
    """What is trained on, against the sum of its parts, of the very first step."""
    trained, read = history.past("train/loss"), history.past("outputs/loss/total")
    if not trained or not read or trained[0][0] != 1 or read[0][0] != 1:
        return None
    loss, total = trained[0][1], read[0][1]
    if not (math.isfinite(loss) and math.isfinite(total)) or total <= 0:
        return None
    said = f"train/loss = {loss:.4g}, outputs/loss/total = {total:.4g}"
    return Verdict(Level.WARNING if abs(loss - total) > limits["apart"] * total else Level.OK, said)


def _chance(history: History, limits: Limits) -> Verdict | None:
    """Of a model that has learnt something: untrained, it may well guess worse than evenly."""
    if history.latest("setup/norms/untouched_fraction") == 1:
        return None
    ratios = {tag: value for tag, value in history.matching(_CHANCE).items() if math.isfinite(value)}
    if not ratios:
        return None
    bad = {tag: value for tag, value in ratios.items() if value > limits["most"]}
    most = max(ratios, key=lambda tag: ratios[tag])
    return Verdict(Level.WARNING if bad else Level.OK, evidence(bad or {most: ratios[most]}))


def _optimizer(history: History, limits: Limits) -> Verdict | None:
    """It holds all that is trained, and its first step moves it, unless the learning rate is still 0."""
    held = history.latest("setup/optimizer/held_fraction")
    if held is None:
        return None
    rate, moved = history.latest("setup/optimizer/learning_rate"), history.latest("setup/optimizer/moved_fraction")
    said = {"setup/optimizer/held_fraction": held}
    if moved is not None and rate is not None:
        said |= {"setup/optimizer/moved_fraction": moved, "setup/optimizer/learning_rate": rate}
    still = moved is not None and (rate or 0) > 0 and moved < limits["moved"]
    return Verdict(Level.FAILING if held < limits["held"] or still else Level.OK, evidence(said))


def _frozen(history: History, limits: Limits) -> Verdict | None:
    """Audio is to be learnt, and nothing that is its own is trained, while the rest is."""
    trained = {tag.rsplit("/", 1)[1]: value for tag, value in history.matching(_TRAINED).items()}
    audio = {name: trained[name] for name in _OF_AUDIO if name in trained}
    rest = {name: trained[name] for name in _OF_THE_REST if name in trained}
    if not audio or not rest or history.latest("outputs/loss/audio") is None:
        return None
    bad = not any(audio.values()) and any(rest.values())
    said = evidence({f"setup/trained/{name}": value for name, value in {**audio, **rest}.items()})
    return Verdict(Level.WARNING if bad else Level.OK, said)


def _adapters(history: History, limits: Limits) -> Verdict | None:
    active = history.latest("setup/adapters/active_fraction")
    if active is None:
        return None
    return Verdict(Level.OK if active == 1 else Level.FAILING, evidence({"setup/adapters/active_fraction": active}))


def _modes(history: History, limits: Limits) -> Verdict | None:
    training = history.latest("setup/modes/training_fraction")
    evaluation = history.latest("setup/modes/evaluation_fraction")
    known = {"setup/modes/training_fraction": training, "setup/modes/evaluation_fraction": evaluation}
    said = evidence({tag: value for tag, value in known.items() if value is not None})
    if not said:
        return None
    # Parts that are frozen on purpose may be left in evaluation mode.
    bad = training == 0 or (evaluation or 0) > 0
    return Verdict(Level.FAILING if bad else Level.OK, said)


def _references(history: History, limits: Limits) -> Verdict | None:
    """Of the first step's samples."""
    samples, different = history.latest("setup/references/samples"), history.latest("setup/references/different")
    if samples is None or different is None:
        return None
    equal = history.latest("setup/references/equal_fraction") or 0.0
    constant = history.latest("setup/references/constant_fraction") or 0.0
    targets = history.latest("setup/targets/different") or 0.0
    said = {
        "setup/references/samples": samples,
        "setup/references/different": different,
        "setup/references/equal_fraction": equal,
        "setup/references/constant_fraction": constant,
    }
    same = samples >= limits["samples"] and different == 1 and targets > 1
    bad = equal > limits["equal"] or constant > limits["constant"] or same
    worst = sorted(said.items(), key=lambda item: item[0] != "setup/references/equal_fraction")
    return Verdict(Level.FAILING if bad else Level.OK, ", ".join(f"{tag} = {value:.4g}" for tag, value in worst))


def _targets(history: History, limits: Limits) -> Verdict | None:
    samples, share = history.latest("setup/targets/samples"), history.latest("setup/targets/commonest_fraction")
    if samples is None or share is None or samples < limits["samples"]:
        return None
    said = evidence({"setup/targets/commonest_fraction": share, "setup/targets/samples": samples})
    return Verdict(Level.WARNING if share > limits["commonest"] else Level.OK, said)


def _shares(tags: Mapping[str, str], worst: Level) -> Judge:
    """``worst`` where a share of a data set is above its limit; tag → the limit's name."""
    known = {f"setup/data/{tag}": limit for tag, limit in tags.items()}

    def judge(history: History, limits: Limits) -> Verdict | None:
        values = {tag: value for tag in known if (value := history.latest(tag)) is not None}
        bad = {tag: value for tag, value in values.items() if value > limits[known[tag]]}
        if not values:
            return None
        return Verdict(worst if bad else Level.OK, noted(history, bad) if bad else evidence(values))

    return judge


_KINDS = ("reference", "target")
# References are often cut out of a longer recording on purpose.
_SOUND = {
    f"{kind}/{name}_fraction": name
    for kind in _KINDS
    for name in ("silent", "clipped", "narrow", "noisy", "cut")
    if (kind, name) != ("reference", "cut")
}
_PAIRS = {
    "equal_fraction": "equal",
    "commonest_reference_fraction": "commonest",
    "commonest_target_fraction": "commonest",
}
_WORDS = {f"{kind}/other_texts_nearer": "most" for kind in _KINDS}


def _data_rate(history: History, limits: Limits) -> Verdict | None:
    tag = "setup/data/rate_ratio"
    ratio = history.latest(tag)
    if ratio is None or ratio <= 0:
        return None
    level = Level.WARNING if abs(math.log(ratio)) > limits["apart"] else Level.OK
    return Verdict(level, noted(history, {tag: ratio}) if level else evidence({tag: ratio}))


_NOT_CHECKED = "the data set was not gone through (the script does it, or telemetry.check_data)"

DATA_RULES: tuple[Rule, ...] = (
    Rule(
        "data_pairs",
        "references and targets are clips of their own",
        "references or targets of many samples are the same clip",
        _shares(_PAIRS, Level.FAILING),
        "give every sample a reference that is another clip of its speaker, and each target once",
        "a data set of one sentence in many voices",
        {"equal": 0.1, "commonest": 0.3},
        absent=_NOT_CHECKED,
        proof="reference equals the target; one reference for all; one sample is 80 % of the data",
        section="setup",
    ),
    Rule(
        "data_sound",
        "clips sound as they should",
        "clips are silent, clipped, narrow, noisy or cut off",
        _shares(_SOUND, Level.WARNING),
        "listen to the clips that are named; look at how they were made",
        "whispers; recordings that are meant to be rough",
        {"silent": 0.02, "clipped": 0.1, "narrow": 0.5, "noisy": 0.1, "cut": 0.2},
        absent=_NOT_CHECKED,
        proof="all clips clipped; all clips of 8 kHz; one clip in ten silent; targets cut off",
        section="setup",
    ),
    Rule(
        "data_voices",
        "targets are in the voice of their reference",
        "targets are in another voice than their reference",
        _shares({"other_voices_nearer": "most"}, Level.FAILING),
        "listen to inputs/reference beside inputs/target; see that clips are joined by speaker",
        "speakers that sound alike to the encoder; music or noise under the speech",
        {"most": 0.3},
        ("data_pairs", "data_sound"),
        f"{_NOT_CHECKED}, there is no speaker encoder, or all are one speaker",
        "reference of another speaker",
        "setup",
    ),
    Rule(
        "data_words",
        "clips say their transcripts",
        "clips say something else than their transcripts",
        _shares(_WORDS, Level.WARNING),
        "listen to inputs/target beside its transcript; see that files and texts are joined by the same key",
        "a language or an accent that the transcriber does not understand",
        {"most": 0.4},
        ("data_pairs", "data_sound", "data_voices"),
        f"{_NOT_CHECKED}, or there is no transcriber",
        "transcripts shuffled; reference transcript of another clip",
        "setup",
    ),
    Rule(
        "data_rate",
        "targets are spoken as fast as references",
        "targets are spoken faster or slower than references",
        _data_rate,
        "see that transcripts belong to their clips, and that no clip is played at another rate",
        "references that were cut shorter than their transcripts",
        {"apart": 0.25},
        ("data_pairs", "data_sound", "data_words"),
        f"{_NOT_CHECKED}, or there are no transcripts",
        "clips of a wrong sampling rate",
        "setup",
    ),
)

SETUP_RULES: tuple[Rule, ...] = (
    Rule(
        "asked_labels",
        "every label is the token that follows",
        "the loss asks for other tokens than those that follow",
        _asked_labels,
        "at +2, labels are shifted twice: hand them over unshifted, or do not shift them in your own loss; at +0 the "
        "model sees its target: shift them; other codebooks: look at their order in labels and logits",
        "a model whose labels are another sequence than its input, which its family is to say",
        {"least": 0.9},
        absent="a fused or compiled loss, no labels, or labels that are another sequence",
        proof="labels shifted twice; labels not shifted; labels of reversed codebooks",
        section="setup",
    ),
    Rule(
        "loss_weight",
        "every part of the loss has its weight",
        "parts of the loss have another weight than they should",
        _loss_weight,
        "0: the part is not in the loss; the number of accumulated microbatches: divide the loss by it, or set "
        "accepts_loss_kwargs = False on a model that is given num_items_in_batch and ignores it",
        "a weight of a part that you have chosen: change the limits in --health_rules",
        {"least": 0.5, "most": 1.5},
        ("asked_labels", "labels"),
        absent="a fused or compiled loss, no labels, or float16 with a loss scaler",
        proof="audio loss × 0; codebook 0 alone in the loss; accumulated loss not divided",
        section="setup",
    ),
    Rule(
        "supervised",
        "the loss asks for targets alone",
        "the loss asks for padding, references or what no label says",
        _supervised,
        "mask it in the labels, or in your own loss",
        "a loss of your own over further positions, where it is meant",
        {"most": 0.01},
        ("asked_labels",),
        absent="a fused or compiled loss, or no labels",
        proof="padding supervised in an own loss",
        section="setup",
    ),
    Rule(
        "recombined",
        "what is trained on is the sum of its parts",
        "the trained loss is not the sum of its parts",
        _recombined,
        "look at setup/loss_weight and outputs/loss for the part that is missing or counted otherwise",
        "label smoothing, a regularizer or another loss of your own",
        {"apart": 0.3},
        ("asked_labels", "loss_weight", "supervised"),
        absent="the Trainer does not log its first step, or the total is withheld",
        proof="text loss × 0",
        section="setup",
    ),
    Rule(
        "chance",
        "the loss is no worse than a guess",
        "the loss is worse than a guess",
        _chance,
        "codes, text or their order are not those that the model was trained with: compare codec, tokenizer, delay "
        "pattern and the order of codebooks",
        "prompts that are trained on: their text is no speech",
        {"most": 1.1},
        ("asked_labels", "loss_weight"),
        absent="no stream has labels, or the model is untrained (every norm is as it was made)",
        proof="codebooks in reversed order; codes of another codec; garbled text",
        section="setup",
    ),
    Rule(
        "optimizer",
        "the optimizer holds and moves what is trained",
        "the optimizer does not hold or move what is trained",
        _optimizer,
        "make the optimizer after adapters have been added and parts unfrozen; keep float32 weights for small steps",
        "parts with an optimizer of their own",
        {"held": 0.999, "moved": 0.5},
        ("labels", "loss_weight"),
        absent="parameters are sharded, or the optimizer does not say what it holds",
        proof="LoRA outside of the optimizer; bfloat16 weights that swallow steps",
        section="setup",
    ),
    Rule(
        "frozen",
        "what is the audio's own is trained",
        "audio is to be learnt, and nothing that is its own is trained",
        _frozen,
        "unfreeze the audio networks, embedding or head",
        "adapters on the audio path under another name",
        absent="the family names no groups, or the batch has no audio",
        proof="audio path frozen",
        section="setup",
    ),
    Rule(
        "adapters",
        "adapters take part in the forward pass",
        "adapters are switched off in the forward pass",
        _adapters,
        "call enable_adapter_layers(), and leave disable_adapter() before the training's pass",
        "",
        absent="the model has no adapters",
        proof="LoRA off in the forward pass",
        section="setup",
    ),
    Rule(
        "modes",
        "dropout acts in training and not in evaluation",
        "modules are in the wrong mode",
        _modes,
        "model.train() before training steps and model.eval() before evaluations",
        "a model that is meant to be trained without dropout: set it to 0",
        absent="the model has no dropout and no batch norm",
        proof="dropout active in evaluation; training in evaluation mode",
        section="setup",
    ),
    Rule(
        "alone",
        "no sample sees padding or another sample",
        "samples see padding, or each other",
        at_most("setup/alone/changes", Level.FAILING),
        "mask padding in the attention mask; give packed samples position ids that begin anew",
        "layers that mix samples on purpose: batch statistics, a bound on what an expert takes",
        {"most": 1e-2},
        ("causality", "mask_holes"),
        absent="the batch has one sample, or could not be run a second time",
        proof="padding on the left that no mask hides",
        section="setup",
    ),
    Rule(
        "ranks",
        "all ranks have the same weights",
        "ranks train weights of their own",
        at_most("setup/ranks/weights_apart", Level.FAILING),
        "call the model that DDP has wrapped, and not the one inside of it; wrap it after its weights are loaded",
        "devices of several kinds, which round otherwise; experts that are spread over ranks",
        {"most": 1e-6},
        absent="one process, or parameters are sharded",
        proof="two ranks whose DDP wrapper is bypassed; ranks with unlike seeds",
        section="setup",
    ),
    Rule(
        "causality",
        "no position sees what comes after it",
        "positions see what comes after them",
        at_most("setup/causality/earlier_changes", Level.FAILING),
        "give the model a causal attention mask: what it is to predict is in its input",
        "a masked language model or an encoder, where that is meant",
        {"most": 1e-3},
        absent="the batch could not be run a second time, or labels are not those of the next token",
        proof="bidirectional attention",
        section="setup",
    ),
    Rule(
        "targets",
        "targets differ",
        "most targets are one and the same",
        _targets,
        "count the samples of the data file by their target",
        "a small data set that is gone through in one step",
        {"samples": 4, "commonest": 0.5},
        absent="fewer than four samples in the first step",
        proof="one sample is 80 % of the data",
        section="setup",
    ),
    Rule(
        "references",
        "every sample has a reference of its own",
        "references are not what they should be",
        _references,
        "see which clip each sample takes as its reference: another one of the same speaker",
        "a data set with one reference for each speaker, and a batch of one speaker",
        {"equal": 0.1, "constant": 0.25, "samples": 3},
        absent="the first step has no reference audio",
        proof="reference equal to the target; one reference for all; digital silence as reference",
        section="setup",
    ),
    *DATA_RULES,
)
