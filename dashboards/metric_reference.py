"""The metric reference: every tag of the catalogue as a Markdown document."""

from __future__ import annotations

from collections.abc import Iterator

from telemetry.catalogue import CATALOGUE, SECTIONS

_HEAD = """# Metric reference

Generated from the catalogue: `python -m dashboards metrics > docs/metrics.md`. Tags are a public interface. `<k>`,
`<l>`, `<i>` are numbers, `<name>` and `<group>` names, `{a,b}` one of several. What cannot be measured is left out,
never zero.
A tag listed here may wait for a later release: what a run has measured is what its dashboard shows.
"""


def metric_reference() -> str:
    """The whole document."""
    return "\n".join([_HEAD, *_sections()])


def _sections() -> Iterator[str]:
    for section, question in SECTIONS.items():
        yield f"## `{section}/`\n\n{question}\n"
        yield "| tag | shown as | meaning | unit | combined over microbatches and ranks | better | absent when |"
        yield "| --- | --- | --- | --- | --- | --- | --- |"
        for entry in CATALOGUE:
            if section in entry.section.strip("{}").split(","):
                said = (entry.kind, entry.meaning, entry.unit, entry.reduction, entry.better or "", entry.absent)
                yield f"| `{entry.tag}` | {' | '.join(said)} |"
        yield ""
