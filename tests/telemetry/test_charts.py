"""Charts name tags of the catalogue, and every section with scalars has one."""

from __future__ import annotations

import re

import pytest

from telemetry.catalogue import CATALOGUE, SECTIONS, find
from telemetry.charts import QUESTIONS, Chart, anchored, expanded, matcher

CHARTS = [(question.section, chart) for question in QUESTIONS for chart in question.charts]
CATCH_ALL = re.compile(r"(?:[^/]+|\{[^}]+\})/<name>")


def example(tag: str) -> str:
    """A tag that a pattern without alternatives stands for."""
    return re.sub(r"<(\w+)>", lambda match: "0" if len(match[1]) == 1 else "some", tag)


@pytest.mark.parametrize(("section", "chart"), CHARTS, ids=[chart.title for _, chart in CHARTS])
def test_every_tag_of_a_chart_is_a_scalar_of_the_catalogue(section: str, chart: Chart) -> None:
    assert chart.tags
    for tag in (whole for pattern in chart.tags for whole in expanded(pattern)):
        entry = find(example(tag))
        assert entry is not None, tag
        assert entry.kind == "scalar", tag
        if not CATCH_ALL.fullmatch(tag):
            assert not CATCH_ALL.fullmatch(entry.tag), f"{tag} is in no line of the catalogue but {entry.tag}"


def test_every_section_with_scalars_has_a_chart_of_its_own_tags() -> None:
    sections = {
        part for entry in CATALOGUE if entry.kind == "scalar" for part in entry.section.strip("{}").split(",")
    } & set(SECTIONS)
    charted = {
        question.section
        for question in QUESTIONS
        if any(tag.startswith(f"{question.section}/") for chart in question.charts for tag in chart.tags)
    }
    assert charted == sections


def test_questions_are_those_of_the_catalogue_in_its_order() -> None:
    assert [(question.section, question.title) for question in QUESTIONS] == list(SECTIONS.items())


def test_titles_tell_charts_apart() -> None:
    titles = [chart.title for _, chart in CHARTS]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("train/loss", ["train/loss"], ["train/loss_extra", "a/train/loss", "train-loss"]),
        ("outputs/loss/codebook_<k>", ["outputs/loss/codebook_11"], ["outputs/loss/codebook_", "outputs/loss/text"]),
        ("gradients/<group>/norm", ["gradients/lora/norm"], ["gradients/layer_0/lora/norm", "gradients/total_norm"]),
        ("a/{b,c_<k>}.d", ["a/b.d", "a/c_3.d"], ["a/bxd", "a/c.d"]),
    ],
)
def test_an_anchored_pattern_is_for_exactly_its_tags(pattern: str, matching: list[str], others: list[str]) -> None:
    assert [tag for tag in matching + others if re.match(anchored(pattern), tag)] == matching
    assert [tag for tag in [*matching, *others, matching[0] + "\n"] if matcher(pattern).fullmatch(tag)] == matching


def test_alternatives_are_expanded_in_their_order() -> None:
    assert expanded("a/{b,c}/{d,e_<k>}") == ["a/b/d", "a/b/e_<k>", "a/c/d", "a/c/e_<k>"]
