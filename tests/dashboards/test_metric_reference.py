from __future__ import annotations

from pathlib import Path

from dashboards.metric_reference import metric_reference
from telemetry.catalogue import CATALOGUE

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_document_is_the_catalogue_of_today() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == metric_reference()


def test_every_entry_is_in_the_document_with_its_meaning() -> None:
    lines = metric_reference().splitlines()
    for entry in CATALOGUE:
        assert any(f"`{entry.tag}`" in line and entry.meaning in line for line in lines), entry.tag
