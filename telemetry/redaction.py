"""Takes secrets out of what is about to be shown: the one place that decides what a secret is.

Three things give a secret away: the name that it goes by (``hub_token``, ``--password``, ``AWS_SECRET_ACCESS_KEY``),
its form (``hf_...``, ``Bearer ...``, a password in a URL), and being the value of an environment variable with such a
name.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

REDACTED = "<redacted>"
_SHORTEST = 8  # characters of a variable's value that is looked for in other texts: shorter ones are words

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_SECRET_WORDS = frozenset(
    {"password", "passwords", "passwd", "passphrase", "secret", "secrets", "credential", "credentials", "apikey"}
    | {"authorization"}
)
_KINDS_OF_KEY = frozenset({"api", "access", "private", "secret", "auth", "account", "ssh", "signing", "encryption"})
_PLACES = frozenset({"path", "file", "dir", "directory"})  # where a secret is, which is none
# Tokens of a vocabulary, which are no secrets: ``eos_token``, ``audio_bos_token``.
_VOCABULARY = frozenset(
    {"bos", "eos", "pad", "unk", "mask", "sep", "cls", "start", "end", "stop", "special", "delay"}
    | {"text", "audio", "image", "video", "boi", "eoi", "prompt"}
)
_FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|wandb_v\d+_[A-Za-z0-9_]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{20,}|xox[abprs]-[A-Za-z0-9-]{10,}|AKIA[0-9A-Z]{16}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*)"
)
_BEARER = re.compile(r"(?i)\b(bearer|basic) +[A-Za-z0-9._~+/=-]{8,}")
_USER_OF_URL = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_ASSIGNMENT = re.compile(r"""([A-Za-z][\w.-]*)(["']?\s*[=:]\s*)("[^"]*"|'[^']*'|[^\s"'&;,]+)""")

ValueT = TypeVar("ValueT")


def redact(value: ValueT, name: str = "", environment: Mapping[str, str] | None = None) -> ValueT:
    """A configuration without its secrets: the same nesting of mappings, lists, tuples and plain values.

    Args:
        value: what is to be shown; it is not changed.
        name: what the value goes by.
        environment: whose secret values are looked for too; by default the process's.
    """
    found: Any = _redact(value, name, _secrets(os.environ if environment is None else environment))
    return found


def redact_arguments(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> list[str]:
    """A command line without its secrets: of ``--hub_token VALUE``, ``--password=VALUE`` and values given away else."""
    secrets = _secrets(os.environ if environment is None else environment)
    redacted = []
    option = ""
    for argument in arguments:
        is_option = argument.startswith("-")
        redacted.append(_redact(argument, "" if is_option else option, secrets))
        option = argument.lstrip("-") if is_option and "=" not in argument else ""
    return redacted


def is_secret_name(name: str) -> bool:
    """Whether what goes by this name is a secret, should it be a text."""
    words = [word.lower() for word in _WORDS.findall(name)]
    if not words or words[-1] in _PLACES:
        return False
    if _SECRET_WORDS & set(words):
        return True
    if any(first in _KINDS_OF_KEY and second == "key" for first, second in itertools.pairwise(words)):
        return True
    return words[-1] == "token" and not _VOCABULARY & set(words)


def _redact(value: Any, name: str, secrets: Iterable[str]) -> Any:
    if isinstance(value, Mapping):
        return {_plain_text(key): _redact(held, str(key), secrets) for key, held in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_redact(held, name, secrets) for held in value]
    if value is None or isinstance(value, bool):
        return value
    # Numbers under such names count or index tokens.
    is_number_of_token = name.lower().endswith("token") and not isinstance(value, str | bytes)
    if is_secret_name(name) and not is_number_of_token:
        return REDACTED if value not in ("", b"") else value
    if isinstance(value, int | float):
        return value
    return _redact_text(value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value), secrets)


def _redact_text(text: str, secrets: Iterable[str]) -> str:
    text = _plain_text(text)
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    text = _USER_OF_URL.sub(REDACTED, text)
    text = _BEARER.sub(rf"\1 {REDACTED}", text)
    text = _FORMS.sub(REDACTED, text)
    return _ASSIGNMENT.sub(_redact_assignment, text)


def _plain_text(value: object) -> str:
    """A value as text that any encoder takes: bytes of an argument that are not UTF-8 are shown with backslashes."""
    return str(value).encode("utf-8", "backslashreplace").decode()


def _redact_assignment(match: re.Match[str]) -> str:
    name, between, value = match.groups()
    quote = value[0] if value[0] in "\"'" else ""
    if not is_secret_name(name) or value.strip(quote or None).startswith("<"):
        return match[0]
    return f"{name}{between}{quote}{REDACTED}{quote}"


def _secrets(environment: Mapping[str, str]) -> list[str]:
    """Values of variables with a secret's name, long ones first: one may hold another."""
    held = {value for name, value in environment.items() if len(value) >= _SHORTEST and is_secret_name(name)}
    return sorted(held, key=len, reverse=True)
