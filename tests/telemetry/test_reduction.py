"""What ranks measured comes together as if one process had measured it all; without a rank the others go on."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rank_group
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from support.programs import BRIEF_FORK, FORK
from torch import Tensor

from telemetry.backends.memory import MemoryBackend
from telemetry.delivery.recorder import Recorder
from telemetry.delivery.reduction import RankGather, Share, merge
from telemetry.records import Max, Mean, Min, Norm, Perplexity, Std, Sum, UsedFraction

ENDS_WITHIN = 90.0
PROGRAM = Path(__file__).with_name("rank_pair.py")

# Tag → its values, one list a rank; a rank with None has not measured it at all.
SPLITS = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d"]),
    st.lists(st.none() | st.lists(st.floats(-100, 100), max_size=5), min_size=3, max_size=3),
)


def shares_of(split: dict[str, list[list[float] | None]]) -> list[Share]:
    shares = []
    for rank in range(3):
        metrics: dict[str, Any] = {}
        for tag, ranks in split.items():
            values = ranks[rank]
            if values is not None:
                metrics |= {
                    f"{tag}/mean": Mean(sum(values), len(values)),
                    f"{tag}/sum": Sum(sum(values)),
                    f"{tag}/max": Max(max(values, default=-math.inf)),
                    f"{tag}/min": Min(min(values, default=math.inf)),
                    f"{tag}/norm": Norm(sum(value * value for value in values)),
                    f"{tag}/std": Std(sum(values), sum(value * value for value in values), len(values)),
                }
        shares.append(Share(1, metrics, {}, ()))
    return shares


def whole(values: list[float]) -> dict[str, float | None]:
    """By the definitions, on all values at once."""
    mean = math.fsum(values) / len(values) if values else None
    return {
        "mean": mean,
        "sum": math.fsum(values),
        "max": max(values, default=None),
        "min": min(values, default=None),
        "norm": math.sqrt(math.fsum(value**2 for value in values)),
        "std": None if mean is None else math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values)),
    }


@given(SPLITS)
def test_any_split_over_ranks_equals_the_whole(split: dict[str, list[list[float] | None]]) -> None:
    metrics, _ = merge(shares_of(split))
    expected: dict[str, float | None] = {}
    for tag, ranks in split.items():
        measured = [values for values in ranks if values is not None]
        if measured:
            values = [value for part in measured for value in part]
            expected |= {f"{tag}/{kind}": value for kind, value in whole(values).items()}
    assert metrics.keys() == expected.keys()
    for tag, value in expected.items():
        assert metrics[tag].result() == (None if value is None else pytest.approx(value, rel=1e-9, abs=1e-5)), tag


def test_notes_of_all_ranks_are_kept() -> None:
    shares = [Share(1, {}, notes, ()) for notes in ({"a": "one"}, {}, {"b": "two"})]
    assert merge(shares)[1] == {"a": "one", "b": "two"}


def test_merging_leaves_every_share_as_it_was() -> None:
    shares = [Share(1, {"a": Sum(2.0)}, {"a": "x"}, ()), Share(1, {"a": Sum(3.0), "b": Max(1.0)}, {"b": "y"}, ())]
    assert merge(shares)[0]["a"].result() == 5.0
    assert [{tag: metric.result() for tag, metric in share.metrics.items()} for share in shares] == [
        {"a": 2.0},
        {"a": 3.0, "b": 1.0},
    ]
    assert [share.notes for share in shares] == [{"a": "x"}, {"b": "y"}]


def test_a_rank_sends_its_values_and_not_the_buffer_that_brought_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host values are views of one buffer that holds everything a step had to bring: here 8 MB for pictures."""
    sent: list[int] = []
    over = SimpleNamespace(is_completed=lambda: True, wait=lambda: None)

    def reduced(tensor: Tensor, op: Any, **_: Any) -> Any:
        """As of two ranks that have measured the same."""
        sent.append(tensor.nbytes)
        if op == dist.ReduceOp.SUM:
            tensor *= 2
        return over

    monkeypatch.setattr(dist, "all_reduce", reduced)
    monkeypatch.setattr(dist, "reduce", reduced)
    backend = MemoryBackend()
    recorder = Recorder([backend], RankGather(None, rank=0, world_size=2))
    vectors = [torch.rand(100, dtype=torch.float64) for _ in range(50)]
    for index, vector in enumerate(vectors):
        recorder.metric(f"sum/{index}", Sum(vector.sum()))
        recorder.metric(f"used/{index}", UsedFraction(vector))
        recorder.metric(f"perplexity/{index}", Perplexity(vector))
    recorder.show({"picture": torch.rand(1_000_000, dtype=torch.float64)}, lambda _host, _emit: None)
    recorder.flush(1)
    recorder.close()
    measured = len(vectors) * (8 + 2 * 100 * 8)
    assert measured < sum(sent) < 1.2 * measured
    for index, vector in enumerate(vectors):
        assert backend.scalars(f"sum/{index}") == {1: pytest.approx(2 * float(vector.sum()))}
        assert backend.scalars(f"used/{index}") == {1: 1.0}
        entropy = torch.distributions.Categorical(vector).entropy()
        assert backend.scalars(f"perplexity/{index}") == {1: pytest.approx(float(entropy.exp()))}


