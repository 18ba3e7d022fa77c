"""The fields of a sample of the data file and their types, checked by pydantic, in the project's own sentences."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PlainValidator, StrictInt, ValidationError
from pydantic_core import PydanticKnownError

Role: TypeAlias = Literal["system", "user", "assistant"]
Fault: TypeAlias = tuple[str, str, str]  # the field's JSON path in the sample, what is wrong, what to do


def _as_items(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticKnownError("float_type")
    return value  # as it is: JSON allows integers that no float can hold


_Number: TypeAlias = Annotated[int | float, PlainValidator(_number)]
_OptionalText: TypeAlias = Annotated[str | None, AfterValidator(lambda text: text if text and text.strip() else None)]


class TextFields(BaseModel):
    type: Literal["text"]
    text: str


class AudioFields(BaseModel):
    type: Literal["audio"]
    audio_url: str
    duration: _Number | None = None


_Items: TypeAlias = list[Annotated[TextFields | AudioFields, Field(discriminator="type")]]


class MessageFields(BaseModel):
    role: Role
    content: Annotated[_Items, Field(min_length=1), BeforeValidator(_as_items)]


class MiscFields(BaseModel):
    sample_id: _OptionalText = None
    ref_transcript: _OptionalText = None
    target_transcript: _OptionalText = None
    duration: _Number | None = None
    language: _OptionalText = None


class SampleFields(BaseModel):
    messages: Annotated[list[MessageFields], Field(min_length=1)]
    start_index: StrictInt | None = None
    speaker: _OptionalText = None
    misc: MiscFields | None = None


_CONTENT_MEND = 'Give a string, or a list of {"type": "text", ...} and {"type": "audio", ...} objects.'
# The last name of a field's path, with [] for an item of a list: what it must be, and what to do.
_WANTED: dict[str, tuple[str, str]] = {
    "": ("an object", 'A sample is an object {"messages": [...]}.'),
    "messages": ("a list", "Give a list with at least one user and one assistant message."),
    "messages[]": ("an object", 'A message is {"role": ..., "content": ...}.'),
    "role": ("a string", f"Use one of {', '.join(get_args(Role))}."),
    "content": ("a string or a list", _CONTENT_MEND),
    "content[]": ("an object", _CONTENT_MEND),
    "type": ("a string", "Use text or audio."),
    "text": ("a string", "Give the text as a string."),
    "audio_url": ("a string", "Give the path of the audio file."),
    "duration": ("a number", "Give seconds as a number, or leave it out."),
    "start_index": ("a whole number", "Use 0 to supervise every answer."),
    "misc": ("an object", "Make it an object, or leave it out."),
}
_WANTED_ELSE = ("a string", "Put it in quotes, or leave it out.")
_UNKNOWN = {"role": "role", "type": "content type"}


def validate(raw: Any) -> tuple[SampleFields | None, list[Fault]]:
    """A sample whose fields all have the right types, or what is wrong with them."""
    try:
        return SampleFields.model_validate(raw), []
    except ValidationError as error:
        return None, [_sentence(fault["type"], fault["loc"], fault["input"]) for fault in error.errors()]


def _sentence(kind: str, loc: tuple[int | str, ...], value: Any) -> Fault:
    """One of pydantic's errors in the words of this project."""
    parts = [*loc[:4], *loc[5:]]  # the fifth part is the item's type, which is no field
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        parts.append("type")
        kind, value = ("literal_error", value["type"]) if "type" in value else ("missing", None)
    name = f"{parts[-2]}[]" if parts and isinstance(parts[-1], int) else str(parts[-1]) if parts else ""
    wanted, mend = _WANTED.get(name, _WANTED_ELSE)
    if kind == "missing":
        what = "is missing"
    elif kind == "too_short":
        what = "is an empty list"
    elif name in _UNKNOWN and isinstance(value, str):
        what = f"unknown {_UNKNOWN[name]} {value!r}"
    else:
        what = f"is {kind_of(value)}, not {wanted}"
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return where.lstrip("."), what, mend


def kind_of(value: Any) -> str:
    """What JSON calls a value, with its article."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}[type(value)]
