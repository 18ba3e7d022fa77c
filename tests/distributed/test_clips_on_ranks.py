"""Two ranks let their model speak: each its own samples, with DDP and with sharded parameters, failing or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from clip_ranks import RANKS, SAMPLES, STEPS, Outcome
from support.programs import finish
from support.references import differing

PROGRAM = Path(__file__).parent / "clip_ranks.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the trainings have run."""
    directory = tmp_path_factory.mktemp("clips")
    finish([str(PROGRAM), str(directory)], directory, RANKS)
    return directory


@pytest.fixture(scope="module")
def outcomes(place: Path) -> list[dict[str, Outcome]]:
    """By rank and name of the training."""
    return [torch.load(place / f"outcomes-{rank}", weights_only=False) for rank in range(RANKS)]


def lengths(place: Path, kind: str, step: int) -> dict[str, int]:
    """Samples of every generated clip of all ranks, by file."""
    files = sorted((place / kind / "output" / "clips" / f"step_{step}").glob("*-generated.wav"))
    return {path.name: soundfile.info(path).frames for path in files}


def test_every_rank_speaks_its_own_samples(place: Path, outcomes: list[dict[str, Outcome]]) -> None:
    for step in range(STEPS + 1):
        names = lengths(place, "sharded", step)
        assert [sum(name.startswith(f"rank{rank}-") for name in names) for rank in range(RANKS)] == list(SAMPLES)


def test_numbers_are_those_of_all_ranks(place: Path, outcomes: list[dict[str, Outcome]]) -> None:
    numbers = outcomes[0]["sharded"].numbers
    for step in range(STEPS + 1):
        ratios = [
            frames / soundfile.info(place / "sharded/output/clips/dataset" / name.replace("generated", "target")).frames
            for name, frames in lengths(place, "sharded", step).items()
        ]
        assert len(ratios) == sum(SAMPLES)
        assert numbers["zero_shot/duration_ratio"][step] == pytest.approx(np.mean(ratios))


def test_sharded_parameters_say_what_whole_ones_say(outcomes: list[dict[str, Outcome]]) -> None:
    ours, theirs = (outcomes[0][kind].clips for kind in ("sharded", "ddp"))
    assert len(ours) == SAMPLES[0]
    for tag in theirs:
        np.testing.assert_allclose(ours[tag], theirs[tag], atol=1e-6)
    assert theirs


@pytest.mark.parametrize("kind", ["sharded", "failing"])
def test_training_is_the_same_without(outcomes: list[dict[str, Outcome]], kind: str) -> None:
    for rank in outcomes:
        assert differing(rank["plain"].state, rank[kind].state) == []


def test_a_rank_that_fails_leaves_the_others_their_clips(place: Path, outcomes: list[dict[str, Outcome]]) -> None:
    assert any("could not be generated" in line for line in outcomes[1]["failing"].log)
    assert not any("could not be generated" in line for line in outcomes[0]["failing"].log)
    for step in range(STEPS + 1):
        assert set(lengths(place, "failing", step)) == {
            name for name in lengths(place, "sharded", step) if name.startswith("rank0-")
        }
    assert outcomes[0]["failing"].clips.keys() == outcomes[0]["sharded"].clips.keys()
    for tag, clip in outcomes[0]["sharded"].clips.items():
        assert torch.equal(clip, outcomes[0]["failing"].clips[tag])
