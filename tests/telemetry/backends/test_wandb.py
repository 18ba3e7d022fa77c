"""W&B with its real client: what reaches a server that stands in for W&B's."""

from __future__ import annotations

import io
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image as PillowImage
from support.programs import FORK
from support.wandb_server import API_KEY, Server, client_environment, serve
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb_facts import CHECKPOINT, CRASHED, END, EVERY, GO, SAID, SECRETS, SEEN, STAND_IN, STEPS, WAITS, WAITS_AT

import trainer  # noqa: F401  (makes an installed torchaudio importable before anything imports transformers)
from telemetry.backends.encoding import encode_wav
from telemetry.records import Audio, Clip, Image, Record, Scalar, Table

HERE = Path(__file__).parent
TESTS = HERE.parents[1]
ROOT = TESTS.parent
PATHS = os.pathsep.join(map(str, (ROOT, TESTS)))
AXIS = "train/global_step"


class Ran:
    """What the scenarios have left.

    Attributes:
        arrived_meanwhile: steps that the server had while the training stood.
    """

    def __init__(self, directory: Path, server: Server, arrived_meanwhile: list[int]) -> None:
        self.arrived_meanwhile = arrived_meanwhile
        self.directory = directory
        self.server = server
        self.state = server.state()

    def runs(self, scenario: str) -> list[Any]:
        return [run for run in self.state.runs() if run.project == scenario]

    def run(self, scenario: str) -> Any:
        (run,) = self.runs(scenario)
        return run

    def seen(self, scenario: str) -> dict[str, list[tuple[int, Record]]]:
        return pickle.loads((self.directory / scenario / SEEN).read_bytes())

    def said(self, scenario: str) -> str:
        return (self.directory / scenario / SAID).read_text()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    directory = tmp_path_factory.mktemp("runs")
    with serve(tmp_path_factory.mktemp("server")) as server:
        program = subprocess.Popen(
            [*FORK, str(HERE / "wandb_runs.py"), str(directory), server.url],
            env={**os.environ, "PYTHONPATH": PATHS, STAND_IN: str(server.journal.directory.parent)},
        )
        arrived = steps_while_it_waits(server, directory / "training", program)
        program.wait(240)
        said = {path.parent.name: path.read_text()[-3000:] for path in directory.glob(f"*/{SAID}")}
        assert program.returncode == 0, said
        yield Ran(directory, server, arrived)


def steps_while_it_waits(server: Server, directory: Path, program: subprocess.Popen[bytes]) -> list[int]:
    """The steps that the server has while the training stands, once it has the one that it stands at; then: go."""
    deadline = time.monotonic() + 80
    steps: list[int] = []
    while (not steps or steps[-1] < WAITS_AT) and time.monotonic() < deadline and program.poll() is None:
        time.sleep(0.5)
        if (directory / WAITS).exists():
            runs = [run for run in server.runs() if run.project == "training"]
            steps = [step for run in runs for step, _ in run.points("outputs/loss/text")]
    (directory / GO).touch()
    return steps


