"""The model reference is that of the families as they are."""

from pathlib import Path

from dashboards.model_reference import model_reference

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_document_is_up_to_date() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == model_reference()
