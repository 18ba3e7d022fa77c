"""``python -m telemetry.families > docs/models.md``: which models are read, what is measured of them, and what not."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from telemetry.families import CausalLMFamily, CodecTokensFamily, Family
from telemetry.families.base import registered_families

GUIDE = Path(__file__).parents[2] / "docs" / "strategic_logging.md"
HEAD = """# Models

Made from the families themselves: `python -m telemetry.families > docs/models.md`.

Every model has tensor statistics, gradients and update ratios of its parts, and its own loss (`outputs/loss/model`).
What it predicts is read by its *family*, found by the name of its class, wrapped by DDP, FSDP or PEFT or not. On every
due step the loss that the family adds up is compared with the loss that the model returned: where they differ,
`outputs/loss/total` is withheld, and both numbers are said.

A dash says that a section is absent for this kind of model, with its reason in `telemetry/absent`.
"""
LINE = """## The line to write

For most models none: `StrategicTelemetry()` finds the family. For codec tokens (Orpheus, Llasa, OuteTTS, ...), which
ids are codes cannot be read from the model:

```python
StrategicTelemetry(family=CodecTokens(first=128266, codebooks=7, size=4096, end=128258))
```

`family=` also takes a family of one's own, and `reads("MyModel")` registers one for a class.

## A model of one's own
"""
WITHOUT = """## Without a family

Connectionist temporal classification (Wav2Vec2, HuBERT), classifiers and modules of one's own: tensors, gradients,
updates, and their own loss; `outputs/loss/total` says that no part of it could be read. Bark, VITS and Qwen2.5-Omni's
talker return no loss in transformers: the Trainer cannot train them.

Not tried, for want of a package that runs on transformers 5: Parler-TTS, whose labels lie as MusicGen's:
`reads("ParlerTTSForConditionalGeneration")(MusicgenFamily)`, and the check against its loss says whether that holds.
"""
COLUMNS = (
    "family", "classes of transformers", "predicted (`outputs/`)", "positions (`inputs/`)",
    "layers (`attention/`, `activations/`)", "reference swapped and hidden (`zero_shot/conditioning/`)",
    "speaks (`zero_shot/clips`)",
)  # fmt: skip


def model_reference() -> str:
    """Return the whole document."""
    rows = [_row(family, names) for family, names in _families()]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (COLUMNS, ("---",) * len(COLUMNS), *rows))
    notes = "\n".join(f"- **{family.name}**: {_text(family)}" for family, _ in _families())
    return "\n".join([HEAD, table, "", "## What each reads", "", notes, "", WITHOUT, LINE, _example(), ""])


def _families() -> Iterator[tuple[type[Family], Sequence[str]]]:
    yield from registered_families().items()
    yield CausalLMFamily, ("any other with a text head: causal, masked, encoder-decoder, multimodal",)
    yield CodecTokensFamily, ("any language model, [as declared](#the-line-to-write)",)


def _row(family: type[Family], names: Sequence[str]) -> tuple[str, ...]:
    classes = ", ".join(f"`{name}`" if name.isidentifier() else name for name in names)
    return (
        family.name,
        classes,
        *(_says(family, method) for method in ("streams", "view", "layers")),
        "yes" if family.swap_reference is not Family.swap_reference else "–",
        "yes" if family.speaker is not Family.speaker else "–",
    )


def _says(family: type[Family], method: str) -> str:
    """The first line of what a family says of a method; a dash where it has none of its own."""
    own = getattr(family, method)
    if own is getattr(Family, method):
        return "–"
    return (inspect.getdoc(own) or "").partition("\n")[0].rstrip(".")


def _text(family: type[Family]) -> str:
    """What its docstring says after the first words, in one paragraph, and what says nothing of such models."""
    said = (inspect.getdoc(family) or "").partition("\n\nArgs:")[0]
    said = re.sub(r"\s+", " ", said).replace("``", "`")
    why = "".join(f" No `{tag}`: {reason}." for tag, reason in family.meaningless.items())
    return f"{said}{why}"


def _example() -> str:
    """The family that the guide declares."""
    found = re.findall(r"```python\n.*?```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    return next(code for code in found if "class ParrotFamily" in code)


if __name__ == "__main__":
    sys.stdout.write(model_reference())