@pytest.fixture(scope="module")
def synced(ran: Ran) -> Any:
    """The run that was kept on disk, sent with the command that it named."""
    command = re.findall(r"send this run to W&B with: (.+)", ran.said("everything_offline"))
    assert len(command) == 1
    directory = ran.directory / "everything_offline"
    program = subprocess.run(
        f"{Path(sys.executable).parent / command[0]}",
        shell=True,
        env={**os.environ, **client_environment(ran.server.url, directory / "client")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert program.returncode == 0, program.stderr
    return next(run for run in ran.server.runs() if run.project == "everything_offline")


# A real training


def test_a_training_is_one_finished_run(ran: Ran) -> None:
    run = ran.run("training")
    assert run.exit_code == 0
    assert run.config["data"]["train"] == {"dataset": "list", "samples": 64, "batches": 32}
    assert run.config["model"]["vocab_size"] == 13
    assert run.config["max_steps"] == 12
    assert run.config["command"].startswith("train.py --hub_token '<redacted>'")
    assert "--lr 0.01" in run.config["command"]


def test_every_number_of_a_training_is_what_the_memory_backend_saw(ran: Ran) -> None:
    run, seen = ran.run("training"), ran.seen("training")
    scalars = {tag: held for tag, held in seen.items() if isinstance(held[0][1], Scalar)}
    assert {"outputs/loss/text", "gradients/total_norm", "train/loss", "telemetry/step_seconds"} <= set(scalars)
    for tag, held in scalars.items():
        # The client writes whole numbers without a point, and doubles in digits that read back as the same double.
        assert run.points(tag) == [(step, record.value) for step, record in held], tag


def test_tables_of_a_training_are_whole(ran: Ran) -> None:
    run, seen = ran.run("training"), ran.seen("training")
    tags = [tag for tag, held in seen.items() if isinstance(held[0][1], Table) and held[0][1].rows]
    assert "inputs/tensors" in tags
    for tag in tags:
        expected = [[step, *map(plain, row)] for step, table in seen[tag] for row in table.rows]
        shown = [row for key in (tag, f"{tag}/2") for table in run.tables(key)[-1:] for row in table.rows]
        assert sorted(map(str, shown)) == sorted(map(str, expected)), tag


def test_rows_arrive_while_the_training_runs(ran: Ran) -> None:
    """It stood at a step until the test had seen the server have that step's numbers, and then went on."""
    assert ran.arrived_meanwhile == list(range(1, WAITS_AT + 1))
    assert [step for step, _ in ran.run("training").points("outputs/loss/text")] == list(range(1, STEPS + 1))


def test_no_secret_gets_anywhere(ran: Ran) -> None:
    secrets = (*SECRETS, API_KEY)
    assert ran.server.find(*secrets) == {}
    directory = ran.directory / "training"
    files = [path for path in directory.rglob("*") if path.is_file() and path.suffix not in (".pt", ".bin")]
    assert any(path.suffix == ".wandb" for path in files)
    assert any("tfevents" in path.name for path in files)
    assert any(path.name == SAID for path in files)
    found = [(path.name, secret) for path in files for secret in secrets if secret.encode() in path.read_bytes()]
    assert found == []


def test_the_best_value_is_in_the_summary(ran: Ran) -> None:
    summary = ran.run("everything").summary
    assert summary["outputs/loss/total"] == {"min": pytest.approx(1 / 3), "last": pytest.approx(1 / 3)}
    assert summary["outputs/accuracy/text"] == {"max": pytest.approx(0.3), "last": pytest.approx(0.3)}
    assert summary[AXIS] == 3


# Every kind of record, online and from disk


@pytest.fixture(params=["online", "from disk"])
def whole(request: pytest.FixtureRequest, ran: Ran) -> Any:
    return ran.run("everything") if request.param == "online" else request.getfixturevalue("synced")


def seen_by_memory(ran: Ran, tag: str) -> list[tuple[int, Any]]:
    return ran.seen("everything")[tag]


def test_numbers(whole: Any, ran: Ran) -> None:
    assert whole.exit_code == 0
    for tag in ("outputs/loss/total", "outputs/accuracy/text", "odd"):
        expected = [(step, record.value) for step, record in seen_by_memory(ran, tag)]
        np.testing.assert_array_equal(whole.points(tag), expected)  # NaN is NaN
    assert [str(value) for _, value in whole.points("odd")] == ["inf", "-inf", "nan"]


def test_numbers_of_a_step_are_one_row(whole: Any) -> None:
    rows = [row for row in whole.history() if "odd" in row]
    assert [row[AXIS] for row in rows] == [1, 2, 3]
    assert all({"outputs/loss/total", "outputs/accuracy/text", AXIS} <= set(row) for row in rows)
    assert len(whole.history()) == 6


def test_tables_with_sound_and_pictures(whole: Any, ran: Ran) -> None:
    table = whole.tables("zero_shot/clips")[-1]
    assert table.columns == ["global_step", "sample", "cer", "sound", "mel"]
    assert [row[:3] for row in table.rows] == [
        [step, *given] for step in (1, 2, 3) for given in (["a", 0.5 * step], ["b", None])
    ]
    for (step, given), first, second in zip(
        seen_by_memory(ran, "zero_shot/clips"), table.rows[::2], table.rows[1::2], strict=True
    ):
        assert step == first[0]
        same_sound(first[3], given.rows[0][2].clips[0])
        assert second[3] is None
        for row in (first, second):
            np.testing.assert_array_equal(pixels(row[4]), given.rows[0][3].pixels)


def test_a_column_that_changes_its_kind_goes_on_elsewhere(whole: Any, ran: Ran) -> None:
    assert whole.tables("health/checks")[-1].rows == [[1, "eos", 1]]
    assert whole.tables("health/checks/2")[-1].rows == [[2, "eos", "nothing"], [3, "eos", "nothing"]]
    assert "health/checks no longer fit" in ran.said("everything")


def test_sounds(whole: Any, ran: Ran) -> None:
    for (step, value), (_, record) in zip(
        whole.points("inputs/reference"), seen_by_memory(ran, "inputs/reference"), strict=True
    ):
        assert isinstance(record, Audio)
        assert [media["caption"] for media in value["audio"]] == [
            f"speaker {step}",
            "loud 1 samples were NaN or infinite and are silent here. "
            "1 samples were beyond full scale and are clipped here.",
        ]
        for media, clip in zip(value["audio"], record.clips, strict=True):
            same_sound(whole.media(media), clip)


def test_pictures(whole: Any, ran: Ran) -> None:
    for (_, value), (_, record) in zip(
        whole.points("attention/mass"), seen_by_memory(ran, "attention/mass"), strict=True
    ):
        assert isinstance(record, Image)
        np.testing.assert_array_equal(pixels(whole.media(value)), record.pixels)


def test_what_a_table_shows_is_not_sent_twice(whole: Any) -> None:
    assert whole.points("zero_shot/clip_0/generated") == []
    assert whole.points("zero_shot/clip_0/mel") == []


def test_a_rule_alerts_once_in_a_while(ran: Ran) -> None:
    alerts = ran.run("everything").alerts
    assert [(alert.title, alert.text, alert.severity) for alert in alerts] == [
        ("no end of stream", "at step 1", "ERROR"),
        ("no end of stream", "at step 1", "INFO"),
    ]


def test_without_a_key_the_run_stays_on_disk_and_says_so_once(ran: Ran) -> None:
    assert ran.said("everything_offline").count("no W&B key is configured") == 1
    assert ran.run("everything").name == "a run"
    assert ran.run("everything").config == {"lr": 0.1, "model": {"layers": 2}}


# Resuming, joining, ranks


def test_a_run_that_crashed_at_212_goes_on_from_200_without_gap_or_duplicate(ran: Ran) -> None:
    run = ran.run("crashed_and_resumed")
    steps = list(range(EVERY, END + 1, EVERY))
    assert len(run.rewinds) == 1
    assert run.points("x") == [(step, step) for step in steps]
    of = [(step, 0 if step <= CHECKPOINT else CHECKPOINT) for step in steps]
    assert run.points("train/of") == of
    tables = [table.rows[-1] for table in run.tables("t")]
    assert tables == [[step, step, attempt] for step, attempt in of]

    events = EventAccumulator(str(ran.directory / "crashed_and_resumed" / "logs"), size_guidance={"scalars": 0})
    events.Reload()
    for tag in ("x", "train/of"):
        assert [(event.step, event.value) for event in events.Scalars(tag)] == run.points(tag)


def test_without_rewinding_the_first_attempts_rows_stay_and_are_not_sent_again(ran: Ran) -> None:
    run = ran.run("crashed_and_not_rewound")
    steps = list(range(EVERY, END + 1, EVERY))
    assert run.rewinds == []
    assert run.points("x") == [(step, step) for step in steps]
    of = [(step, 0 if step <= CRASHED else CHECKPOINT) for step in steps]
    assert run.points("train/of") == of
    assert run.tables("t")[-1].rows == [[step, step, attempt] for step, attempt in of]


def test_a_run_of_the_users_is_joined_and_left_alone(ran: Ran) -> None:
    run = ran.run("mine")
    assert run.id == "mine"
    assert run.points("outputs/loss/total") == [(7, 0.5)]
    assert run.points("train/loss") == []
    assert [row["after"] for row in run.history() if "after" in row] == [1]
    assert run.config["own"] == 1
    assert run.config["lr"] == 0.1


def test_rows_of_the_owner_are_kept_in_a_run_that_is_joined(ran: Ran) -> None:
    run, steps = ran.run("rows_of_the_owner"), list(range(1, STEPS + 1))
    assert [row["_step"] for row in run.history()] == [*steps, STEPS + 1]
    assert [row["mine"] for row in run.history()] == [*steps, STEPS + 1]
    assert [row["late"] for row in run.history() if "late" in row] == steps
    for tag in ("x", "train/of"):
        assert run.points(tag) == [(step, step) for step in steps]
    assert run.tables("t")[-1].rows == [[step, step] for step in steps]
    assert run.exit_code == 0


def test_trainings_at_once_are_runs_of_their_own(ran: Ran) -> None:
    assert sorted([step for step, _ in run.points("x")] for run in ran.runs("each_its_own")) == [
        [1, 2, 3],
        [1, 2, 3, 4],
    ]
    assert [run.exit_code for run in ran.runs("each_its_own")] == [0, 0]


def test_a_run_that_the_user_finishes_in_between_goes_on(ran: Ran) -> None:
    run = ran.run("finished_in_between")
    assert run.points("x") == [(1, 1), (2, 2), (3, 3)]
    assert [row for table in run.tables("t") for row in table.rows][-1] == [3, 3]
    assert run.exit_code == 0
    assert ran.said("finished_in_between").count("was finished while training goes on") == 1


def test_two_ranks_are_one_run(ran: Ran) -> None:
    run = ran.run("two_ranks")
    assert run.clients == [""]
    assert [step for step, _ in run.points("inputs/tokens/total")] == [1, 2, 3]
    assert not [key for row in run.history() for key in row if key.startswith("rank_")]


def test_two_ranks_that_write_are_two_labelled_writers_of_one_run(ran: Ran) -> None:
    run, seen = ran.run("two_ranks_that_write"), ran.seen("two_ranks_that_write")
    assert len(run.clients) == 2
    total = run.points("inputs/tokens/total")
    assert total == [(step, record.value) for step, record in seen["inputs/tokens/total"]]
    own = [dict(run.points(f"rank_{rank}/inputs/tokens/total")) for rank in (0, 1)]
    assert [own[0][step] + own[1][step] for step in (1, 2, 3)] == [value for _, value in total]
    writers = {
        line.client
        for line in run.stream("wandb-history.jsonl")
        if any(key.startswith("rank_1/") for key in line.values)
    }
    assert len(writers) == 1
    assert [step for step, _ in run.points("train/loss")] == [1, 2, 3]


def plain(cell: Any) -> Any:
    return cell.item() if isinstance(cell, np.generic) else cell


def same_sound(data: bytes, clip: Clip) -> None:
    samples, rate = soundfile.read(io.BytesIO(data), dtype="int16", always_2d=True)
    assert rate == clip.sampling_rate
    np.testing.assert_array_equal(samples, encode_wav(clip).samples)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(PillowImage.open(io.BytesIO(data)))
