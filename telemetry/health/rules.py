"""The rules. Each judges recorded values alone: it never guesses, and says nothing where there is nothing to judge."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from telemetry.health.history import History

_NAMED = 3


class Level(IntEnum):
    """How bad it is, as shown in ``health/<rule>``."""

    OK = 0
    WARNING = 1
    FAILING = 2


@dataclass(frozen=True)
class Verdict:
    """What a rule finds.

    Attributes:
        level: how bad.
        evidence: the values that say so.
    """

    level: Level
    evidence: str


Judge = Callable[[History], Verdict | None]


@dataclass(frozen=True)
class Rule:
    """One thing that can be wrong.

    Attributes:
        name: the last part of its tag ``health/<name>``.
        title: what holds when all is well.
        fault: what to say when it does not.
        judge: the verdict on what was recorded, or None where that says nothing.
        advice: what to do then.
    """

    name: str
    title: str
    fault: str
    judge: Judge
    advice: str


def _evidence(values: dict[str, float]) -> str:
    named = ", ".join(f"{tag} = {value:.4g}" for tag, value in list(values.items())[:_NAMED])
    return named + (f" and {len(values) - _NAMED} more" if len(values) > _NAMED else "")


def _at_least(tag: str, good: float, failing: float) -> Judge:
    """OK from ``good`` up, failing below ``failing``, a warning between."""

    def judge(history: History) -> Verdict | None:
        value = history.latest(tag)
        if value is None or math.isnan(value):
            return None
        level = Level.OK if value >= good else Level.FAILING if value < failing else Level.WARNING
        return Verdict(level, _evidence({tag: value}))

    return judge


def _at_most(tag: str, good: float, bad: Level) -> Judge:
    """OK up to ``good``, ``bad`` above."""

    def judge(history: History) -> Verdict | None:
        value = history.latest(tag)
        if value is None or math.isnan(value):
            return None
        return Verdict(Level.OK if value <= good else bad, _evidence({tag: value}))

    return judge


def _nonfinite(history: History) -> Verdict | None:
    """NaN and infinity among the values of the step, or counted by one of them; not what telemetry says of itself."""
    now = {tag: value for tag, value in history.now().items() if not tag.startswith("telemetry/")}
    if not now:
        return None
    found = {
        tag: value for tag, value in now.items() if not math.isfinite(value) or (tag.endswith("/nonfinite") and value)
    }
    if not found:
        return Verdict(Level.OK, f"{len(now)} values, all finite")
    return Verdict(Level.FAILING, _evidence(found))


_GROUP_NORM = re.compile(r"gradients/[^/]+/norm")


def _gradients_arrive(history: History) -> Verdict | None:
    norms = history.matching(_GROUP_NORM)
    if not norms:
        return None
    zero = {tag: value for tag, value in norms.items() if value == 0}
    if zero:
        return Verdict(Level.FAILING, _evidence(zero))
    newest = max(history.steps(tag)[-1] for tag in norms)
    gone = [f"{tag} last seen at step {history.steps(tag)[-1]}" for tag in norms if history.steps(tag)[-1] < newest]
    if gone:
        return Verdict(Level.WARNING, ", ".join(gone[:_NAMED]))
    return Verdict(Level.OK, _evidence(dict(sorted(norms.items(), key=lambda item: item[1])[:1])))


_UPDATE_RATIO = re.compile(r"gradients/[^/]+/update_ratio")
LARGE_UPDATE = 0.1


def _updates_are_small(history: History) -> Verdict | None:
    """A step of a tenth of the weights' size rewrites them in a few."""
    ratios = history.matching(_UPDATE_RATIO)
    large = {tag: ratio for tag, ratio in ratios.items() if ratio > LARGE_UPDATE}
    if large:
        return Verdict(Level.WARNING, _evidence(large))
    return Verdict(Level.OK, _evidence(dict(sorted(ratios.items(), key=lambda item: -item[1])[:1]))) if ratios else None


_TO_REFERENCE = re.compile(r"attention/layer_[0-9]+/target_to_reference")
LEAST_MASS = 1e-3


def _reference_is_attended(history: History) -> Verdict | None:
    masses = history.matching(_TO_REFERENCE)
    if not masses:
        return None
    most = max(masses, key=lambda tag: masses[tag])
    level = Level.OK if masses[most] >= LEAST_MASS else Level.WARNING
    return Verdict(level, _evidence({most: masses[most]}))


MEASUREMENTS = 5
LEAST_GAIN = 0.01  # nats per audio token


