"""``python -m telemetry.health > docs/health.md``: every rule, as people read it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from telemetry.health.rulebook import RULES
from telemetry.health.rules import Rule

_HEAD = """# Health: what is wrong, in one line

Generated from the rules: `python -m telemetry.health > docs/health.md`.

Each rule is a value `health/<rule>`, 0 (ok), 1 (warning) or 2 (failing), and a row of `health/checks`, with its
evidence, what to do and what else it could be. It judges recorded values alone, on rank 0 in the background: it costs
the training nothing. A rule without values to judge is left out. Verdicts come at due steps and evaluations, and in
between where something has become worse; each worsening is one alert ([told when it matters](alerts.md)). Where several
fire, the root is alerted, and the others say what they follow from.

## Limits and rules of your own

`--health_rules FILE`, `StrategicTelemetry(health_rules=...)` with a path or a mapping. YAML or JSON; a name that is not
below is a rule of your own, in one line:

```yaml
loss_steady: {times: 5}                      # another limit
reference_used: off                          # a rule that is not wanted
words: zero_shot/wer > 0.5 : failing         # a value; a warning without ": failing"
drop: outputs/accuracy/audio change < -20%   # against the median of the 20 values before it
spike: train/grad_norm z > 6 over 50         # in standard deviations of the 50 values before it
quiet: gradients/*/norm < 1e-8               # of every tag that matches
```

What cannot be read is refused before training.

## Rules
"""


def reference() -> str:
    """Return the whole document."""
    return "\n".join([_HEAD, *(line for rule in RULES for line in _rule(rule))])


def _rule(rule: Rule) -> Iterator[str]:
    yield f"### `{rule.tag}`: {rule.title}\n"
    yield f"- Where it fires: *{rule.fault}*."
    yield f"- What to do: {rule.advice}."
    if rule.otherwise:
        yield f"- What else it could be: {rule.otherwise}."
    if rule.limits:
        yield f"- Limits: {', '.join(f'`{name}` {value:g}' for name, value in rule.limits.items())}."
    if rule.follows:
        yield f"- No finding of its own where one of these fires: {', '.join(f'`{name}`' for name in rule.follows)}."
    yield f"- Absent: {rule.absent}."
    yield f"- Known by: {rule.proof}.\n"


if __name__ == "__main__":
    sys.stdout.write(reference())
