"""The Custom Scalars page: one category a question, one chart for what belongs together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

from telemetry.backends.tensorboard.values import strings
from telemetry.charts import HEADLINES, QUESTIONS, Chart, Question, anchored, matcher

FIRST_LOOK = Question("", "First look", tuple(Chart(tag, (tag,)) for tags in HEADLINES for tag in tags))
"""What is looked at first, a chart each, before everything else."""


class Layout:
    """Which charts have data so far.

    An empty chart says nothing, and tags come when they are first measured: the layout is written again whenever a
    chart gets its first tag. TensorBoard shows the last one. Runs that are shown together have their layouts merged,
    chart by chart, so a chart is the same in every run that has it.

    Args:
        questions: what may be shown.
    """

    def __init__(self, questions: Sequence[Question] = (FIRST_LOOK, *QUESTIONS)) -> None:
        self._questions = questions
        self._seen: set[str] = set()
        self._shown: set[Chart] = set()

    def update(self, tags: Iterable[str]) -> Summary.Value | None:
        """The layout, when these scalar tags bring a chart its first data; None when it is as before."""
        new = set(tags) - self._seen
        if not new:
            return None
        self._seen |= new
        charts = {chart for question in self._questions for chart in question.charts} - self._shown
        gained = {chart for chart in charts if any(matcher(one).fullmatch(tag) for tag in new for one in chart.tags)}
        if not gained:
            return None
        self._shown |= gained
        return self._value()

    def forget(self) -> None:
        """The last layout was lost: write it again."""
        self._seen.clear()
        self._shown.clear()

    def _value(self) -> Summary.Value:
        layout = layout_pb2.Layout()
        for question in self._questions:
            charts = [chart for chart in question.charts if chart in self._shown]
            if charts:
                layout.category.append(layout_pb2.Category(title=question.title, chart=map(_multiline, charts)))
        return Summary.Value(
            tag=metadata.CONFIG_SUMMARY_TAG,
            metadata=metadata.create_summary_metadata(),
            tensor=strings([layout.SerializeToString()]),
        )


def _multiline(chart: Chart) -> layout_pb2.Chart:
    lines = layout_pb2.MultilineChartContent(tag=map(anchored, chart.tags))
    return layout_pb2.Chart(title=chart.title, multiline=lines)
