"""Two ranks by torchrun, one of which fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_runs import MEASURED, assert_every_step, on_two_ranks, scalars, steps_of
from scenarios import KILLED, RAISES
from support.programs import Ended
from support.tiny_training import progress

MARGIN = 15.0
STEPS = 20


@pytest.fixture(scope="module")
def killed_without_telemetry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    directory = tmp_path_factory.mktemp("killed")
    return directory, on_two_ranks("rank_is_killed_without_telemetry", directory)


def test_a_rank_that_is_killed_holds_no_other_up(tmp_path: Path, killed_without_telemetry: tuple[Path, Ended]) -> None:
    without_directory, without = killed_without_telemetry
    ended = on_two_ranks("rank_is_killed", tmp_path)
    last = KILLED - 1
    assert max(progress(tmp_path)) == max(progress(without_directory)) == last
    assert ended.status == without.status == 1
    # From the last step that rank 1 lived to see, until rank 0 and torchrun are gone.
    took, took_without = ended.at - progress(tmp_path)[last], without.at - progress(without_directory)[last]
    assert took < took_without + MARGIN
    for tag in MEASURED:
        assert steps_of(tmp_path)[tag] in (list(range(1, last + 1)), list(range(1, last))), tag


def test_a_rank_that_raises_in_a_measure_goes_on(tmp_path: Path) -> None:
    ended = on_two_ranks("rank_raises_in_a_measure", tmp_path)
    assert ended.status == 0, ended.said
    assert_every_step(tmp_path, range(1, STEPS + 1))
    assert ended.said.count("BreaksOnOneRank failed; training goes on") == 1
    assert ended.said.count("switched off") == 1
    # Both ranks' tokens are counted at every step, though one rank measures no outputs.
    shown = scalars(tmp_path)
    assert [value for _, value in shown["inputs/tokens/total"]] == [2 * 2 * 6.0] * STEPS
    slowest, fastest = (shown[f"throughput/{which}_rank/seconds_per_step"] for which in ("slowest", "fastest"))
    assert [step for step, _ in slowest] == [*range(3, STEPS + 1)]
    assert all(slow >= fast > 0 for (_, slow), (_, fast) in zip(slowest, fastest, strict=True))


def test_a_finding_of_rank_0_stops_all_ranks_at_one_step_with_a_checkpoint(tmp_path: Path) -> None:
    ended = on_two_ranks("finding_stops_ranks", tmp_path)
    assert ended.status == 0, ended.said
    assert ended.said.count("stopped: a step's loss was not finite (step 9") == 2
    (checkpoint,) = (tmp_path / "output").glob("checkpoint-*")
    last = max(progress(tmp_path))
    assert checkpoint.name == f"checkpoint-{last}"
    assert last in (RAISES, RAISES + 1)
    assert {path.name for path in checkpoint.glob("rng_state_*")} == {"rng_state_0.pth", "rng_state_1.pth"}
