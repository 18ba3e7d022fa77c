"""The W&B workspace: built and validated offline, and sent to a server that is read back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.wandb_server import Fault, Server, serve
from wandb_workspaces.workspaces import Workspace, internal

from dashboards.workspace import TITLE, workspace
from telemetry.charts import QUESTIONS

ROOT = Path(__file__).parents[2]


def spec(view: internal.View) -> str:
    return view.spec.model_dump_json(by_alias=True, exclude_none=True)


def test_it_has_a_section_a_question_and_a_panel_a_chart() -> None:
    built = workspace("team", "voices")
    assert [section.name for section in built.sections] == [question.title for question in QUESTIONS]
    for section, question in zip(built.sections, QUESTIONS, strict=True):
        titles = [getattr(panel, "title", None) for panel in section.panels]
        assert titles[: len(question.charts)] == [chart.title for chart in question.charts]
    regexes = [panel.metric_regex for section in built.sections for panel in section.panels[:1]]
    assert all(regex.startswith("^") and regex.endswith("$") for regex in regexes)


def test_it_shows_tables_and_pictures_of_the_catalogue() -> None:
    panels = [panel for section in workspace("team", "voices").sections for panel in section.panels]
    assert {"zero_shot/clips", "health/checks"} <= {getattr(panel, "table_name", None) for panel in panels}
    assert ["attention/mass", "attention/heads"] in [getattr(panel, "media_keys", None) for panel in panels]


def test_it_is_the_same_at_every_call_and_survives_the_way_to_a_server_and_back() -> None:
    view = workspace("team", "voices")._to_model()
    assert spec(workspace("team", "voices")._to_model()) == spec(view)
    read = view.model_copy(update={"spec": internal.WorkspaceViewspec.model_validate_json(spec(view))})
    assert spec(Workspace._from_model(read)._to_model()) == spec(view)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("server")) as running:
        yield running


def command(server: Server, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dashboards", *arguments],
        cwd=ROOT,
        env={**os.environ, **server.environment(directory)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def start_project(server: Server, directory: Path) -> None:
    code = "import wandb; wandb.init(entity='stand-in', project='voices').finish()"
    environment = {**os.environ, **server.environment(directory)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120, cwd=directory)


def test_the_second_call_changes_nothing_and_an_old_workspace_is_brought_up_to_date(
    server: Server, tmp_path: Path
) -> None:
    start_project(server, tmp_path)
    entity = server.run().entity
    publish = ("wandb", "--entity", entity, "--project", "voices")
    assert "not found" in command(server, tmp_path, *publish[:-1], "nowhere").stderr
    first = command(server, tmp_path, *publish)
    assert first.stdout.startswith("created: http"), first.stderr
    (held,) = server.views()
    assert held.display_name == TITLE
    built = workspace(entity, "voices")._to_model().spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert held.spec == built
    assert command(server, tmp_path, *publish).stdout.startswith("unchanged: ")
    assert server.views() == [held]

    environment = {**os.environ, **server.environment(tmp_path)}
    spoil = (
        "from dashboards.workspace import workspace\n"
        f"old = workspace({entity!r}, 'voices'); old._internal_id = {held.id!r}; old.sections.pop(); old.save()"
    )
    subprocess.run([sys.executable, "-c", spoil], cwd=ROOT, env=environment, check=True, timeout=120)
    assert server.views() != [held]
    assert command(server, tmp_path, *publish).stdout.startswith("updated: ")
    assert server.views() == [held]


def test_a_server_that_refuses_is_one_line(server: Server, tmp_path: Path) -> None:
    server.fail(Fault("graphql", status=401))
    ended = command(server, tmp_path, "wandb", "--entity", "e", "--project", "p")
    server.heal()
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: e/p: ")
    assert "Traceback" not in ended.stderr