def _reference_is_used(history: History) -> Verdict | None:
    """After some measurements: at the beginning no model uses the reference."""
    tag = "zero_shot/conditioning/gain"
    values = history.values(tag)[-MEASUREMENTS:]
    if len(values) < MEASUREMENTS or not all(map(math.isfinite, values)):
        return None
    best = max(values)
    evidence = f"{tag} at most {best:.4g} in the last {MEASUREMENTS} measurements"
    return Verdict(Level.OK if best >= LEAST_GAIN else Level.WARNING, evidence)


SPIKE = 3.0
PAST = 20


def _loss_is_steady(history: History) -> Verdict | None:
    tag = "train/loss"
    values = history.values(tag)
    past = [value for value in values[-PAST - 1 : -1] if math.isfinite(value)]
    if len(past) < PAST // 2 or not math.isfinite(values[-1]):
        return None
    usual = statistics.median(past)
    level = Level.WARNING if usual > 0 and values[-1] > SPIKE * usual else Level.OK
    return Verdict(level, f"{tag} = {values[-1]:.4g}, median of the {len(past)} before {usual:.4g}")


GENERATIONS = 2


def _generation_ends(history: History) -> Verdict | None:
    """Of a model that has trained: the baseline before the first step ends nowhere."""
    tag = "zero_shot/eos_hit_rate"
    rates = [rate for step, rate in zip(history.steps(tag), history.values(tag), strict=True) if step > 0]
    if len(rates) < GENERATIONS:
        return None
    level = Level.OK if max(rates[-GENERATIONS:]) > 0 else Level.WARNING
    return Verdict(level, f"{tag} = {', '.join(f'{rate:.4g}' for rate in rates[-GENERATIONS:])}")


RULES: tuple[Rule, ...] = (
    Rule(
        "nonfinite",
        "every value is finite",
        "values are not finite",
        _nonfinite,
        "gradients/largest and inputs/tensors name the parameter and the tensor; lower the learning rate, check the "
        "data",
    ),
    Rule(
        "invalid_ids",
        "ids lie in their vocabulary",
        "ids lie outside their vocabulary",
        _at_most("inputs/invalid_ids", 0, Level.FAILING),
        "codec, tokenizer and model do not belong together",
    ),
    Rule(
        "prompt_masked",
        "prompt and reference are not trained on",
        "prompt or reference may be trained on",
        _at_most("inputs/supervised/text_fraction", 0.95, Level.WARNING),
        "mask prompt and reference in the labels",
    ),
    Rule(
        "eos_supervised",
        "the model is taught where to stop",
        "the model is not taught where to stop",
        _at_least("outputs/eos/supervised", 1, failing=0.5),
        "do not mask the end of stream in the labels",
    ),
    Rule(
        "reference_present",
        "every sample has a reference voice",
        "samples lack a reference voice",
        _at_least("zero_shot/reference/present_fraction", 1, failing=0.5),
        "zero_shot/chatml names the samples; look at the data file",
    ),
    Rule(
        "chatml",
        "every sample is a well-formed prompt",
        "samples are not well-formed prompts",
        _at_least("zero_shot/chatml/compliance", 1, failing=0.5),
        "zero_shot/chatml lists the violations by sample",
    ),
    Rule(
        "reference_attended",
        "some layer attends to the reference",
        "no probed layer attends to the reference",
        _reference_is_attended,
        "check the attention mask over the reference",
    ),
    Rule(
        "reference_used",
        "the loss is lower with the right reference voice",
        "the loss does not depend on the reference voice",
        _reference_is_used,
        "check that references and targets are of one speaker, and that several speakers share a batch",
    ),
    Rule(
        "gradients_arrive",
        "gradients reach every part",
        "gradients do not reach every part",
        _gradients_arrive,
        "the part is cut off from the loss, or the batch has no use for it",
    ),
    Rule(
        "update_size",
        "the optimizer's steps are small beside the weights",
        "the optimizer's steps are large beside the weights",
        _updates_are_small,
        "lower the learning rate or warm up longer",
    ),
    Rule(
        "loss_steady",
        "the loss does not jump",
        "the loss has jumped",
        _loss_is_steady,
        "look at the batch of that step in inputs/sequence; lower the learning rate",
    ),
    Rule(
        "generation_ends",
        "free-running speech ends by itself",
        "free-running speech does not end by itself",
        _generation_ends,
        "check outputs/eos/supervised and outputs/eos/probability",
    ),
    Rule(
        "records_lost",
        "nothing measured was lost",
        "measured records were lost",
        _at_most("telemetry/dropped_records", 0, Level.WARNING),
        "the log names the destination that failed or was too slow",
    ),
)
