"""Secrets are taken out wherever they stand, and nothing else is."""

from __future__ import annotations

from typing import Any

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
