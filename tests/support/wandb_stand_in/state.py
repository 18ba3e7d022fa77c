"""What a stand-in W&B server has been told: a fold over the requests that it has accepted, and how tests read it."""

from __future__ import annotations

import base64
import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

JOURNAL = "journal.jsonl"
BLOBS = "blobs"
HISTORY, SUMMARY, EVENTS, OUTPUT = "wandb-history.jsonl", "wandb-summary.json", "wandb-events.jsonl", "output.log"
ENTITY = "stand-in"
DEFAULT_PROJECT = "uncategorized"

Entry = dict[str, Any]
RunKey = tuple[str, str, str]


@dataclass
class Line:
    """One line of a streamed file.

    Attributes:
        text: as sent.
        client: which writer of a shared run sent it, or empty.
        offset: its place in the writer's file, which only a rewind changes.
        arrived: seconds since the epoch when the server had it.
    """

    text: str
    client: str
    offset: int
    arrived: float

    @property
    def values(self) -> dict[str, Any]:
        """The line as a JSON object; NaN and infinities are Python's."""
        return json.loads(self.text)


@dataclass
class Alert:
    """A notification that a run asked for. ``wait_seconds``: the least time between two of its title."""

    title: str
    text: str
    severity: str
    wait_seconds: float


@dataclass
class Table:
    """One table as people would see it after one log.

    Attributes:
        key: its tag.
        step: ``_step`` of the history row that shows it.
        columns: their names.
        rows: all rows up to this log, those of earlier increments first. A media cell is the bytes of its file.
    """

    key: str
    step: int
    columns: list[str]
    rows: list[list[Any]]


@dataclass
class Artifact:
    """One version of an artifact.

    Attributes:
        files: path in the artifact to its bytes; what the manifest names and the server does not have is missing here.
        manifest: path to the manifest's entry (digest, size, perhaps ``ref``).
    """

    id: str
    name: str
    type: str
    run: str
    digest: str
    client_id: str
    aliases: list[str]
    version: int
    committed: bool = False
    manifest: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        """Files that the manifest names and that never came."""
        return sorted(path for path, entry in self.manifest.items() if "ref" not in entry and path not in self.files)


@dataclass
class Run:
    """One run, with everything that reached the server.

    Attributes:
        files: name to bytes of what was uploaded (media, metadata, the console's output).
        exit_code: what the run ended with, None while it has not said that it ended.
        upserts: what the client said of the run, in order (display name, group, tags, notes, configuration, ...).
        artifacts: in the order of their making.
        rewinds: the ``_step`` of each rewind.
    """

    entity: str
    project: str
    id: str
    upserts: list[dict[str, Any]] = field(default_factory=list)
    lines: dict[tuple[str, str], dict[int, Line]] = field(default_factory=lambda: defaultdict(dict))
    files: dict[str, bytes] = field(default_factory=dict)
    artifacts: list[Artifact] = field(default_factory=list)
    alerts: list[Alert] = field(default_factory=list)
    rewinds: list[float] = field(default_factory=list)
    exit_code: int | None = None

    def attribute(self, name: str) -> Any:
        """The last value that the client gave a field of the run (``displayName``, ``groupName``, ``tags``, ...)."""
        return next((said[name] for said in reversed(self.upserts) if said.get(name) not in (None, "", [])), None)

    @property
    def name(self) -> str:
        """As people see it."""
        return self.attribute("displayName") or self.id

    @property
    def raw_config(self) -> dict[str, Any]:
        """``{key: {"value": ...}}``, as sent, W&B's own key ``_wandb`` included."""
        return json.loads(self.attribute("config") or "{}")

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as the user set it."""
        return {key: entry["value"] for key, entry in self.raw_config.items() if key != "_wandb"}

    @property
    def clients(self) -> list[str]:
        """Writers of a shared run's history; one empty name for a run of one."""
        return sorted({client for name, client in self.lines if name == HISTORY})

    def stream(self, name: str) -> list[Line]:
        """Lines of a streamed file: each writer's in order, writers' among each other as they arrived."""
        lines = [line for (of, _), held in self.lines.items() if of == name for line in held.values()]
        # A writer's own order is that of its offsets, even where a retry came late.
        arrived: dict[str, float] = defaultdict(float)
        keyed = []
        for line in sorted(lines, key=lambda line: line.offset):
            arrived[line.client] = max(arrived[line.client], line.arrived)
            keyed.append((arrived[line.client], line))
        return [line for _, line in sorted(keyed, key=lambda pair: pair[0])]

    def history(self) -> list[dict[str, Any]]:
        """Rows in order, each a JSON object with ``_step``, ``_timestamp`` and what was logged."""
        return [line.values for line in self.stream(HISTORY)]

    def points(self, key: str, axis: str = "train/global_step") -> list[tuple[Any, Any]]:
        """``(axis, value)`` of a key, in the order of the rows."""
        return [(row.get(axis), row[key]) for row in self.history() if key in row]

    @property
    def summary(self) -> dict[str, Any]:
        """The newest summary that was streamed, of every writer together."""
        merged: dict[str, Any] = {}
        for line in self.stream(SUMMARY):
            merged |= line.values
        return merged

    @property
    def output(self) -> str:
        """The console, as streamed."""
        return "\n".join(line.text for line in self.stream(OUTPUT))

    def media(self, value: Mapping[str, Any]) -> bytes:
        """The file that a media value (audio, image) in a history row, the summary or a table's cell points to.

        Raises:
            KeyError: when it never reached the server.
        """
        return self.files[value["path"]]

    def tables(self, key: str) -> list[Table]:
        """A table after each of its logs.

        Raises:
            KeyError: when a table, an earlier increment or a cell's file never reached the server.
        """
        return [
            self._table(key, row["_step"], row[key])
            for row in self.history()
            if isinstance(row.get(key), dict) and row[key]["_type"] in ("table-file", "incremental-table-file")
        ]

    def _table(self, key: str, step: int, value: Mapping[str, Any]) -> Table:
        paths = [*value.get("previous_increments_paths", ()), value["artifact_path"]]
        columns: list[str] = []
        rows: list[list[Any]] = []
        for path in paths:
            client_id, _, name = path.removeprefix("wandb-client-artifact://").partition("/")
            artifact = self._artifact(client_id)
            part = json.loads(artifact.files[name])
            columns = part["columns"]
            rows += [[_resolved(cell, artifact) for cell in row] for row in part["data"]]
        return Table(key, step, columns, rows)

    def _artifact(self, client_id: str) -> Artifact:
        for artifact in self.artifacts:
            if artifact.client_id == client_id and artifact.committed:
                return artifact
        raise KeyError(f"no committed artifact {client_id}")


