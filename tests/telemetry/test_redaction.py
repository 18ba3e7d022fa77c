"""Secrets are taken out wherever they stand, and nothing else is."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import json
import shlex
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from telemetry.redaction import REDACTED, is_secret_name, redact, redact_arguments

TOKEN = "hf_" + "a1B2" * 6
NONE: dict[str, str] = {}


@pytest.mark.parametrize(
    "name",
    [
        *("password", "db_password", "smtpPassword", "api_key", "apiKey", "OPENAI_API_KEY", "apikey", "hub_token"),
        *("push_to_hub_token", "token", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "client-secret"),
        *("credentials", "ssh_private_key", "Authorization", "passphrase", "wandb.api_key"),
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)
    assert redact({name: "abc"}, environment=NONE) == {name: REDACTED}
    assert redact_arguments([f"--{name}", "abc", "x"], NONE) == [f"--{name}", REDACTED, "x"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("eos_token", "</s>"), ("pad_token_id", 3), ("audio_bos_token", "<|audio_bos|>"), ("tokens", 5)],
        *[("max_new_tokens", 5), ("num_key_value_heads", 4), ("tokenizer", "hf/name"), ("keys", ["a"])],
        *[("api_key_file", "/home/me/key"), ("key", "a"), ("HF_TOKEN_PATH", "/x"), ("learning_rate", 5e-5)],
        *[("use_auth_token", True), ("hub_token", None), ("password", ""), ("PWD", "/home/me"), ("token", 7)],
        *[("url", "https://host/path?x=1#y"), ("mail", "someone@example.com"), ("when", "12:30"), ("git", "a" * 40)],
    ],
)
def test_what_is_no_secret_stays(name: str, value: Any) -> None:
    assert redact({name: value}, environment=NONE) == {name: value}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"log in with {TOKEN}.", f"log in with {REDACTED}."),
        ("https://bob:hunter22@host/x.git", f"https://{REDACTED}@host/x.git"),
        ("https://ghp_" + "x" * 30 + "@host/x", f"https://{REDACTED}@host/x"),
        ("Authorization: Bearer abcdefgh.ijk", f"Authorization: {REDACTED} {REDACTED}"),
        ("curl -H 'x: bearer abcdefgh.ijk'", f"curl -H 'x: bearer {REDACTED}'"),
        ("?user=me&api_key=1234&x=2", f"?user=me&api_key={REDACTED}&x=2"),
        ('{"password": "abc d", "lr": 1}', f'{{"password": "{REDACTED}", "lr": 1}}'),
        ("eos_token=</s> lr=0.1", "eos_token=</s> lr=0.1"),
        ("sk-" + "q" * 24, REDACTED),
    ],
)
def test_secrets_in_texts(text: str, expected: str) -> None:
    assert redact({"note": text}, environment=NONE) == {"note": expected}


def test_values_of_secret_variables_are_found_anywhere() -> None:
    environment = {"MY_SERVICE_TOKEN": "correct horse battery", "MY_API_KEY": "short", "HOME": "/home/someone"}
    config = {"a": [{"b": ("say correct horse battery twice",)}], "c": "short", "d": "/home/someone/x"}
    assert redact(config, environment=environment) == {
        "a": [{"b": [f"say {REDACTED} twice"]}],
        "c": "short",
        "d": "/home/someone/x",
    }
    assert redact_arguments(["--x=correct horse battery"], environment) == [f"--x={REDACTED}"]


def test_the_given_configuration_is_left_alone() -> None:
    config = {"hub_token": "abc", "nested": {"password": "x"}}
    redact(config, environment=NONE)
    assert config == {"hub_token": "abc", "nested": {"password": "x"}}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--hub_token=abc", "--lr", "1"], [f"--hub_token={REDACTED}", "--lr", "1"]),
        (["--eos_token", "</s>"], ["--eos_token", "</s>"]),
        (["--use_auth_token", "--lr", "1"], ["--use_auth_token", "--lr", "1"]),
        (["train.py", TOKEN], ["train.py", REDACTED]),
    ],
)
def test_command_lines(given: list[str], expected: list[str]) -> None:
    assert redact_arguments(given, NONE) == expected


# -- the whole list: wherever a secret stands -------------------------------------------------------------------------

# No value here is anybody's: each is put together from parts, so that no file holds what looks like a secret.
DRAWN = "".join(("Zq8x", "K2mN", "7pLw", "4VtR"))
LONG = DRAWN + "".join(("9bYc", "3Hd6", "Jf5S"))
HEX = "".join(("3f9a", "0c7e", "51b2", "d846")) * 2
UPPER = "".join(("Z8K2", "N7W4", "R9B3", "H6J5"))
WORDS = "correct horse battery"


@dataclasses.dataclass
class Login:
    user: str
    password: str
    lr: float = 0.1


class Pair(NamedTuple):
    user: str
    api_key: str


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no text of me")


def joined(*parts: str) -> str:
    return "".join(parts)


def basic(login: str) -> str:
    return base64.b64encode(login.encode()).decode()


FORMS = [
    *(joined("hf_", LONG), joined("api_org_", LONG), joined("sk-", LONG), joined("sk-ant-", "api03-", LONG)),
    *(joined("sk-", "proj-", LONG), joined("sk-", "or-v1-", HEX), joined("gh", "p_", LONG), joined("gh", "s_", LONG)),
    *(
        joined("github", "_pat_", LONG),
        joined("gl", "pat-", LONG),
        joined("gl", "rt-", LONG),
        joined("xox", "b-", LONG),
    ),
    *(
        joined("xox", "p-12-34-", LONG),
        joined("xa", "pp-1-", LONG),
        joined("AK", "IA", UPPER),
        joined("AS", "IA", UPPER),
    ),
    *(
        joined("AI", "za", LONG, "abcdefg"),
        joined("ya", "29.", LONG),
        joined("GOC", "SPX-", LONG),
        joined("npm", "_", LONG),
    ),
    *(joined("nva", "pi-", LONG), joined("gs", "k_", LONG), joined("r8", "_", LONG), joined("xa", "i-", LONG)),
    *(joined("pp", "lx-", LONG), joined("py", "pi-", LONG), joined("dop", "_v1_", HEX), joined("da", "pi", HEX)),
    *(joined("sk_", "live_", LONG), joined("rk_", "test_", LONG), joined("whs", "ec_", LONG), joined("hv", "s.", LONG)),
    *(joined("S", "G.", LONG, ".", LONG), joined("lsv2", "_pt_", HEX), joined("dckr", "_pat_", LONG)),
    *(joined("123456789", ":AA", LONG, "abcdefg"), joined("wandb", "_v1_", LONG), joined("rpa", "_", LONG)),
    joined("ey", "JhbGciOiJIUzI1NiJ9.", "ey", "JzdWIiOiIxMjM0In0.", LONG),
    joined("-----BEGIN ", "RSA PRIVATE", " KEY-----\n", LONG, "\n", LONG, "\n-----END ", "RSA PRIVATE", " KEY-----"),
    joined("-----BEGIN ", "OPENSSH PRIVATE", " KEY-----\\n", LONG, "\\n"),
]
URLS = [
    *(
        f"mysql://u:p@{DRAWN}@h/x",
        f"https://bob:{DRAWN}@host/x.git",
        f"https://{LONG}@host/x",
        f"redis://:{DRAWN}@h:6379/0",
    ),
    *(
        f"postgres://u:p/{DRAWN}@h/db",
        f"mongodb+srv://u:p?{DRAWN}@c.example/x",
        f"amqp://u:p#{DRAWN}@h",
        f"h2://u:{DRAWN}@h",
    ),
    *(f"https:\\/\\/u:{DRAWN}@h\\/x", f"sqlite://u:a'{DRAWN}@h/x", f"bob:{DRAWN}@db.example:5432/x"),
    *(f"https://x.blob.core.windows.net/c?sv=1&sig={DRAWN}", f"https://b.s3.amazonaws.com/k?X-Amz-Signature={HEX}"),
    *(f"https://h/x?a=1&access_token={DRAWN}&b=2", f"https://h/x?key={LONG}", f"https://h/x?Signature={DRAWN}~&b=2"),
    *(
        f"https://b.s3.amazonaws.com/k?X-Amz-Security-Token={LONG}%3D",
        f"https://h/cb?code={LONG}",
        f"s3://b?token={DRAWN}",
    ),
    *(f"https://storage.googleapis.com/b?X-Goog-Signature={HEX}", f"https://h/x#access_token={DRAWN}"),
    *(f"https://hooks.slack.com/services/T000/B000/{DRAWN}", f"https://discord.com/api/webhooks/123/{LONG}"),
    *(
        f"https://x.webhook.office.com/webhookb2/{HEX}@{HEX}/IncomingWebhook/{DRAWN}",
        f"https://chat.example/hooks/{LONG}",
    ),
    *(f"https://open.feishu.cn/open-apis/bot/v2/hook/{HEX}", f"https://api.telegram.org/bot1:{DRAWN}/sendMessage"),
    *(f"https://hooks.zapier.com/hooks/catch/1/{DRAWN}", f"https://oapi.example/robot/send?access_token={HEX}"),
]
TEXTS = [
    *(
        f"Authorization: Bearer {DRAWN}",
        f"Authorization: token {DRAWN}",
        f"curl -H 'Authorization: Basic {basic('u:' + LONG)}'",
    ),
    *(
        f"X-Api-Key: {DRAWN}",
        f"Cookie: a=1; session={DRAWN}",
        f"Proxy-Authorization: Digest username=u, response={HEX}",
    ),
    *(
        f"password=ab&{DRAWN}",
        f"password=ab;{DRAWN}",
        f"password=ab,{DRAWN}",
        f'password=ab"{DRAWN}"',
        f"x=password={DRAWN}",
    ),
    *(f'{{"password": "a \\"{DRAWN}", "lr": 1}}', f"Login(password='{DRAWN}')", f"{{'auth_tokens': ['{DRAWN}', 'x']}}"),
    *(
        f"export HF_TOKEN={DRAWN}",
        f'os.environ["OPENAI_KEY"] = "{DRAWN}"',
        f"password: a b {DRAWN}",
        f"api_key => {DRAWN}",
    ),
    *(f'"{{\\"password\\": \\"{DRAWN}\\"}}"', f"login -p x --password {DRAWN} y", f"mysql --db_pass '{DRAWN} {DRAWN}'"),
    *(
        f"machine h login me password {DRAWN.lower()}",
        f"Server=h;Uid=u;Pwd={DRAWN};",
        f"AccountName=a;AccountKey={DRAWN}==",
    ),
    *(f"the token is {DRAWN}.", f"Incorrect API key provided: {DRAWN}", f"password='{DRAWN}", f"secret: b'{DRAWN}'"),
    *(f"ValueError: login failed (api_key={DRAWN})", f"curl -u me:{DRAWN} https://h", f"HF_TOKEN: {DRAWN}\nnext: 1"),
    *(f"bearer {DRAWN.lower()}", f"setenv WANDB_API_KEY {DRAWN}", f"--config=password={DRAWN}", f"password := {DRAWN}"),
    f'  File "x.py", line 3, in f\n    connect(user="me", password="{DRAWN}")\nRuntimeError: no answer',
]
NAMES = [
    *("wandb_key", "OPENAI_KEY", "MYSQL_PWD", "db_pass", "passcode", "auth_tokens", "hub_tokens", "text_api_token"),
    *("audio_service_token", "image_registry_token", "hf_token_value", "token2", "secretkey", "hubtoken", "dbpassword"),
    *("webhook_secret_url", "slack_webhook", "webhook_url", "credentials", "aws_creds", "PGPASSWORD", "REDISCLI_AUTH"),
    *("session_token", "clientSecret", "sshPrivateKey", "deploy_key", "storage_key", "smtp_pass", "http_auth", "jwt"),
    *("session_cookie", "AZURE_STORAGE_KEY", "masterKey", "refresh-token", "my.secret", "password_1", "access_keys"),
]
ARGUMENTS = [
    *([f"--password=ab&{DRAWN}"], [f"--password=ab;{DRAWN}"], [f"--password=a b {DRAWN}"], ["--password", f"-{DRAWN}"]),
    *(["--token", DRAWN], ["--wandb_key", DRAWN], ["--db_url", f"mysql://u:p@{DRAWN}@h/x"], ["-u", f"me:{DRAWN}"]),
    *(["--header", f"Authorization: token {DRAWN}"], [f"--x=--api-key={DRAWN}"], ["--auth_tokens", "abc", DRAWN]),
    *([f"api_key={DRAWN}"], ["+hub.token=" + DRAWN], [f"--env=HF_TOKEN={DRAWN}"], ["--sort_key", DRAWN]),
    *(["--api_key", f"--{DRAWN}"], ["-e", f"OPENAI_KEY={DRAWN}"], ["x", f'{{"hub_token": "{DRAWN}"}}']),
]
VALUES: list[Any] = [
    *(Path(f"https://user:{DRAWN}@h/x"), f"hub_token={DRAWN}".encode(), bytearray(f"password={DRAWN}".encode())),
    *({"a": [{"b": ({"api_key": DRAWN},)}]}, {"credentials": {"x": {"y": [DRAWN]}}}, {"tokens": {"hub_token": DRAWN}}),
    *(Login("me", DRAWN), [Login("me", DRAWN)], Pair("me", DRAWN), {f"hf_{LONG}": 1}, {f"https://u:{DRAWN}@h": {}}),
    *([("Authorization", DRAWN)], {"headers": {"Authorization": f"token {DRAWN}"}}, {"auth": ("me", DRAWN)}),
    *([{"name": "HF_TOKEN", "value": DRAWN}], {"password": Path(DRAWN)}, {"password": DRAWN.encode()}),
    *(
        {"password": {DRAWN, "x"}},
        {"password": frozenset({DRAWN})},
        {"x": {f"password={DRAWN}"}},
        {"api_key": [[DRAWN]]},
    ),
    *(argparse.Namespace(password=DRAWN), types.SimpleNamespace(hub_token=DRAWN), ["run", "--token", DRAWN]),
    *({"command": ["x", f"--password=a {DRAWN}"]}, {b"password": DRAWN}, {"Key": "MY_SECRET", "Value": DRAWN}),
]
SECRETS = [DRAWN, LONG, HEX, UPPER, basic("u:" + LONG), DRAWN.lower()]


def shows_a_secret(shown: Any) -> bool:
    text = shown if isinstance(shown, str) else repr(shown)
    return any(secret[:10] in text for secret in SECRETS)


def at_each_place() -> list[Any]:
    texts = [*FORMS, *(url for url in URLS if "@" in url or "/" in url[8:]), *TEXTS]
    wrapped: list[Callable[[str], Any]] = [
        *(lambda text: {"note": text}, lambda text: [1, {"x": (text,)}], lambda text: f"it said: {text}"),
        *(lambda text: text.encode(), lambda text: {"x": Unlike(text)}, lambda text: f"<{text}>"),
    ]
    placed = [wrap(text) for number, text in enumerate(texts) for wrap in [wrapped[number % len(wrapped)]]]
    return [*texts, *placed, *({name: DRAWN} for name in NAMES), *VALUES]


@dataclasses.dataclass
class Unlike:
    content: str


def test_none_of_the_list_is_shown() -> None:
    listed = at_each_place()
    assert len(FORMS) + len(URLS) + len(TEXTS) + len(NAMES) + len(ARGUMENTS) + len(VALUES) > 150
    shown = [(value, redact(value, environment=NONE)) for value in listed if shows_a_secret(value)]
    assert len(shown) > 0.95 * len(listed)
    assert [(value, redacted) for value, redacted in shown if shows_a_secret(redacted)] == []
    lines = [(line, redact_arguments(line, NONE)) for line in [*ARGUMENTS, *(["x", one] for one in [*FORMS, *URLS])]]
    assert [(line, redacted) for line, redacted in lines if shows_a_secret(redacted)] == []


BENIGN: list[tuple[str, Any]] = [
    *[
        (name, 5)
        for name in ("max_tokens", "token_count", "pad_token_id", "num_key_value_heads", "pass_k", "num_passes")
    ],
    *[(name, 7.5) for name in ("tokens_per_second", "max_new_tokens", "hub_token_count", "num_tokens", "keypoints")],
    *[
        (name, "hf/name")
        for name in ("tokenizer", "tokenizer_name", "author", "secretary", "keyboard", "bypass", "monkey")
    ],
    *[
        (name, "col_1")
        for name in ("sort_key", "key", "keys", "primary_key", "cache_key", "text_key", "audio_key", "passage")
    ],
    *[
        (name, "<|x|>")
        for name in ("eos_token", "pad_token", "image_token", "audio_bos_token", "stop_tokens", "text_token")
    ],
    *[
        (name, "auto")
        for name in ("forward_pass", "high_pass", "compass", "passive", "authority", "turkey", "signature")
    ],
    *[
        ("token_type_ids", [0, 1]),
        ("special_tokens", ["<a>", "<b>"]),
        ("label_names", ["labels"]),
        ("columns", ("a", "b")),
    ],
    *[
        ("password_file", "/x/y"),
        ("PWD", "/home/me"),
        ("use_auth_token", True),
        ("hub_token", None),
        ("token_dir", "t"),
    ],
    *[
        ("report_to", ["wandb", "tensorboard"]),
        ("model", "Qwen/Qwen2-Audio-7B-Instruct"),
        ("run", "lr1e-4_bs32_h100x8"),
    ],
    *[
        ("arch", "Qwen2AudioForConditionalGeneration"),
        ("commit", "3f9a0c7e" * 5),
        ("id", "550e8400-e29b-41d4-a716-446655440000"),
    ],
    *[
        ("sample_key", "speaker1_clip0012345"),
        ("speaker_key", "1272-128104-0000"),
        ("time", "2026-01-02T03:04:05+00:00"),
    ],
    *[
        ("note", text)
        for text in (
            "basic training of a tokenizer",
            "bearer authentication is used",
            "the password is missing",
            "disk-usage-of-all-of-it",
            "token by token",
            "a secret garden",
            "https://host:8080/x@v2?a=1&b=2",
            "ssh://git@github.com/o/r",
            "mailto:me1@x.org",
            "git@github.com:org/repo.git",
            "see https://docs.example/webhooks/intro",
            "key=value",
            "eos_token=</s> lr=0.1",
            "s3://bucket/path/to/file.json",
            "C:\\data\\me@home\\x",
            "ratio 3:4@16k",
            "max_tokens=512, top_k=50",
            "hf_model_name",
            "sk-learn",
            "layer_10.self_attn.k_proj",
            "num_key_value_heads: 8",
            "/data/tokens/part-00012.parquet",
            "50% / 100%",
            "نص عربي: كلمة",
            "epoch=3-step=1000.ckpt",
            "monkey: bananas",
            "torch==2.6.0+cu124",
            "gl-pattern: x",
            "pass@1: 0.5",
            "Bearer",
            "Basic HuggingFace",
            "tokenizer: bpe",
            "https://user-guide.example/a:b/c",
            "author: someone",
            "passed=12",
        )
    ],
]


def test_what_is_harmless_stays_as_it_is() -> None:
    assert len(BENIGN) > 80
    redacted = [(name, value, redact({name: value}, environment=NONE)[name]) for name, value in BENIGN]
    assert [one for one in redacted if one[2] != (list(one[1]) if isinstance(one[1], tuple) else one[1])] == []
    texts = [value for _, value in BENIGN if isinstance(value, str)]
    assert redact_arguments(texts, NONE) == texts
    line = [part for name, value in BENIGN if isinstance(value, str) for part in (f"--{name}", value)]
    assert redact_arguments(line, NONE) == line
    assert redact(shlex.join(line), environment=NONE) == shlex.join(line)


def test_values_of_variables_are_found_in_other_spellings() -> None:
    value = 'p@ss "w/rd" ' + DRAWN
    environment = {"MYSQL_PWD": value, "DATABASE_URL": f"postgres://u:{LONG}@h/x", "PWD": "/home/someone/here"}
    from urllib.parse import quote

    spellings = [value, quote(value), quote(value, ""), json.dumps({"x": value}), repr([value]), f"with {LONG} in it"]
    assert not any(map(shows_a_secret, redact(spellings, environment=environment)))
    assert redact("/home/someone/here/x", environment=environment) == "/home/someone/here/x"


def test_odd_configurations_are_shown_as_far_as_they_go() -> None:
    endless: dict[str, Any] = {"password": DRAWN}
    endless["self"] = endless
    shown = redact({"x": endless, "y": Unprintable(), "z": "\ud800"}, environment=NONE)
    assert not shows_a_secret(shown)
    assert shown["y"] == "<Unprintable>"
    assert shown["z"] == "\\ud800"
    assert redact({f"hf_{LONG}": 1, f"hf_{LONG[::-1]}": 2}, environment=NONE).keys() == {REDACTED, f"{REDACTED} 1"}


def test_long_texts_take_time_in_proportion() -> None:
    pieces = [
        "a",
        "a=",
        "x://a:",
        "password ",
        "://",
        ",a",
        "-----BEGIN PRIVATE KEY",
        "a.b-",
        '\\"',
        "bearer ",
        "login a ",
    ]
    for piece in pieces:
        began = time.thread_time()
        redact(piece * (50_000 // len(piece)), environment=NONE)
        assert time.thread_time() - began < 1, piece


def test_addresses_that_alerts_go_to_are_secrets_however_many() -> None:
    given = ["train.py", "--alert_to", "slack://A1/B2/C3", "jsons://host/hook", "--max_steps", "3"]
    assert redact_arguments(given) == ["train.py", "--alert_to", "<redacted>", "<redacted>", "--max_steps", "3"]
    assert redact({"alert_to": ["slack://A1/B2/C3"]}) == {"alert_to": ["<redacted>"]}
    assert redact({"STRATEGIC_TELEMETRY_ALERT_TO": "slack://A1/B2"}) == {"STRATEGIC_TELEMETRY_ALERT_TO": "<redacted>"}
