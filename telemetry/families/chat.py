"""The turns of a ChatML conversation, read back from its token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turn:
    """One turn: ``ids[start:end]`` with its header and end-of-turn; ``ids[body:end]`` without the header."""

    role: str
    start: int
    body: int
    end: int


@dataclass(frozen=True)
class ChatFormat:
    """The special tokens around roles and turns (``<|start_header_id|>role<|end_header_id|> ... <|eot_id|>``)."""

    header_start: int
    header_end: int
    turn_end: int

    @classmethod
    def of(cls, tokenizer: Any) -> ChatFormat | None:
        """The format of a tokenizer that has all three tokens, else None."""
        convert = getattr(tokenizer, "convert_tokens_to_ids", None)
        if convert is None:
            return None
        names = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        ids = [convert(name) for name in names]
        if any(index is None or index == getattr(tokenizer, "unk_token_id", None) for index in ids):
            return None
        return cls(*ids)

    def turns(self, ids: Sequence[int], tokenizer: Any) -> tuple[list[Turn], dict[str, list[str]]]:
        """Turns of a sequence, and what is wrong with its headers and turn ends (nothing when they balance)."""
        turns: list[Turn] = []
        faults: dict[str, list[str]] = {"header": [], "end_of_turn": []}
        starts = [position for position, token in enumerate(ids) if token == self.header_start]
        for start, following in pairwise([*starts, len(ids)]):
            header_end = _find(ids, self.header_end, start, following)
            if header_end is None:
                faults["header"].append(f"no <|end_header_id|> after token {start}")
                continue
            role = decoded(tokenizer, ids[start + 1 : header_end]).strip()
            end = _find(ids, self.turn_end, header_end, following)
            if end is None:
                faults["end_of_turn"].append(f"the {role} turn at token {start} has no <|eot_id|>")
            turns.append(Turn(role, start, header_end + 1, following if end is None else end + 1))
        stray = sum(token == self.header_end for token in ids) - len(turns)
        if stray > 0:
            faults["header"].append(f"{stray} <|end_header_id|> without a <|start_header_id|>")
        return turns, faults


def role_faults(turns: Sequence[Turn]) -> list[str]:
    """What is wrong with the order of roles: an optional system turn, then user and assistant in turn."""
    roles = [turn.role for turn in turns]
    if not roles:
        return ["no turn at all"]
    faults = [f"unknown role {role!r}" for role in roles if role not in ROLES]
    talk = roles[1:] if roles[0] == "system" else roles
    if "system" in talk:
        faults.append("a system turn that is not the first")
    expected = ["user", "assistant"] * (len(talk) // 2 + 1)
    wrong = next((at for at, (role, due) in enumerate(zip(talk, expected, strict=False)) if role != due), None)
    if wrong is not None and talk[wrong] in ("user", "assistant"):
        faults.append(f"{' → '.join(roles)}, expected user and assistant in turn")
    if roles[-1] != "assistant":
        faults.append(f"ends with {roles[-1]}, not assistant")
    return faults


def _find(ids: Sequence[int], token: int, start: int, stop: int) -> int | None:
    return next((position for position in range(start, stop) if ids[position] == token), None)


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of tokens, special ones included; one that the tokenizer cannot decode is shown as ``<number>``.

    Labels and predictions may lie outside the tokenizer: models have padded vocabularies, and data have faults.
    """
    try:
        text = tokenizer.decode(ids)
        if isinstance(text, str):
            return text
    except Exception:  # noqa: BLE001  (tokenizers raise whatever their backend does)
        pass
    if len(ids) == 1:
        return f"<{ids[0]}>"
    return "".join(decoded(tokenizer, [one]) for one in ids)
