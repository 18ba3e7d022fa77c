"""``python -m dashboards status``: the right state and exit code of every kind of run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dashboards import status
from telemetry.backends.base import Run
from telemetry.backends.run_files import RunFiles
from telemetry.backends.tensorboard import TensorBoardBackend
from telemetry.records import Alert, Record, Scalar, Table

COLUMNS = ("finding", "verdict", "evidence", "what to do")


def checks(*verdicts: str) -> Table:
    rows = [(f"finding {number}", verdict, f"x = {number}", "mend it") for number, verdict in enumerate(verdicts)]
    return Table("health/checks", COLUMNS, tuple(rows))


def write(directory: Path, *steps: list[Record], close: bool = True, start: int = 0) -> TensorBoardBackend:
    backend = TensorBoardBackend()
    backend.open(Run(directory, name="voices", starting_step=start))
    for step, records in enumerate(steps, start + 1):
        backend.write(step, records)
    if close:
        backend.close()
    return backend


def killed(directory: Path, steps: str) -> None:
    """A run of another process, which is gone without a word after some steps."""
    code = (
        "import os, sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]);"
        f"from test_status import *; write(Path(sys.argv[1]), {steps}, close=False); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(directory), str(Path(__file__).parent)], check=False)


def look(directory: Path, now: float | None = None) -> status.Status:
    (found,) = status.look([directory], now)
    return found


@pytest.mark.parametrize(
    ("verdicts", "worst", "code"),
    [(["ok", "ok"], "ok", 0), (["ok", "warning"], "warning", 1), (["warning", "failing", "ok"], "failing", 2)],
)
def test_an_ended_run_has_the_exit_code_of_its_worst_verdict(
    tmp_path: Path, verdicts: list[str], worst: str, code: int
) -> None:
    write(tmp_path, [Scalar("train/loss", 2.0)], [checks(*verdicts)])
    found = look(tmp_path)
    assert (found.state, found.verdict, found.code, found.step) == ("ended", worst, code, 2)
    assert [check["verdict"] for check in found.checks] == sorted(verdicts, key=status.VERDICTS.index, reverse=True)
    assert found.checks[0] == {
        "of": "health",
        "finding": f"finding {verdicts.index(worst)}",
        "verdict": worst,
        "evidence": f"x = {verdicts.index(worst)}",
        "what_to_do": "mend it",
    }


def test_a_run_that_is_written_is_running_until_it_is_silent_for_long(tmp_path: Path) -> None:
    backend = write(tmp_path, [checks("ok")], close=False)
    backend.write(2, [Scalar("train/loss", 1.0)])
    found = look(tmp_path)
    assert (found.state, found.code) == ("running", status.WELL)
    assert found.since is not None
    later = look(tmp_path, found.since + status.LEAST_SILENCE + 1)
    assert (later.state, later.code) == ("silent", status.WARNING)
    backend.close()
    assert look(tmp_path, found.since + 1e6).state == "ended"


def test_a_run_whose_process_is_gone_was_killed(tmp_path: Path) -> None:
    killed(tmp_path, "[checks('ok')]")
    found = look(tmp_path)
    assert (found.state, found.verdict, found.code) == ("killed", "ok", status.WARNING)


def test_a_resumed_run_is_judged_by_its_newest_attempt(tmp_path: Path) -> None:
    killed(tmp_path, "[checks('ok')], [checks('failing')]")
    write(tmp_path, [checks("warning"), Scalar("train/loss", 1.0)], start=1)
    found = look(tmp_path)
    assert (found.state, found.verdict, found.step) == ("ended", "warning", 2)


def test_damage_is_said_and_what_comes_before_it_is_judged(tmp_path: Path) -> None:
    write(tmp_path, [checks("warning")], [Scalar("train/loss", 1.0)])
    (file,) = tmp_path.glob("*tfevents*")
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    found = look(tmp_path)
    assert (found.verdict, found.code) == ("warning", status.WARNING)
    assert "damaged" in found.faults[0]


def test_several_runs_have_the_worst_exit_code_and_an_empty_one_none(tmp_path: Path) -> None:
    write(tmp_path / "one", [checks("ok")])
    write(tmp_path / "two", [checks("failing")])
    (tmp_path / "none").mkdir()
    found = status.look([tmp_path / "one", tmp_path / "two", tmp_path / "none", tmp_path / "nowhere"])
    assert [one.code for one in found] == [0, 2, 3, 3]
    assert status.exit_code(found) == status.FAILING
    assert status.exit_code(found[2:]) == status.NO_DATA
    assert status.exit_code([]) == status.NO_DATA


def test_numbers_say_how_they_moved_since_the_last_evaluation(tmp_path: Path) -> None:
    def evaluated(loss: float, wer: float) -> list[Record]:
        return [Scalar("eval/loss", loss), Scalar("zero_shot/wer", wer)]

    write(
        tmp_path,
        [Scalar("train/loss", 5.0), Scalar("outputs/accuracy/audio", 0.1), *evaluated(4.0, 0.9)],
        [Scalar("train/loss", 4.0), Scalar("outputs/accuracy/audio", 0.2)],
        [*evaluated(4.5, 0.5)],
        [Scalar("train/loss", 4.25), Scalar("outputs/accuracy/audio", 0.2)],
        [Scalar("train/loss", float("nan"))],
    )
    numbers = {one.tag: (one.step, one.value, one.before, one.direction) for one in look(tmp_path).numbers}
    assert numbers == {
        "train/loss": (5, "nan", 4.0, ""),
        "eval/loss": (3, 4.5, 4.0, "worse"),
        "outputs/accuracy/audio": (4, pytest.approx(0.2), pytest.approx(0.2), "same"),
        "zero_shot/wer": (3, 0.5, pytest.approx(0.9), "better"),
    }


def test_without_event_files_the_run_s_own_file_is_read(tmp_path: Path) -> None:
    files = RunFiles()
    files.open(Run(tmp_path / "logs", name="voices", output_dir=tmp_path))
    files.write(3, [checks("warning", "ok"), Scalar("train/loss", 1.5), Alert("health/alerts", "fault", "text")])
    (tmp_path / "checkpoint-3").mkdir()
    files.saved(tmp_path / "checkpoint-3")
    found = look(tmp_path)
    assert (found.name, found.state, found.step, found.code) == ("voices", "running", 3, status.WARNING)
    assert [(one.tag, one.value) for one in found.numbers] == [("train/loss", 1.5)]
    files.close()
    assert look(tmp_path).state == "ended"
    (tmp_path / "health.json").write_text("{")
    assert look(tmp_path).code == status.NO_DATA
    assert "damaged" in look(tmp_path).faults[0]


def test_the_json_has_its_documented_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dashboards.__main__ import main

    write(tmp_path, [checks("warning"), Scalar("train/loss", float("inf")), Alert("health/alerts", "fault", "why")])
    with pytest.raises(SystemExit) as ended:
        main(["status", str(tmp_path), "--json"])
    assert ended.value.code == status.WARNING
    said = json.loads(capsys.readouterr().out)
    documented = (Path(status.__file__).parents[1] / "docs" / "alerts.md").read_text()
    assert said["version"] == status.VERSION
    assert said["exit_code"] == status.WARNING
    (run,) = said["runs"]
    assert run["alerts"] == [{"step": 1, "level": "warning", "title": "fault", "text": "why"}]
    for key in (*said, *run, *run["numbers"][0], *run["alerts"][0]):
        assert f"`{key}`" in documented, key


def test_what_is_shown_answers_in_one_look_and_steers_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dashboards.__main__ import main

    hostile = Table("health/checks", COLUMNS, (("\x1b[31mred", "failing", "[bold]x[/]\x07", "mend\u202e it"),))
    write(tmp_path, [hostile, Scalar("train/loss", 2.0)])
    with pytest.raises(SystemExit) as ended:
        main(["status", str(tmp_path)])
    assert ended.value.code == status.FAILING
    said = capsys.readouterr().out
    assert said.splitlines()[0].startswith(f"FAILING  {tmp_path.name}: ended, step 1")
    assert "[bold]x[/]" in said
    assert not {"\x1b", "\x07", "\u202e"} & {*said}


def test_following_ends_with_the_run(tmp_path: Path) -> None:
    backend = write(tmp_path, [checks("ok")], close=False)
    environment = {**os.environ, "COLUMNS": "120"}
    following = subprocess.Popen(
        [sys.executable, "-m", "dashboards", "status", str(tmp_path), "--follow"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(status.__file__).parents[1],
    )
    assert following.poll() is None
    backend.write(2, [checks("failing")])
    backend.close()
    said, _ = following.communicate(timeout=120)
    assert following.returncode == status.FAILING
    assert "FAILING" in said
