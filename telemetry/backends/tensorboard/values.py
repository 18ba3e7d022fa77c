"""One record as one value of a TensorBoard summary, still without tag and description.

Layouts are those of ``tensorboard.plugins.*.summary_v2``: text is one string; audio is ``[clips, 2]`` strings (WAV,
label); an image is ``[width, height, PNG]``. A scalar is a ``simple_value``: the default data server does not show
double-precision tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tensorboard.compat.proto import types_pb2
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.audio import metadata as audio_metadata
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.plugins.scalar import metadata as scalar_metadata
from tensorboard.plugins.text import metadata as text_metadata

from telemetry.backends.encoding import Wav, encode_png
from telemetry.backends.tensorboard.markdown import escape
from telemetry.records import Image


def scalar_value(tag: str, value: float) -> Summary.Value:
    """A number, NaN and infinities as they are."""
    return Summary.Value(tag=tag, simple_value=value)


def scalar_description(tag: str, description: str) -> Summary.Value:
    """A value without a number that describes a scalar tag.

    The default data server reads the description of a number that is a tensor or of no number at all, and other
    readers take numbers from ``simple_value`` only: so the two go apart.
    """
    return Summary.Value(tag=tag, metadata=scalar_metadata.create_summary_metadata(None, description))


def text_value(markdown: str, data: Mapping[str, Any]) -> Summary.Value:
    """A text that TensorBoard renders as Markdown, and what it says as JSON for programs that read the file.

    The JSON is in the plugin's data, in a field (2) that TensorBoard's ``TextPluginData`` lacks and passes over.
    """
    metadata = text_metadata.create_summary_metadata(None, None)
    said = SummaryMetadata.PluginData(content=json.dumps(data, ensure_ascii=False).encode())
    metadata.plugin_data.content = said.SerializeToString()
    return Summary.Value(metadata=metadata, tensor=strings([markdown.encode()]))


def audio_value(wavs: Sequence[Wav]) -> Summary.Value:
    """Clips side by side. TensorBoard keeps the labels in the file and does not show them."""
    parts = [part for wav in wavs for part in (wav.data, escape(wav.label).encode())]
    metadata = audio_metadata.create_summary_metadata(None, None, audio_metadata.Encoding.Value("WAV"))
    return Summary.Value(metadata=metadata, tensor=strings(parts, len(wavs), 2))


def image_value(image: Image) -> Summary.Value:
    """A picture. Raises what :func:`telemetry.backends.encoding.encode_png` raises."""
    png = encode_png(image.pixels)
    height, width = image.pixels.shape[:2]
    parts = [str(width).encode(), str(height).encode(), png]
    return Summary.Value(metadata=image_metadata.create_summary_metadata(None, None), tensor=strings(parts, 3))


def strings(values: list[bytes], *shape: int) -> TensorProto:
    """Strings of bytes as a tensor; without a shape, one string."""
    sizes = TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in shape])
    return TensorProto(dtype=types_pb2.DT_STRING, tensor_shape=sizes, string_val=values)
