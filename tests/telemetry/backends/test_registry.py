"""Every registered backend: is what it says, shows every kind of record, and is in the documents."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest
from contract_run import MARKS, SECRETS
from support import programs
from support.wandb_server import client_environment

import telemetry
from dashboards.report.page import render
from dashboards.runs import read_runs
from telemetry.backends.registry import BACKENDS, DESTINATIONS, backends_for, default_backends, make_backend
from telemetry.backends.trackio import TrackioBackend
from telemetry.backends.wandb import WandbBackend
from trainer.arguments import DESTINATIONS as CHOICES

ROOT = Path(__file__).parents[3]


def names(backends: Sequence[object]) -> list[str]:
    return [backend.name for backend in backends]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory a backend, with everything that it wrote and logged."""
    root = tmp_path_factory.mktemp("contract")
    environment = client_environment("http://127.0.0.1:9", root / "wandb", WANDB_MODE="offline")
    program = [str(Path(__file__).with_name("contract_run.py")), str(root)]
    ended = programs.run(program, root, TRACKIO_DIR=str(root / "trackio"), **environment)
    assert ended.status == 0, ended.said
    return root


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_shows_every_kind_of_record(name: str, ran: Path) -> None:
    assert (ran / name / "lost").read_text() == "0", (ran / name / "log").read_text()
    shown = b"".join(path.read_bytes() for path in (ran / name).rglob("*") if path.is_file())
    assert [mark for mark in MARKS if mark.encode() not in shown] == []


def test_no_destination_is_given_a_secret(ran: Path) -> None:
    files = {path: path.read_bytes() for path in ran.rglob("*") if path.is_file()}
    assert sum(b"&lt;redacted" in data or b"<redacted" in data or b"redacted&#" in data for data in files.values()) >= 4
    secrets = [secret.encode() for secret in SECRETS.values()]
    assert [path for path, data in files.items() if any(secret in data for secret in secrets)] == []
    page, _ = render(read_runs([ran / "tensorboard" / "logs"]))
    assert "redacted" in page
    assert not any(secret in page for secret in SECRETS.values())


def test_public_backends_are_registered_under_their_names() -> None:
    registered = {type(make_backend(name)) for name in BACKENDS}
    public = {getattr(telemetry, name) for name in telemetry.__all__ if name.endswith("Backend")}
    assert public <= registered
    assert [make_backend(name).name for name in BACKENDS] == list(BACKENDS)


def test_extras_are_those_of_the_package() -> None:
    offered = metadata.metadata("strategic-telemetry").get_all("Provides-Extra") or []
    assert {backend.extra for backend in BACKENDS.values()} - {""} <= set(offered)


def test_a_new_process_imports_no_client_for_the_names() -> None:
    heavy = {"torch", "wandb", "trackio", "rich"}
    code = f"import sys, telemetry; telemetry.DESTINATIONS; print(*{heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "\n"


def test_the_script_offers_the_destinations() -> None:
    assert (*DESTINATIONS, "all", "none") == CHOICES  # written out there: it imports no telemetry without being asked


@pytest.mark.parametrize(
    ("report_to", "expected"),
    [
        ([], []),
        (["none"], []),
        (["all"], ["tensorboard", "wandb"]),
        (["all", "trackio"], ["tensorboard", "wandb", "trackio"]),
        (["wandb", "tensorboard", "wandb"], ["tensorboard", "wandb"]),
    ],
)
def test_the_console_and_what_is_named_are_made(report_to: list[str], expected: list[str]) -> None:
    assert names(backends_for(report_to)) == ["console", *expected]


def test_an_unknown_destination_is_named() -> None:
    said = r"^unknown destinations \['fax'\]: choose from tensorboard, wandb, trackio, all, none$"
    with pytest.raises(ValueError, match=said):
        backends_for(["tensorboard", "fax"])


def test_options_go_where_they_are_taken() -> None:
    *_, wandb, trackio = backends_for(["all", "trackio"], every_rank=True, trainer_logs=False)
    assert isinstance(wandb, WandbBackend)
    assert isinstance(trackio, TrackioBackend)
    assert (wandb.every_rank, wandb._trainer_logs, trackio._trainer_logs) == (True, False, False)


@pytest.mark.parametrize(
    ("report_to", "expected"),
    [
        ([], ["tensorboard"]),
        (["mlflow"], ["tensorboard"]),
        (["wandb"], ["wandb"]),
        (["trackio", "mlflow", "tensorboard"], ["tensorboard", "trackio"]),
    ],
)
def test_by_default_a_trainers_own_destinations_are_made_without_its_logs(
    report_to: list[str], expected: list[str]
) -> None:
    made = default_backends(report_to)
    assert names(made) == ["console", *expected]
    assert not any(getattr(backend, "_trainer_logs", False) for backend in made)


def test_the_document_lists_them() -> None:
    lines = ["| `--report_to` | in `all` | class | install | open |", "| --- | --- | --- | --- | --- |"]
    for name, backend in BACKENDS.items():
        cells = (
            f"`{name}`" if backend.reported else "",
            "yes" if backend.in_all else "",
            f"`{backend.home.partition(':')[2]}`",
            f"`pip install 'strategic-telemetry[{backend.extra}]'`" if backend.extra else "",
            backend.opened,
        )
        lines.append(f"| {' | '.join(cells)} |")
    assert "\n".join(lines) in (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
