"""The Custom Scalars page: one category a question, one chart for what belongs together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tensorboard.compat.proto import types_pb2
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

from telemetry.charts import QUESTIONS, Chart, Question, anchored, matcher


class Layout:
    """Which charts have data so far.

    An empty chart says nothing, and tags come when they are first measured: the layout is written again whenever a
    chart gets its first tag. TensorBoard shows the last one. Runs that are shown together have their layouts merged,
    chart by chart, so a chart is the same in every run that has it.

    Args:
        questions: what may be shown.
    """

    def __init__(self, questions: Sequence[Question] = QUESTIONS) -> None:
        self._questions = questions
        self._seen: set[str] = set()
        self._shown: set[Chart] = set()

    def update(self, tags: Iterable[str]) -> Summary.Value | None:
        """The layout, when these scalar tags bring a chart its first data; None when it is as before."""
        new = set(tags) - self._seen
        self._seen |= new
        gained = {chart for chart in self._charts() - self._shown if _has_data(chart, new)}
        if not gained:
            return None
        self._shown |= gained
        return self._value()

    def forget(self) -> None:
        """The last layout was lost: write it again."""
        self._seen.clear()
        self._shown.clear()

    def _charts(self) -> set[Chart]:
        return {chart for question in self._questions for chart in question.charts}

    def _value(self) -> Summary.Value:
        layout = layout_pb2.Layout()
        for question in self._questions:
            charts = [chart for chart in question.charts if chart in self._shown]
            if charts:
                layout.category.append(layout_pb2.Category(title=question.title, chart=map(_multiline, charts)))
        return Summary.Value(
            tag=metadata.CONFIG_SUMMARY_TAG,
            metadata=metadata.create_summary_metadata(),
            tensor=TensorProto(
                dtype=types_pb2.DT_STRING, string_val=[layout.SerializeToString()], tensor_shape=TensorShapeProto()
            ),
        )


def _has_data(chart: Chart, tags: Iterable[str]) -> bool:
    return any(matcher(pattern).fullmatch(tag) for tag in tags for pattern in chart.tags)


def _multiline(chart: Chart) -> layout_pb2.Chart:
    lines = layout_pb2.MultilineChartContent(tag=map(anchored, chart.tags))
    return layout_pb2.Chart(title=chart.title, multiline=lines)
