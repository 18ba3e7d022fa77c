"""Trackio: what is in its database after a run that was resumed."""

from __future__ import annotations

import json
import sqlite3
import wave
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PillowImage
from support import programs

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trackio")
    environment = {"TRACKIO_DIR": str(directory / "db"), "TRACKIO_PROJECT": "voices"}
    ended = programs.run([str(HERE / "trackio_run.py"), str(directory)], directory, **environment)
    assert ended.status == 0, ended.said
    return directory / "db" / "voices.db"


def rows(database: Path, query: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(database)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def logged(database: Path, run: str) -> dict[int, dict[str, Any]]:
    found = rows(database, f"select step, metrics from metrics where run_name = '{run}'")
    assert len({step for step, _ in found}) == len(found)
    return {step: json.loads(metrics) for step, metrics in found}


def test_numbers_are_at_their_steps(database: Path) -> None:
    first = logged(database, "voices")
    assert {step: values["outputs/loss/total"] for step, values in first.items()} == {1: 1.0, 2: 0.5, 3: 1 / 3}
    assert [values["train/loss"] for values in first.values()] == [0.5] * 3
    assert [values["odd"] for values in first.values()] == ["NaN"] * 3


def test_a_resumed_run_is_one_of_its_own_in_the_same_group(database: Path) -> None:
    assert logged(database, "voices from step 2").keys() == {3}
    configs = {name: json.loads(config) for name, config in rows(database, "select run_name, config from configs")}
    assert {name: (config["lr"], config["_Group"]) for name, config in configs.items()} == {
        "voices": (0.1, "voices"),
        "voices from step 2": (0.1, "voices"),
    }


def test_media_and_tables(database: Path) -> None:
    values = logged(database, "voices")[2]
    media = database.parent / "media"
    for tag in ("inputs/reference", "inputs/reference/2"):
        assert values[tag]["caption"] == "speaker 2"
        with wave.open(str(media / values[tag]["file_path"])) as sound:
            assert (sound.getframerate(), sound.getnframes(), sound.getnchannels()) == (8000, 8000, 1)
    assert PillowImage.open(media / values["attention/mass"]["file_path"]).size == (48, 32)
    first, second = values["zero_shot/clips"]["_value"]
    assert (first["sample"], first["cer"]) == ("a", 0.5)
    assert PillowImage.open(media / first["mel"]["file_path"]).size == (48, 32)
    assert second == {"sample": "b", "cer": None, "mel": None}
    assert "broken" not in values


def test_alerts(database: Path) -> None:
    alerts = rows(database, "select title, text, level, step from alerts where run_name = 'voices' order by step")
    assert alerts == [("no end of stream", f"at step {step}", "error", step) for step in (1, 2, 3)]


def test_a_run_of_the_users_is_joined_and_left_open(database: Path) -> None:
    found = rows(database.with_name("mine.db"), "select run_name, step, metrics from metrics")
    values = [(step, json.loads(metrics)) for name, step, metrics in found if name == "guests"]
    own = [(step, held) for step, held in values if "outputs/loss/total" in held]
    assert own == [(step, {"outputs/loss/total": 1 / step, "train/global_step": step}) for step in (1, 2, 3)]
    assert [held["user"] for _, held in values if "user" in held] == [0, 1, 2, 3, 4]
    ((config,),) = rows(database.with_name("mine.db"), "select config from configs where run_name = 'guests'")
    assert json.loads(config)["own"] == 1


def test_a_run_that_its_owner_ends_first_has_everything(database: Path) -> None:
    found = rows(database.with_name("mine.db"), "select metrics from metrics where run_name = 'ended'")
    assert [json.loads(metrics)["outputs/loss/total"] for (metrics,) in found] == [1.0, 0.5]
