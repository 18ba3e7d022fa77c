"""The Weights & Biases workspace: one section a question, made from the declared charts and the catalogue."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import wandb_workspaces.workspaces as ws
from wandb_workspaces.reports.v2.interface import LinePlot, MediaBrowser, WeavePanelSummaryTable
from wandb_workspaces.workspaces import internal

from telemetry.catalogue import CATALOGUE, SECTIONS
from telemetry.charts import QUESTIONS, Question, anchored, expanded

TITLE = "Strategic telemetry"
STEP = "train/global_step"

# Views are found again by this name: the second call updates what the first one made.
_VIEW = "nw-strategictelemetry-v"
_NAMES = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")


@dataclass(frozen=True)
class Published:
    """What :func:`publish` did.

    Attributes:
        url: where the workspace is.
        change: "created", "updated" or "unchanged".
    """

    url: str
    change: str


def workspace(entity: str, project: str) -> ws.Workspace:
    """The workspace, equal at every call.

    Args:
        entity: user or team.
        project: W&B project.
    """
    built = ws.Workspace(
        entity=entity,
        project=project,
        name=TITLE,
        sections=[_section(question, first=index == 0) for index, question in enumerate(QUESTIONS)],
        settings=ws.WorkspaceSettings(x_axis=STEP, group_by_prefix="first"),
    )
    built._internal_name = _VIEW
    return built


def publish(entity: str, project: str) -> Published:
    """Create the workspace, or update it where it is not as it should be.

    Raises:
        ValueError: when there is no such project, or it may not be seen.
    """
    built = workspace(entity, project)
    held = _held(entity, project)
    if held is not None:
        built._internal_id = held.id
        if _shown(held) == _shown(built._to_model()):
            return Published(built.url, "unchanged")
    built.save()
    return Published(built.url, "created" if held is None else "updated")


def _held(entity: str, project: str) -> internal.View | None:
    """The view as the server holds it; None before the first time."""
    try:
        return internal.View.from_name(entity, project, _VIEW)
    except ValueError as error:
        if str(error).startswith("Workspace"):
            return None
        raise


def _shown(view: internal.View) -> Any:
    return view.display_name, view.spec.model_dump(mode="json", by_alias=True, exclude_none=True)


def _section(question: Question, first: bool) -> ws.Section:
    plots = [
        LinePlot(title=chart.title, x=STEP, metric_regex="|".join(map(anchored, chart.tags)))
        for chart in question.charts
    ]
    shown = [*plots, *_media(question.section)]
    for panel in shown:
        # The library gives panels a random name, by which every call would change the workspace.
        panel._id = uuid.uuid5(_NAMES, f"{question.section} {panel!r}").hex[:11]
    settings = ws.SectionPanelSettings(x_axis=STEP)
    return ws.Section(name=question.title, panels=shown, is_open=first, panel_settings=settings)


def _media(section: str) -> Iterator[Any]:
    """Tables and pictures of a section. Sounds are cells of its tables."""
    images = list(_tags(section, "image"))
    if images:
        yield MediaBrowser(title=SECTIONS[section], media_keys=images, num_columns=1)
    for tag in _tags(section, "table"):
        yield WeavePanelSummaryTable(table_name=tag)


def _tags(section: str, kind: str) -> Iterator[str]:
    """Tags of one kind that are written out in the catalogue, without a part that only a run knows."""
    for entry in CATALOGUE:
        if entry.section == section and entry.kind == kind and "<" not in entry.tag:
            yield from expanded(entry.tag)