def test_a_single_process_needs_no_gather() -> None:
    assert RankGather.join() is None


class Ended:
    """What the two processes of a scenario printed, said and returned."""

    def __init__(self, scenario: str, fork: Sequence[str] = BRIEF_FORK) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            store = f"127.0.0.1:{probe.getsockname()[1]}"
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
        processes = [
            subprocess.Popen(
                [*fork, str(PROGRAM), scenario, str(rank), store],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(2)
        ]
        try:
            spoken = [process.communicate(timeout=ENDS_WITHIN) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        self.codes = [process.returncode for process in processes]
        self.lines = [output.splitlines() for output, _ in spoken]
        self.errors = [errors for _, errors in spoken]

    def scalars(self) -> dict[str, dict[int, float]]:
        """Tag → step → value that rank 0 showed, each once."""
        found: dict[str, dict[int, float]] = defaultdict(dict)
        for line in self.lines[0]:
            if line.count("|") == 3:
                tag, step, value, _ = line.split("|")
                assert int(step) not in found[tag]
                found[tag][int(step)] = float(value)
        return dict(found)


def of_both(*steps: int) -> dict[str, dict[int, float]]:
    """What rank_pair.measure adds up to."""
    return {
        "mean": {step: (2.0 * step + 10.0 * step) / (1 + 3) for step in steps},
        "max": dict.fromkeys(steps, 1.0),
        "only_0": {step: float(step) for step in steps},
        "only_1": {step: float(step) for step in steps},
    }


def of_rank_0(*steps: int) -> dict[str, dict[int, float]]:
    return {
        "mean": {step: 2.0 * step for step in steps},
        "max": dict.fromkeys(steps, 0.0),
        "only_0": {step: float(step) for step in steps},
    }


def joined(*parts: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    return {tag: {s: v for part in parts for s, v in part.get(tag, {}).items()} for part in parts for tag in part}


def test_rank_0_shows_what_both_measured_with_the_tags_of_both() -> None:
    ended = Ended("together")
    assert ended.codes == [0, 0], ended.errors
    assert ended.scalars() == of_both(1, 2, 3)
    assert ended.lines[1] == []
    assert "telemetry" not in "".join(ended.errors)


def expected_of(world_size: int) -> dict[str, list[tuple[int, float, str]]]:
    """What rank_group.py measures, by the definitions, on all values at once, and of rank 0 alone."""
    found: dict[str, list[tuple[int, float, str]]] = defaultdict(list)
    for step in (*rank_group.TOGETHER, *rank_group.ALONE):
        ranks = range(world_size if step in rank_group.TOGETHER else 1)
        text = np.concatenate([rank_group.text(rank, step) for rank in ranks])
        note = "odd" if step % 2 and len(ranks) > 1 else ""
        found["text/mean"].append((step, float(text.mean()), note))
        found["text/norm"].append((step, float(np.linalg.norm(text)), ""))
        found["text/max"].append((step, math.nan if step == rank_group.NAN else float(text.max()), ""))
        found["text/min"].append((step, float(text.min()), ""))
        with_audio = {rank: part for rank in ranks if (part := rank_group.audio(rank, step)) is not None}
        if with_audio:
            codes = np.concatenate([*with_audio.values()])
            found["audio/mean"].append((step, float(codes.mean()), ""))
            found["audio/std"].append((step, float(codes.std()), ""))
            found["audio/used"].append((step, len({rank % 3 for rank in with_audio}) / 6, ""))
        if step in ranks:
            found[f"only/{step}"].append((step, float(step), ""))
    return found


@pytest.mark.parametrize("world_size", [4, 8])
def test_ranks_with_different_things_to_measure_equal_one_process_until_one_dies(world_size: int) -> None:
    command = [*BRIEF_FORK, str(PROGRAM.with_name("rank_group.py")), str(world_size)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=ENDS_WITHIN, env=environment, check=True)
    for rank in range(world_size):
        assert f"rank {rank} ended with {9 if rank == rank_group.DIES else 0}\n" in ended.stderr, ended.stderr
    shown, expected = json.loads(ended.stdout), expected_of(world_size)
    assert shown["seconds"] < 30
    assert shown["scalars"].keys() == expected.keys()
    for tag, rows in expected.items():
        assert [(step, note) for step, _, note in shown["scalars"][tag]] == [(step, note) for step, _, note in rows]
        values = [value for _, value, _ in shown["scalars"][tag]]
        assert values == pytest.approx([value for _, value, _ in rows], rel=1e-5, nan_ok=True), tag
    assert ended.stderr.count(f"not finite on rank {world_size - 1}: text/max") == 1
    assert "not finite on rank 0" not in ended.stderr


def test_a_rank_with_something_not_finite_is_named_and_its_rows_are_shown() -> None:
    ended = Ended("nonfinite")
    assert ended.codes == [0, 0], ended.errors
    values = ended.scalars()["value"]
    assert values[1] == 1.0
    assert math.isnan(values[2])
    assert "table|1|(('row of 0',),)" in ended.lines[0]
    assert "table|2|(('row of 0',), ('rank 1: row of 1',))" in ended.lines[0]
    assert ended.errors[0].count("step 2: not finite on rank 1: value") == 1
    assert "not finite on rank 0" not in ended.errors[0]


def test_telemetry_on_one_rank_only_hangs_nobody_and_is_said() -> None:
    ended = Ended("alone")
    assert ended.codes == [0, 0], ended.errors
    assert ended.scalars() == of_rank_0(1)
    assert all("reduced 4.0" in lines for lines in ended.lines)
    said = "telemetry runs on some ranks only: its numbers are those of each rank alone"
    assert [errors.count(said) for errors in ended.errors] == [1, 0]


def test_a_rank_that_comes_late_does_not_wait_for_those_that_gave_up() -> None:
    ended = Ended("late")
    assert ended.codes == [0, 0], ended.errors
    assert ended.lines == [["gather None"]] * 2


def test_without_a_rank_that_died_the_other_goes_on_alone_and_says_so_once() -> None:
    ended = Ended("dies")
    assert ended.codes == [0, 9], ended.errors
    assert ended.scalars() == joined(of_both(1), of_rank_0(2, 3))
    (seconds,) = [float(line.split()[1]) for line in ended.lines[0] if line.startswith("seconds")]
    assert seconds < 30
    assert ended.errors[0].count("ranks can no longer be brought together") == 1
    assert "from step 2 on, this rank's numbers only" in ended.errors[0]


def test_ranks_at_different_steps_are_not_added_up() -> None:
    ended = Ended("other_steps")
    assert ended.codes == [0, 0], ended.errors
    assert ended.scalars() == joined(of_both(1), of_rank_0(2))
    assert "ranks are at different steps: [2, 12]" in ended.errors[0]


def test_a_rank_that_ends_first_shows_its_own_numbers_and_its_process_ends_well() -> None:
    """What still comes of the other, in the interpreter's last moments, finds nobody in a collective."""
    ended = Ended("ends_before_the_other", FORK)
    assert ended.codes == [0, 0], ended.errors
    assert ended.scalars() == of_rank_0(1, 2)
    said = "ranks can no longer be brought together (not every rank came before the end): from step 1 on"
    assert ended.errors[0].count(said) == 1
    assert "terminate" not in "".join(ended.errors)


def test_a_rank_whose_recorder_fails_meets_the_others_once() -> None:
    """Each meeting more would take 20 s, of a step of its own, and leave later trainings' meetings out of step."""
    ended = Ended("recorder_fails")
    assert ended.codes == [0, 0], ended.errors
    assert ended.lines == [["Recorder"] * 3 + ["meetings 1"], ["meetings 1"]]
