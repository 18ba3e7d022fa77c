"""Takes secrets out of what is about to be shown: the one place that decides what a secret is.

Four things give a secret away: the name that it goes by (``hub_token``, ``--password``, ``AWS_SECRET_ACCESS_KEY``), its
form (``hf_...``, ``Bearer ...``, a private key), its place in a URL (a password, a signature, a webhook), and being the
value of an environment variable with such a name. A name that may also stand for something harmless (``sort_key``)
makes a secret only of what looks drawn at random.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote, quote_plus

REDACTED = "<redacted>"
_SHORTEST = 8  # characters of a variable's value that is looked for in other texts: shorter ones are words
_LONGEST_DOUBTFUL = 500
_DEEPEST = 50  # a nesting that goes deeper is shown as text: it may hold itself

# -- names ------------------------------------------------------------------------------------------------------------

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_ADDRESSES = ["alert", "to"]  # where alerts go: one or several addresses that hold secrets
_IN_ANY_WORD = ("password", "passwd", "passphrase", "apikey")
_SECRET_WORDS = frozenset(
    {"secret", "secrets", "credential", "credentials", "cred", "creds", "authorization", "passcode", "jwt", "bearer"}
    | {"cookie", "cookies", "webhook", "webhooks", "otp", "totp"}
)
_KINDS_OF_KEY = frozenset(
    {
        "api",
        "access",
        "private",
        "secret",
        "auth",
        "account",
        "ssh",
        "signing",
        "encryption",
        "deploy",
        "master",
        "shared",
    }
)
# Who hands keys, tokens and passwords out.
_SERVICES = frozenset(
    {
        "ai21",
        "anthropic",
        "assemblyai",
        "aws",
        "azure",
        "clearml",
        "cohere",
        "comet",
        "dashscope",
        "deepgram",
        "deepseek",
    }
    | {"discord", "docker", "elevenlabs", "gcp", "gemini", "gh", "github", "gitlab", "google", "groq", "hf", "hub"}
    | {"huggingface", "jira", "kaggle", "minio", "mistral", "neptune", "ngc", "npm", "nvidia", "openai", "openrouter"}
    | {
        "pypi",
        "registry",
        "replicate",
        "s3",
        "sendgrid",
        "sentry",
        "slack",
        "storage",
        "stripe",
        "telegram",
        "together",
    }
    | {
        "twilio",
        "vault",
        "wandb",
        "wb",
        "xai",
        "db",
        "database",
        "mongo",
        "mongodb",
        "mysql",
        "pg",
        "postgres",
        "redis",
    }
    | {"sql", "smtp", "imap", "ftp", "sftp", "ldap", "proxy", "service", "admin", "root", "api", "auth", "access"}
    | {"refresh", "session", "oauth", "bot", "personal", "secret", "client"}
)
_LOGINS = _SERVICES | {"user", "mail", "email", "login", "http", "https", "my", "key", "cert", "ssl", "ssh"}
# What may be written together with one of those: ``hubtoken``, ``dbpass``.
_ENDINGS = ("tokens", "token", "keys", "key", "pass", "pwd", "secret")
# Where a secret is, or what it is like: none itself.
_ABOUT = frozenset(
    {"path", "file", "dir", "directory", "length", "len", "count", "policy", "type", "limit", "required"}
)
_TRAILING = frozenset(
    {"value", "str", "string", "text", "raw", "plain", "b64", "base64", "hex", "prod", "dev", "old", "new"}
)
# Tokens of a vocabulary, which are no secrets: ``eos_token``, ``audio_bos_token``.
_VOCABULARY = frozenset(
    {"bos", "eos", "pad", "unk", "mask", "sep", "cls", "start", "end", "stop", "special", "delay", "break", "newline"}
    | {"text", "audio", "image", "img", "video", "vision", "speech", "boi", "eoi", "prompt", "think", "codec", "tts"}
)
_AMBIGUOUS = frozenset(
    {"key", "keys", "pass", "pwd", "pat", "sig", "signature", "token", "tokens", "pin", "salt", "auth"}
)
_IN_QUERIES = frozenset({"sig", "signature", "sign", "hmac", "auth", "pwd", "pass", "sas", "token"})

# -- forms ------------------------------------------------------------------------------------------------------------

_FORMS = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:hf|api_org)_[A-Za-z0-9]{20,}|wandb_v\d+_\w{20,}|sk-(?:(?=[\w-]*\d)[\w-]{20,}|[A-Za-z0-9]{20,})"
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|gl(?:pat|dt|rt|cbt|ptt|ft|soat|agent|imt|ffct|oas)-[\w-]{20,}"
    r"|xox[a-z](?:\.xox[a-z])?-[\w-]{10,}|xapp-[\w-]{10,}|A[A-Z]{3}(?<=AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}|AIza[\w-]{30,}"
    r"|ya29\.[\w.-]{20,}|1//0[\w-]{20,}|GOCSPX-[\w-]{20,}|(?:npm|gsk|tgp_v1|rpa|nvapi|r8|shp(?:at|ca|pa|ss)|ntn|lin_api|fw)"
    r"[_-][A-Za-z0-9_-]{20,}|(?:pplx|xai|csk|pypi|tskey-\w+|PMAK)-[\w-]{20,}|do[op]_v1_[0-9a-f]{20,}|dapi[0-9a-f]{32}"
    r"|(?:[rsp]k|rk)_(?:live|test)_\w{10,}|whsec_[\w+/=]{16,}|SG\.[\w-]{16,}\.[\w-]{16,}|hv[sbr]\.[\w-]{20,}"
    r"|lsv2_\w{20,}|pcsk_\w{20,}|sntry[su]_[\w+/=-]{20,}|figd_[\w-]{20,}|dckr_pat_[\w-]{20,}|ATATT3[\w=+/-]{20,}"
    r"|AGE-SECRET-KEY-1[A-Z0-9]{20,}|\d{8,10}:AA[\w-]{30,}|[MNO][\w-]{23,27}\.[\w-]{6}\.[\w-]{27,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*){1,3})"
)
_PRIVATE_KEY = re.compile(r"-----BEGIN[^-]*PRIVATE KEY[^-]*-----.*?(?:-----END[^-]*-----|\Z)", re.DOTALL)
_BEARER = re.compile(r"\b((?i:bearer)) +(?![A-Za-z]?[a-z]+(?![\w.~+/=-]))[\w.~+/=-]{8,}")
_BASIC = re.compile(r"(?i)\b(basic) +([\w+/-]{8,}={0,2})")
_LOGIN = re.compile(r"(\blogin\s+\S+\s+password\s+|(?<!\S)(?:-u|--user|--proxy-user)[ =]+['\"]?[^\s:'\"]+:)([^\s'\"]+)")
# The user and password of a URL. With a colon that no port follows a password may hold whatever a URL does.
_USER = re.compile(
    r"""(?<=\w\w:)((?:\\?/){1,2})(?!git@)(?:[^\s/"'<>?#@:\[]{0,200}:(?!\d{1,5}(?:[/?#\s]|$))"""
    r"""(?:[^\s"'<>]|["'<>](?=\w)){0,1000}|[^\s/"'<>?#]{1,1000})(?=@)"""
)
_USER_WITHOUT_SCHEME = re.compile(r"""(?<![\w.+/:-])([\w.+-]{1,100}):([^\s@/:"'<>]{6,200})@(?=[\w.-])""")
_PASSWORD = re.compile(r"://[^\s/:@]*:([^\s@]+)@")
_USER_OPTIONS = ("-u", "--user", "--proxy-user")
_WRITTEN = (
    str,
    quote,
    quote_plus,
    lambda text: quote(text, ""),
    lambda text: json.dumps(text)[1:-1],
    lambda text: repr(text)[1:-1],
)
# URLs that let anyone who knows them write somewhere.
_WEBHOOK = re.compile(
    r"""(?i)(?<=\w:)(/{1,2}(?:hooks?\.[^\s/"'<>]+|[^\s/"'<>]*webhook[^\s/"'<>]*|[^\s"'<>]{1,200}?"""
    r"""/(?:incoming-?)?(?:web)?hooks?(?:b2)?(?=/[^\s"'<>]*\d)|api\.telegram\.org(?=/bot))/)[^\s"'<>?#]+"""
)

# -- what goes by a name in a text -------------------------------------------------------------------------------------

_NAMED = re.compile(
    r"""(?<!\S)(?P<option>--?[A-Za-z][\w.-]*)[ \t]+(?!-)"""
    r"""|(?<![\w.-])(?P<name>[\w.-]+)\\*["'`]?\]?\s*(?:=>|==|:=|[=:])(?!/)"""
)
_SAID = re.compile(
    r"""(?i)\b(pass(?:word|phrase|code)|secret|token|api[ _-]?key|[A-Z0-9_]{2,40}_(?:TOKEN|KEY|SECRET|PASSWORD))"""
    r"""((?:\s+(?:is|was|of|provided|given))?[\s:]+["'`]?)([\w+/=.~!@#$%^&*-]{8,})"""
)
_QUOTED = re.compile(r"""\s*[bBrRuUfF]{0,2}(?P<q>\\*["'`])(?P<held>(?:(?!(?P=q))(?:\\.|.))*)(?:(?P=q)|\Z)""", re.DOTALL)
_BRACKETED = re.compile(r"""\s*(?P<held>[\[({][^\])}]*[\])}]?)""")
# Up to white space or a quote, or to what begins the next of several assignments.
_BARE = re.compile(r"""[ \t]*(?P<held>(?:[^\s"'`&;,]|[&;,](?!\s|$|[\w.-]{1,80}\\*["']?\s*[=:])|["'`](?=\w))+)""")
_LINE = re.compile(r"""[ \t]*(?P<held>[^\r\n"'`]+)""")
_CODE = frozenset(
    {"none", "null", "true", "false", "str", "bytes", "int", "bool", "any", "optional[str]", "***", "..."}
)

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
    return _redact_arguments(arguments, "", _secrets(os.environ if environment is None else environment))


def is_secret_name(name: str) -> bool:
    """Whether what goes by this name is a secret, should it be a text."""
    words = _words(name)
    if not words or words[-1] in _ABOUT:
        return False
    if (
        words[-2:] == _ADDRESSES
        or _SECRET_WORDS & set(words)
        or any(part in word for word in words for part in _IN_ANY_WORD)
    ):
        return True
    if any(first in _KINDS_OF_KEY and second in ("key", "keys") for first, second in itertools.pairwise(words)):
        return True
    others, last = set(words[:-1]), words[-1]
    if last in ("token", "tokens"):
        return bool(_SERVICES & others) or (last == "token" and not _VOCABULARY & others)
    if last in ("key", "keys"):
        return bool((_SERVICES - {"client", "session"}) & others)
    if last in ("pass", "pwd"):
        return not others or bool(_LOGINS & others)
    return last == "auth" or (last in ("signature", "sig") and not {"amz", "goog"}.isdisjoint(others))


def _is_secret(name: str, value: str) -> bool:
    """Whether a text is a secret, by its name: a doubtful one is decided by the text."""
    if not value or value == REDACTED:
        return False
    words = _words(name)
    if words in (["pwd"], ["pass"]) and (value.startswith(("/", "~")) or value.isdigit() or value[1:3] == ":\\"):
        return False  # the working directory; a pass over the data
    if is_secret_name(name):
        return not (words[-1] in ("token", "tokens") and re.fullmatch(r"[\d\s,.()\[\]]+", value))
    return bool(words) and words[-1] in _AMBIGUOUS and _looks_random(value)


def _words(name: str) -> list[str]:
    """The words of a name in lower case, without numbers and what only says in which form it is."""
    words: list[str] = []
    for word in (found.lower() for found in _WORDS.findall(name)):
        ending = next((end for end in _ENDINGS if word.endswith(end) and word != end), "")
        stem = word[: -len(ending)] if ending else ""
        known = stem in _LOGINS or stem in _VOCABULARY or stem in _KINDS_OF_KEY or ending == "secret"
        words += [stem, ending] if ending and known else [word]
    while len(words) > 1 and (words[-1] in _TRAILING or words[-1].isdigit()):
        words.pop()
    return words


def _looks_random(text: str) -> bool:
    """Whether letters and digits alternate as in no name: ``Zq8xK2mN7p`` against ``layer_10_attention``."""
    if len(text) < 12 or not re.fullmatch(r"[\w+/=.~!@#$%^&*-]+", text) or re.fullmatch(r"[0-9a-f-]{36}", text):
        return False
    pieces = _WORDS.findall(text)
    is_mixed = any(piece.isdigit() for piece in pieces) and any(piece.isalpha() for piece in pieces)
    return is_mixed and sum(map(len, pieces)) < 2.5 * len(pieces)


def _redact(value: Any, name: str, secrets: Sequence[str], depth: int = 0, hidden: bool = False) -> Any:
    """A value without secrets; ``hidden``: what it is part of goes by a secret's name."""
    if value is None or isinstance(value, bool):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping | list | tuple | set | frozenset) and depth < _DEEPEST:
        hidden = hidden or is_secret_name(name)
        if isinstance(value, Mapping):
            return _redact_mapping(value, secrets, depth, hidden)
        if not hidden and isinstance(value, list | tuple) and all(isinstance(held, str) for held in value):
            return _redact_arguments(value, name, secrets)
        return [_redact(held, name, secrets, depth + 1, hidden) for held in value]
    if isinstance(value, int | float):
        # Numbers under such names count or index tokens.
        is_of_tokens = name.lower().endswith(("token", "tokens"))
        return REDACTED if (hidden or is_secret_name(name)) and not is_of_tokens else value
    is_bytes = isinstance(value, bytes | bytearray | memoryview)
    text = bytes(value).decode(errors="backslashreplace") if is_bytes else _plain_text(value)
    if (hidden and text) or _is_secret(name, text):
        return REDACTED
    return _redact_text(text, secrets)