def _resolved(cell: Any, artifact: Artifact) -> Any:
    is_media = isinstance(cell, dict) and str(cell.get("_type", "")).endswith("-file")
    return artifact.files[cell["path"]] if is_media else cell


@dataclass
class View:
    """A saved workspace."""

    id: str
    entity: str
    project: str
    name: str
    display_name: str
    spec: dict[str, Any]


class State:
    """What the accepted requests come to.

    Attributes:
        views: saved workspaces, by id.
        unknown: GraphQL operations that the stand-in had no answer to.
        refused: ``(kind, status)`` of requests that an injected fault turned away.
    """

    def __init__(self, blobs: Path) -> None:
        self._blobs = blobs
        self._runs: dict[RunKey, Run] = {}
        self._artifacts: dict[str, Artifact] = {}
        self.views: dict[str, View] = {}
        self.unknown: list[str] = []
        self.refused: list[tuple[str, int]] = []

    def runs(self) -> list[Run]:
        """In the order of their making."""
        return list(self._runs.values())

    def run(self, run_id: str | None = None) -> Run:
        """The run of an id; without one, the only run.

        Raises:
            KeyError: when it is not there, or there is not one alone.
        """
        found = [run for run in self._runs.values() if run_id in (None, run.id)]
        if len(found) != 1:
            raise KeyError(f"runs on the server: {[run.id for run in self._runs.values()]}, asked for {run_id}")
        return found[0]

    def existing(self, entity: str | None, project: str | None, run_id: str) -> Run | None:
        """The run, where it has been made."""
        return self._runs.get(_key(entity, project, run_id))

    def artifact(self, artifact_id: str) -> Artifact:
        return self._artifacts[artifact_id]

    def latest(self, name: str, before: Artifact) -> Artifact | None:
        """The newest committed version of an artifact of a name, other than one."""
        versions = [made for made in self._artifacts.values() if made.name == name and made.committed]
        return next((made for made in reversed(versions) if made is not before), None)

    def apply(self, entry: Entry) -> Any:
        """Take in one journal entry; the thing that it made or changed."""
        return getattr(self, f"_apply_{entry['kind']}")(entry)

    def _make_run(self, entity: str | None, project: str | None, run_id: str) -> Run:
        key = _key(entity, project, run_id)
        return self._runs.setdefault(key, Run(*key))

    def _run_of(self, said: Mapping[str, Any]) -> Run:
        return self._make_run(said.get("entityName"), said.get("projectName"), said["runName"])

    def _apply_refused(self, entry: Entry) -> None:
        self.refused.append((entry["of"], entry["status"]))

    def _apply_unknown(self, entry: Entry) -> None:
        self.unknown.append(entry["operation"])

    def _apply_upsert(self, entry: Entry) -> Run:
        said = entry["variables"]
        run = self._make_run(said.get("entity"), said.get("project"), said["name"])
        run.upserts.append(said)
        return run

    def _apply_rewind(self, entry: Entry) -> Run | None:
        said = entry["variables"]
        run = self.existing(said.get("entity"), said.get("project"), said["runName"])
        if run is None:
            return None
        run.rewinds.append(said["metricValue"])
        for (name, client), lines in list(run.lines.items()):
            if name == HISTORY:
                kept = [line for _, line in sorted(lines.items()) if line.values["_step"] <= said["metricValue"]]
                run.lines[name, client] = {
                    at: Line(line.text, client, at, line.arrived) for at, line in enumerate(kept)
                }
        return run

    def _apply_stream(self, entry: Entry) -> Run:
        run = self._make_run(entry["entity"], entry["project"], entry["run"])
        client = entry["client"]
        for name, chunk in (entry["body"].get("files") or {}).items():
            held = run.lines[name, client]
            for at, text in enumerate(chunk["content"], start=chunk["offset"]):
                # A chunk sent again after a lost answer says the same at the same place.
                held[at] = Line(text, client, at, entry["at"])
        if entry["body"].get("complete"):
            run.exit_code = entry["body"].get("exitcode", 0)
        return run

    def _apply_alert(self, entry: Entry) -> Run:
        said = entry["variables"]
        run = self._run_of(said)
        # The client counts milliseconds.
        wait_seconds = (said.get("waitDuration") or 0) / 1000
        run.alerts.append(Alert(said["title"], said["text"], said["severity"], wait_seconds))
        return run

    def _apply_artifact(self, entry: Entry) -> Artifact:
        said = entry["variables"]["input"]
        name = said["artifactCollectionName"]
        same = [made for made in self._artifacts.values() if made.name == name]
        artifact = Artifact(
            id=entry["id"],
            name=name,
            type=said["artifactTypeName"],
            run=said["runName"],
            digest=said["digest"],
            client_id=said.get("clientID") or "",
            aliases=[alias["alias"] for alias in said.get("aliases") or ()],
            version=len(same),
        )
        self._artifacts[artifact.id] = artifact
        self._run_of(said).artifacts.append(artifact)
        return artifact

    def _apply_commit(self, entry: Entry) -> Artifact:
        artifact = self._artifacts[entry["variables"]["artifactID"]]
        artifact.committed = True
        return artifact

    def _apply_upload(self, entry: Entry) -> None:
        blob = (self._blobs / entry["blob"]).read_bytes()
        kind, *where = entry["where"]
        if kind == "run":
            entity, project, run_id, name = where
            self._make_run(entity, project, run_id).files[name] = blob
        elif kind == "manifest":
            self._artifacts[where[0]].manifest = json.loads(blob)["contents"]
        else:
            artifact_id, name = where
            self._artifacts[artifact_id].files[name] = blob

    def _apply_view(self, entry: Entry) -> View:
        said = entry["variables"]
        view = View(
            id=said.get("id") or f"view-{len(self.views)}",
            entity=said["entityName"],
            project=said["projectName"],
            name=said["name"],
            display_name=said.get("displayName") or "",
            spec=json.loads(said["spec"]),
        )
        self.views[view.id] = view
        return view


