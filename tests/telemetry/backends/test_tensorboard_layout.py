"""The Custom Scalars page as a real TensorBoard serves it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.tensorboard_server import LOADERS, Server, serve
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar import layout_pb2

from telemetry.backends.base import Run
from telemetry.backends.tensorboard import TensorBoardBackend
from telemetry.backends.tensorboard.layout import Layout
from telemetry.catalogue import SECTIONS
from telemetry.charts import Chart, Question
from telemetry.records import Scalar

QUESTIONS = (
    Question("outputs", "What does it say?", (Chart("Loss", ("outputs/loss/{text,audio}",)),)),
    Question("gradients", "Do they flow?", (Chart("Norm", ("gradients/<group>/norm",)), Chart("All", ("a.b", "c")))),
)


def titles(value: Summary.Value | None) -> list[tuple[str, list[str]]]:
    assert value is not None
    layout = layout_pb2.Layout.FromString(value.tensor.string_val[0])
    return [(category.title, [chart.title for chart in category.chart]) for category in layout.category]


def test_only_charts_with_data_are_shown_in_the_declared_order() -> None:
    layout = Layout(QUESTIONS)
    assert layout.update(["gradients/lora/norm", "unknown"]) is not None
    value = layout.update(["outputs/loss/text"])
    assert titles(value) == [("What does it say?", ["Loss"]), ("Do they flow?", ["Norm"])]


def test_it_is_written_again_only_when_a_chart_gets_its_first_data() -> None:
    layout = Layout(QUESTIONS)
    assert layout.update(["outputs/loss/text"]) is not None
    assert layout.update(["outputs/loss/text", "outputs/loss/audio"]) is None
    assert layout.update(["c"]) is not None
    layout.forget()
    assert titles(layout.update(["c"])) == [("Do they flow?", ["All"])]


def test_what_is_looked_at_first_stands_first() -> None:
    value = Layout().update(["outputs/loss/text", "zero_shot/mel_distance", "outputs/loss/total"])
    found = titles(value)
    assert found[0] == ("First look", ["outputs/loss/total", "zero_shot/mel_distance"])
    assert [title for title, _charts in found[1:]] == [SECTIONS["outputs"], SECTIONS["zero_shot"]]


@pytest.mark.parametrize("tag", ["outputs/loss/textual", "x/outputs/loss/text", "outputs/loss/text\n", "a_b", "axb"])
def test_tags_are_matched_whole_and_as_they_are(tag: str) -> None:
    assert Layout(QUESTIONS).update([tag]) is None


def write(directory: Path, steps: Sequence[dict[str, float]]) -> None:
    backend = TensorBoardBackend()
    backend.open(Run(directory))
    for step, values in enumerate(steps, 1):
        backend.write(step, [Scalar(tag, value) for tag, value in values.items()])
    backend.close()


def charts(server: Server) -> dict[str, list[str]]:
    """Chart → its regular expressions, over all categories; a chart stands there once."""
    layout = server.json("plugin/custom_scalars/layout")
    found = [(chart["title"], chart["multiline"]["tag"]) for group in layout["category"] for chart in group["chart"]]
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_server_shows_every_chart_with_exactly_its_tags(tmp_path: Path, loader: str) -> None:
    first = {f"outputs/loss/codebook_{k}": 1.0 for k in (0, 1, 11)} | {"outputs/loss/text": 1.0, "train/loss": 2.0}
    later = {"gradients/lora/norm": 1.0, "gradients/layer_0/text_ffn/norm": 1.0, "train/loss": 2.0}
    write(tmp_path / "one", [first, later])
    write(tmp_path / "two", [first, later, {"zero_shot/wer": 0.5}])
    with serve(tmp_path, loader) as server:
        server.wait_for(
            lambda: server.scalars("zero_shot/wer", "two") == [(3, 0.5)] and "Loss by part" in charts(server)
        )
        shown = charts(server)
        assert "Word and character error rate" in shown  # of one run, beside what both have
        matched = {}
        for title, regexes in shown.items():
            answers = [server.json("plugin/custom_scalars/scalars", run="two", tag=regex) for regex in regexes]
            assert all(answer["regex_valid"] for answer in answers)
            matched[title] = {tag for answer in answers for tag in answer["tag_to_events"]}
        assert all(matched.values())
        assert matched["Loss by codebook"] == {f"outputs/loss/codebook_{k}" for k in (0, 1, 11)}
        assert matched["Loss by part"] == {"outputs/loss/text"}
        assert matched["Gradient norm by part of the model"] == {"gradients/lora/norm"}
        assert all(re.match(r"\^.*\$$", regex) for regexes in shown.values() for regex in regexes)
