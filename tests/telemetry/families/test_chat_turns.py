"""Turns read back from token ids, and what is wrong with their headers and their order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from telemetry.families.chat import ChatFormat, decoded, role_faults
from telemetry.instruments.inputs import _text
from telemetry.instruments.outputs import _prediction_rows


def turn(role: str, text: str = "hello") -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"


def read(tokenizer: Any, text: str) -> tuple[list[tuple[str, str, str]], dict[str, list[str]]]:
    """Role, whole text and body of each turn, and the faults by kind."""
    chat = ChatFormat.of(tokenizer)
    assert chat is not None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    turns, faults = chat.turns(ids, tokenizer)
    shown = [
        (turn.role, tokenizer.decode(ids[turn.start : turn.end]), tokenizer.decode(ids[turn.body : turn.end]))
        for turn in turns
    ]
    return shown, {kind: found for kind, found in faults.items() if found}


def test_turns_are_read_back(tokenizer: Any) -> None:
    text = "<|begin_of_text|>" + turn("system", "Be kind.") + turn("user", "") + turn("assistant", "Yes,\nنعم")
    turns, faults = read(tokenizer, text)
    assert faults == {}
    assert turns == [
        ("system", turn("system", "Be kind."), "\n\nBe kind.<|eot_id|>"),
        ("user", turn("user", ""), "\n\n<|eot_id|>"),
        ("assistant", turn("assistant", "Yes,\nنعم"), "\n\nYes,\nنعم<|eot_id|>"),
    ]


@pytest.mark.parametrize(
    ("text", "roles", "kind", "fault"),
    [
        ("<|start_header_id|>user hello<|eot_id|>", [], "header", "no <|end_header_id|> after token 0"),
        ("<|start_header_id|>user" + turn("assistant"), ["assistant"], "header", "no <|end_header_id|> after token 0"),
        (
            "<|start_header_id|>user<|end_header_id|>\n\nhello",
            ["user"],
            "end_of_turn",
            "the user turn at token 0 has no <|eot_id|>",
        ),
        (
            turn("user") + "hello<|end_header_id|>",
            ["user"],
            "header",
            "1 <|end_header_id|> without a <|start_header_id|>",
        ),
        (
            "<|start_header_id|>user<|end_header_id|>hello" + turn("assistant"),
            ["user", "assistant"],
            "end_of_turn",
            "the user turn at token 0 has no <|eot_id|>",
        ),
    ],
)
def test_headers_that_do_not_balance(tokenizer: Any, text: str, roles: list[str], kind: str, fault: str) -> None:
    turns, faults = read(tokenizer, text)
    assert [role for role, *_ in turns] == roles
    assert faults == {kind: [fault]}


def test_text_without_headers_has_no_turns(tokenizer: Any) -> None:
    assert read(tokenizer, "hello") == ([], {})
    assert read(tokenizer, "") == ([], {})


def test_a_tokenizer_without_header_tokens_has_no_format() -> None:
    class Plain:
        unk_token_id = 0

        def convert_tokens_to_ids(self, name: str) -> int:
            return 7 if name == "<|eot_id|>" else self.unk_token_id

    class Unknowing:
        def convert_tokens_to_ids(self, name: str) -> None:
            return None

    assert ChatFormat.of(Plain()) is None
    assert ChatFormat.of(Unknowing()) is None
    assert ChatFormat.of(None) is None


@pytest.mark.parametrize(
    ("roles", "faults"),
    [
        ("user assistant", []),
        ("system user assistant", []),
        ("system user assistant user assistant", []),
        ("", ["no turn at all"]),
        ("user", ["ends with user, not assistant"]),
        ("system", ["ends with system, not assistant"]),
        ("assistant", ["assistant, expected user and assistant in turn"]),
        ("assistant user", ["assistant → user, expected user and assistant in turn", "ends with user, not assistant"]),
        ("user user assistant", ["user → user → assistant, expected user and assistant in turn"]),
        ("user system assistant", ["a system turn that is not the first"]),
        ("system system user assistant", ["a system turn that is not the first"]),
        ("user narrator assistant", ["unknown role 'narrator'"]),
    ],
)
def test_the_order_of_roles(tokenizer: Any, roles: str, faults: list[str]) -> None:
    chat = ChatFormat.of(tokenizer)
    assert chat is not None
    text = "".join(turn(role) for role in roles.split())
    turns, _ = chat.turns(tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer)
    assert role_faults(turns) == faults


class Strict:
    """A tokenizer of three words that raises whatever tokenizers raise, each in its own way."""

    def decode(self, ids: list[int]) -> Any:
        for one in ids:
            if one < 0:
                raise OverflowError("can't convert negative int to unsigned")
            if one == 7:
                raise RuntimeError("panicked")
        words = [("a", "b ", "\ud800\x00\u202e", None)[one] for one in ids]  # IndexError beyond the vocabulary
        return "".join(words)  # type: ignore[arg-type]  # TypeError for a token without text


def test_what_a_tokenizer_cannot_decode_is_shown_by_its_number() -> None:
    assert decoded(Strict(), [0, 1, 0]) == "ab a"
    assert decoded(Strict(), [0, -5, 1, 10**12, 3, 7]) == "a<-5>b <1000000000000><3><7>"
    assert decoded(Strict(), []) == ""
    assert _text([0, *[99] * 5, -1], Strict()) == "a<99>×5 <-1>"
    rows = list(_prediction_rows("text", "text", torch.tensor([[0, 1, 0], [-2, 99, 0], [3, 2, 1]]), Strict()))
    assert [row[3:] for row in rows] == [("a<-2><3>", "b <99>\ud800\x00\u202e"), ("0 -2 3", "1 99 2")]


def test_real_tokenizers_decode_what_lies_outside_of_them() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    assert decoded(tokenizer, [0, 1]) == tokenizer.decode([0, 1])
    for ids in ([0, -1], [0, 2**31], [0, 2**40], [5], [-(2**63)]):
        assert "a" in decoded(tokenizer, ids) or ids[0] != 0