def _redact_mapping(value: Mapping[Any, Any], secrets: Sequence[str], depth: int, hidden: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    # Lists of variables are written as {"name": ..., "value": ...}.
    named = next((value[key] for key in ("name", "key", "Name", "Key") if isinstance(value.get(key), str)), "")
    for key, held in value.items():
        label = base = _redact_text(_plain_text(key), secrets)
        while label in shown:  # keys that are secrets may look the same
            label = f"{base} {len(shown)}"
        name = named if named and str(key).lower() == "value" else _plain_text(key)
        shown[label] = _redact(held, name, secrets, depth + 1, hidden)
    return shown


def _redact_arguments(arguments: Sequence[str], name: str, secrets: Sequence[str]) -> list[str]:
    """Texts that may be a command line, under a name that is no secret's."""
    if len(arguments) == 2 and _is_secret_pair(*arguments):
        return [_plain_text(arguments[0]), REDACTED]
    redacted: list[str] = []
    option = ""
    for argument in arguments:
        if _is_option(argument):
            given, assigned, held = argument.partition("=")
            is_hidden = bool(assigned) and not re.search(r"\s", given) and _is_secret(given, held)
            redacted.append(f"{_plain_text(given)}={REDACTED}" if is_hidden else _redact_text(argument, secrets))
            option = "" if assigned else argument
            continue
        user, colon, _ = argument.partition(":")
        if option in _USER_OPTIONS and colon:
            redacted.append(f"{_plain_text(user)}:{REDACTED}")
        else:
            redacted.append(_redact(argument, option.lstrip("-") or name, secrets))
        if _words(option)[-2:] != _ADDRESSES:
            option = (
                "keys" if option.endswith("s") else ""
            )  # what may be another value after a plural must look like one
    return redacted


def _is_option(argument: str) -> bool:
    return re.match(r"--?[A-Za-z]", argument) is not None and not _looks_random(argument.lstrip("-"))


def _is_secret_pair(name: str, value: str) -> bool:
    """Whether two texts are the name of a secret, and the secret: a header, an item of a mapping."""
    if name.startswith("-") or not _is_secret(name, value):
        return False
    return len(_words(name)) > 1 or _words(name)[-1] not in _AMBIGUOUS or _looks_random(value)


def _redact_text(text: str, secrets: Sequence[str]) -> str:
    text = _plain_text(text)
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    text = _PRIVATE_KEY.sub(REDACTED, text)
    text = _WEBHOOK.sub(rf"\1{REDACTED}", text)
    text = _USER.sub(rf"\1{REDACTED}", text)
    text = _USER_WITHOUT_SCHEME.sub(_redact_user, text)
    text = _BEARER.sub(rf"\1 {REDACTED}", text)
    text = _BASIC.sub(_redact_basic, text)
    text = _FORMS.sub(REDACTED, text)
    text = _redact_assignments(text)
    text = _LOGIN.sub(rf"\1{REDACTED}", text)
    return _SAID.sub(_redact_said, text)


def _redact_assignments(text: str) -> str:
    """A text without what is assigned to names of secrets, in whatever syntax, or follows options of such names."""
    shown: list[str] = []
    at = since = 0
    while (match := _NAMED.search(text, since)) is not None:
        since = match.end()
        name = (match["option"] or match["name"]).strip("-.")
        before = text[match.start() - 1 : match.start()]
        # A doubtful name is decided by a value that a secret could have, so that no long text is read twice.
        end = len(text) if (is_secret := is_secret_name(name)) else since + _LONGEST_DOUBTFUL
        if not (is_secret or _is_doubtful(name, before)) or text[since : since + 20].lstrip(" \"'").startswith(
            REDACTED
        ):
            continue
        patterns = [_QUOTED, _BRACKETED, _LINE if is_secret and _takes_the_line(name, text, match) else _BARE]
        found = next(filter(None, (pattern.match(text, since, end) for pattern in patterns)), None)
        if found is None or not _is_assigned_secret(name, found["held"].strip(), before):
            continue
        start, since = found.span("held")
        shown += [text[at:start], re.sub(r"\S+", REDACTED, found["held"]) if found.re is _LINE else REDACTED]
        at = since
    return "".join([*shown, text[at:]])


def _takes_the_line(name: str, text: str, match: re.Match[str]) -> bool:
    """Whether a value without quotes may hold spaces: that of a header, or of a name that begins its line."""
    if match["option"] or not match[0].endswith(":"):
        return False
    begins = not text[text.rfind("\n", 0, match.start()) + 1 : match.start()].strip(" \t-'\"`>{*#")
    return begins or not {"authorization", "cookie", "cookies"}.isdisjoint(_words(name))


def _is_assigned_secret(name: str, held: str, before: str) -> bool:
    if held.lower() in _CODE or re.fullmatch(r"<[^<>\s]*>", held):
        return False
    return _is_secret(name, held) or (_is_of_a_query(name, before) and (name.lower() in _IN_QUERIES or len(held) > 15))


def _is_doubtful(name: str, before: str) -> bool:
    words = _words(name)
    return bool(words) and (words[-1] in _AMBIGUOUS or _is_of_a_query(name, before))


def _is_of_a_query(name: str, before: str) -> bool:
    return before in ("?", "&") and (name.lower() in _IN_QUERIES or name.lower() in ("key", "code"))


def _redact_user(match: re.Match[str]) -> str:
    user, password = match.groups()
    named = user.lower() in ("mailto", "sip", "acct") or not re.search(r"\d", password)
    has_place = re.match(r"@[\w.-]+(?::\d|/)", match.string[match.end() - 1 :][:300]) is not None
    return match[0] if named or not (has_place or _looks_random(password)) else f"{user}:{REDACTED}@"


def _redact_basic(match: re.Match[str]) -> str:
    scheme, held = match.groups()
    try:
        is_login = b":" in base64.b64decode(held + "=" * (-len(held) % 4), validate=True)
    except binascii.Error:
        is_login = False
    return f"{scheme} {REDACTED}" if is_login or _looks_random(held) else match[0]


def _redact_said(match: re.Match[str]) -> str:
    name, between, held = match.groups()
    return f"{name}{between}{REDACTED}" if _looks_random(held.rstrip(".")) else match[0]


def _plain_text(value: object) -> str:
    """A value as text that any encoder takes: bytes of an argument that are not UTF-8 are shown with backslashes."""
    try:
        text = str(value)
    except Exception:  # noqa: BLE001  (whatever another's object does when it is asked for its text)
        text = f"<{type(value).__name__}>"
    return text.encode("utf-8", "backslashreplace").decode()


def _secrets(environment: Mapping[str, str]) -> list[str]:
    """Values of variables with a secret's name and passwords of URLs, long ones first: one may hold another."""
    held = {value for name, value in environment.items() if _is_secret(name, value)}
    held |= {found[1] for value in environment.values() for found in _PASSWORD.finditer(value)}
    written = {form(value) for value in held for form in _WRITTEN if len(value) >= _SHORTEST}
    return sorted(written, key=len, reverse=True)
