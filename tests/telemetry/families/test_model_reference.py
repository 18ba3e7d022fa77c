"""The model reference is that of the families as they are."""

from pathlib import Path

from telemetry.families.__main__ import model_reference

DOCUMENT = Path(__file__).parents[3] / "docs" / "models.md"


def test_the_document_is_up_to_date() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == model_reference()
