"""The answers that the W&B client 0.31 needs to its GraphQL operations."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from .state import ENTITY, EVENTS, HISTORY, OUTPUT, Artifact, Entry, Run, State

Variables = dict[str, Any]
Apply = Callable[[Entry], Any]

_OPERATION = re.compile(r"\b(?:query|mutation)\s+(\w+)")


def operation(query: str) -> str:
    """The name of a document's operation, or empty."""
    found = _OPERATION.search(query)
    return found[1] if found else ""


class Answers:
    """Answers operations; what they change goes through ``apply``, which keeps a journal.

    Args:
        state: what there is.
        apply: takes in a journal entry and gives what it made.
        address: the server's own, for upload URLs.
    """

    def __init__(self, state: State, apply: Apply, address: str) -> None:
        self._state, self._apply, self._address = state, apply, address

    def answer(self, name: str, variables: Variables) -> dict[str, Any] | None:
        """The ``data`` of an answer, None for an operation that is not known."""
        answering = getattr(self, f"_answer_{name}", None)
        if answering is None:
            self._apply({"kind": "unknown", "operation": name, "variables": variables})
            return None
        return answering(variables)

    def _upload_url(self, *where: str) -> str:
        return "/".join([f"{self._address}/upload", *(quote(part, safe="") for part in where)])

    def _answer_Viewer(self, _: Variables) -> dict[str, Any]:  # noqa: N802
        team = {"node": {"id": ENTITY, "name": ENTITY}}
        viewer = {
            "id": "viewer",
            "entity": ENTITY,
            "username": ENTITY,
            "name": ENTITY,
            "email": "stand-in@example.com",
            "admin": False,
            "flags": "{}",
            "teams": {"edges": [team]},
            "apiKeys": {"edges": []},
        }
        return {"viewer": viewer}

    def _answer_ServerFeaturesQuery(self, _: Variables) -> dict[str, Any]:  # noqa: N802
        return {"serverInfo": {"features": []}}

    # -- runs ---------------------------------------------------------------------------------------------------------

    def _answer_UpsertBucket(self, variables: Variables) -> dict[str, Any]:  # noqa: N802
        said = {name: value for name, value in variables.items() if value is not None}
        inserted = self._state.existing(said.get("entity"), said.get("project"), said["name"]) is None
        run = self._apply({"kind": "upsert", "variables": said})
        # Only a client that resumes names the bucket: W&B has any other overwrite a run that is there already.
        bucket = _bucket(run) if said.get("id") else {**_bucket(run), "historyLineCount": 0}
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _answer_RewindRun(self, variables: Variables) -> dict[str, Any]:  # noqa: N802
        run = self._apply({"kind": "rewind", "variables": variables})
        return {"rewindRun": {"rewoundRun": _bucket(run) if run else None}}

    def _answer_RunResumeStatus(self, variables: Variables) -> dict[str, Any]:  # noqa: N802
        run = self._state.existing(variables.get("entity"), variables.get("project"), variables["name"])
        if run is None:
            return {"model": None}
        bucket = _bucket(run)
        return {"model": {**bucket["project"], "bucket": {**bucket, **_resumable(run)}}}

    def _answer_CreateRunFiles(self, variables: Variables) -> dict[str, Any]:  # noqa: N802
        where = ("run", variables["entity"], variables["project"], variables["run"])
        files = [{"name": name, "uploadUrl": self._upload_url(*where, name)} for name in variables["files"]]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}

    def _answer_MarkRunFilesUploaded(self, _: Variables) -> dict[str, Any]:  # noqa: N802
        return {"markRunFilesUploaded": {"success": True}}

    def _answer_NotifyScriptableRunAlert(self, variables: Variables) -> dict[str, Any]:  # noqa: N802
        self._apply({"kind": "alert", "variables": variables})
        return {"notifyScriptableRunAlert": {"success": True}}

    # -- artifacts ----------------------------------------------------------------------------------------------------

    def _answer_ArtifactType(self, _: Variables) -> dict[str, Any]:  # noqa: N802
        return {"project": {"artifact": None}}

    def _answer_FetchArtifactDigestAlgorithm(self, _: Variables) -> dict[str, Any]:  # noqa: N802
        return {"project": {"artifactType": None}}

    def _answer_CreateArtifact(self, variables: Variables) -> dict[str, Any]:  # noqa: N802
        made: Artifact = self._apply({"kind": "artifact", "id": f"artifact-{uuid.uuid4().hex}", "variables": variables})
        latest = self._state.latest(made.name, made)
        sequence = {"id": made.name, "latestArtifact": {"id": latest.id} if latest else None}
        artifact = {"id": made.id, "state": "PENDING", "artifactSequence": sequence}
        return {"createArtifact": {"artifact": artifact}}

    def _answer_CreateArtifactManifest(self, variables: Variables) -> dict[str, Any]:  # noqa: N802
        return {"createArtifactManifest": {"artifactManifest": self._manifest(variables["artifactID"])}}

    def _answer_UpdateArtifactManifest(self, variables: Variables) -> dict[str, Any]:  # noqa: N802
        artifact_id = variables["artifactManifestID"].removeprefix("manifest-of-")
        return {"updateArtifactManifest": {"artifactManifest": self._manifest(artifact_id)}}

    def _manifest(self, artifact_id: str) -> dict[str, Any]:
        manifest_id = f"manifest-of-{artifact_id}"
        file = {"id": manifest_id, "uploadUrl": self._upload_url("manifest", artifact_id), "uploadHeaders": []}
        return {"id": manifest_id, "file": file}

    def _answer_CreateArtifactFiles(self, variables: Variables) -> dict[str, Any]:  # noqa: N802
        edges = [{"node": self._artifact_file(file)} for file in variables["input"]["artifactFiles"]]
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _artifact_file(self, file: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "name": file["name"],
            "storagePath": None,
            "uploadUrl": self._upload_url("artifact", file["artifactID"], file["name"]),
            "uploadHeaders": [],
            "uploadMultipartUrls": None,
            "artifact": {"id": file["artifactID"]},
        }

    def _answer_CommitArtifact(self, variables: Variables) -> dict[str, Any]:  # noqa: N802
        artifact: Artifact = self._apply({"kind": "commit", "variables": variables})
        return {"commitArtifact": {"artifact": {"id": artifact.id, "digest": artifact.digest}}}

    # -- workspaces ---------------------------------------------------------------------------------------------------

    def _answer_UpsertView2(self, variables: Variables) -> dict[str, Any]:  # noqa: N802
        inserted = variables.get("id") not in self._state.views
        view = self._apply({"kind": "view", "variables": variables})
        return {"upsertView": {"view": {"id": view.id, "name": view.name}, "inserted": inserted}}

    def _answer_View(self, variables: Variables) -> dict[str, Any]:  # noqa: N802
        asked = (variables["entityName"], variables["projectName"], variables["viewName"])
        edges = [
            {"node": {"id": view.id, "displayName": view.display_name, "spec": json.dumps(view.spec)}}
            for view in self._state.views.values()
            if (view.entity, view.project, view.name) == asked
        ]
        known = {(run.entity, run.project) for run in self._state.runs()}
        return {"project": {"allViews": {"edges": edges}} if asked[:2] in known else None}


def _bucket(run: Run) -> dict[str, Any]:
    project = {"id": run.project, "name": run.project, "entity": {"id": run.entity, "name": run.entity}}
    return {
        "id": run.id,
        "name": run.id,
        "displayName": run.name,
        "description": None,
        "config": json.dumps(run.raw_config),
        "sweepName": None,
        "historyLineCount": len(run.stream(HISTORY)),
        "project": project,
    }


def _resumable(run: Run) -> dict[str, Any]:
    return {
        "summaryMetrics": json.dumps(run.summary),
        "logLineCount": len(run.stream(OUTPUT)),
        "eventsLineCount": len(run.stream(EVENTS)),
        "historyTail": _tail(run, HISTORY),
        "eventsTail": _tail(run, EVENTS),
        "tags": run.attribute("tags") or [],
        "notes": run.attribute("notes"),
        # Without a "t" the client takes the run for one that never started.
        "wandbConfig": json.dumps({"t": run.raw_config.get("_wandb", {}).get("value", {}).get("t", {})}),
    }


def _tail(run: Run, name: str) -> str:
    return json.dumps([line.text for line in run.stream(name)[-1:]])
