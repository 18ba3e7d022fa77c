"""``make mistakes``: every planted mistake and healthy training, and what telemetry finds in each."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence

import trainer as _trainer  # noqa: F401  (first: repairs what transformers imports)

# isort: split
import torch
from mistakes.planted import HEALTHY, MISTAKES
from mistakes.trainings import Outcome, Planted, observe


def main(wanted: Sequence[str]) -> int:
    """Print a table of those whose names contain a word that is asked for, or of all."""
    torch.set_num_threads(1)
    began = time.monotonic()
    named = at_once = tried = 0
    print("| mistake | named | at step | by | others that fire | loss curve |\n| --- | --- | --- | --- | --- | --- |")
    for planted in chosen(MISTAKES, wanted):
        outcome = observe(planted)
        found = outcome.named(planted)
        tried += 1
        named += found is not None
        at_once += found is not None and found.step <= 1
        print(row(planted, outcome), flush=True)
    print(f"\n{named} of {tried} named by their cause, {at_once} of them at step 1\n")
    print("| healthy training | false alarms | loss curve |\n| --- | --- | --- |")
    healthy = chosen(HEALTHY, wanted)
    false = 0
    for planted in healthy:
        outcome = observe(planted)
        false += bool(outcome.findings or outcome.error)
        alarms = ", ".join(f"{one.tag} (step {one.step})" for one in outcome.findings)
        print(f"| {planted.name} | {alarms or 'none'}{outcome.error} | {curve(outcome)} |", flush=True)
    print(f"\nfalse alarms in {false} of {len(healthy)} healthy trainings; {time.monotonic() - began:.0f} s in all")
    return 0


def chosen(among: Sequence[Planted], wanted: Sequence[str]) -> list[Planted]:
    """Those whose names contain one of some words; all without a word."""
    return [one for one in among if not wanted or any(word in one.name for word in wanted)]


def row(planted: Planted, outcome: Outcome) -> str:
    found = outcome.named(planted)
    others = ", ".join(f"{one.tag} ({one.step})" for one in outcome.findings if one.tag not in planted.rules)
    step, by = (str(found.step), found.tag) if found else ("", "")
    error = f" [{outcome.error[:80]}]" if outcome.error else ""
    named = "yes" if found else "no"
    return f"| {planted.name} | {named} | {step} | {by} | {others}{error} | {curve(outcome)} |"


def curve(outcome: Outcome) -> str:
    """What people see without telemetry: the loss at first, and the mean of the last five logged."""
    losses = list(outcome.losses.values())
    return f"{losses[0]:.1f} → {statistics.mean(losses[-5:]):.1f}" if losses else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