def _key(entity: str | None, project: str | None, run_id: str) -> RunKey:
    """Where a client names no entity or project, the server takes the user's own."""
    return entity or ENTITY, project or DEFAULT_PROJECT, run_id


class Journal:
    """Accepted requests as JSON lines, and their blobs beside them. Survives the process that writes it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / JOURNAL
        self.blobs = directory / BLOBS

    def entries(self) -> Iterator[Entry]:
        """In order; a line that a killed server did not finish is left out."""
        if self.path.exists():
            for line in self.path.read_bytes().splitlines(keepends=True):
                if line.endswith(b"\n"):
                    yield json.loads(line)

    def state(self) -> State:
        """What it comes to."""
        state = State(self.blobs)
        for entry in self.entries():
            state.apply(entry)
        return state

    def take_in(self, other: Journal) -> None:
        """Have what another server was told too: for one server that takes the place of several."""
        self.blobs.mkdir(parents=True, exist_ok=True)
        for blob in other.blobs.glob("*"):
            shutil.copyfile(blob, self.blobs / blob.name)
        with self.path.open("a") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in other.entries())

    def find(self, *secrets: str) -> dict[str, list[str]]:
        """Each text that is found anywhere in what the server was sent, and where.

        Looks through every accepted request, every blob and every file's name, also as base64 and JSON would write it.
        """
        files = [path for path in sorted(self.directory.rglob("*")) if path.is_file()]
        contents = {str(path.relative_to(self.directory)): path.read_bytes() for path in files}
        found: dict[str, list[str]] = {}
        for secret in secrets:
            forms = _forms(secret)
            places = [name for name, content in contents.items() if any(form in content for form in forms)]
            if places:
                found[secret] = places
        return found


def _forms(text: str) -> Sequence[bytes]:
    """A text as it may stand in a file: itself, as JSON, as JSON in JSON, and in base64."""
    once = json.dumps(text)[1:-1]
    twice = json.dumps(once)[1:-1]
    return [text.encode(), once.encode(), twice.encode(), base64.b64encode(text.encode()).rstrip(b"=")]
