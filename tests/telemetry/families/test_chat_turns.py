"""Turns read back from token ids, and what is wrong with their headers and their order."""

from __future__ import annotations

from typing import Any

import pytest

from telemetry.families.chat import ChatFormat, role_faults


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
