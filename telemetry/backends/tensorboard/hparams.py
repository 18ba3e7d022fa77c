"""A run's configuration as TensorBoard's HParams page takes it, in the run's own file."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

HParam = bool | float | str


def session_start(config: Mapping[str, Any], defaults: Collection[str], started: float) -> Summary.Value:
    """The value that opens a session.

    Args:
        config: nested settings. All of them are kept, as JSON, in the value's description, for other readers.
        defaults: dotted names that the page leaves out: two hundred columns compare nothing.
        started: in seconds since the epoch.
    """
    info = plugin_data_pb2.SessionStartInfo(start_time_secs=started)
    for name, hparam in flatten(config).items():
        if name in defaults:
            continue
        value = info.hparams[name]
        if isinstance(hparam, bool):
            value.bool_value = hparam
        elif isinstance(hparam, str):
            value.string_value = hparam
        else:
            value.number_value = hparam
    value = _value(metadata.SESSION_START_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_start_info=info))
    value.metadata.summary_description = json.dumps(flatten(config), ensure_ascii=False)
    return value


def session_end(ended: float) -> Summary.Value:
    """The value that closes a session. Its status stays unknown: a writer that is closed cannot tell why."""
    info = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_UNKNOWN, end_time_secs=ended)
    return _value(metadata.SESSION_END_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_end_info=info))


def flatten(config: Mapping[str, Any]) -> dict[str, HParam]:
    """Nested settings under dotted names. Lists are JSON, None is left out, NaN and infinities are strings."""
    return dict(_flatten(config, ""))


def _flatten(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, HParam]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", _hparam(value)


def _hparam(value: Any) -> HParam:
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        return float(value) if math.isfinite(value) else str(value)  # the page's JSON has no NaN and no infinity
    return json.dumps(value, ensure_ascii=False, default=str)


def _value(tag: str, data: plugin_data_pb2.HParamsPluginData) -> Summary.Value:
    return Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR)
