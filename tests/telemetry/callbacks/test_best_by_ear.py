"""Numbers of the clips choose the best checkpoint, on any Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.batches import Voices
from support.speaking import make_trainer, speaking_callback
from transformers import Trainer

from telemetry.backends.memory import MemoryBackend
from trainer.higgs_trainer import HiggsAudioTrainer

CLIPS = 2
STEPS = 4
BEST = 2


class Turns:
    """Hears well, or the right voice, at one evaluation only. It is asked of every clip of every evaluation."""

    def __init__(self) -> None:
        self._asked = 0

    def _evaluation(self, of_each: int) -> int:
        evaluation, self._asked = self._asked // of_each, self._asked + 1
        return evaluation

    def transcribe(self, samples: np.ndarray, sampling_rate: int, language: str | None) -> str:
        good = self._evaluation(CLIPS) == BEST
        return "A ship sails 0." if good else "nothing of the kind"

    def embed(self, samples: np.ndarray, sampling_rate: int) -> np.ndarray:
        evaluation, second = divmod(self._asked, 2 * CLIPS)
        self._asked += 1
        away = 0.1 if evaluation == BEST else 1.0
        return np.array([1.0, away * (second % 2)])


@pytest.mark.parametrize("kind", [HiggsAudioTrainer, Trainer])
@pytest.mark.parametrize(
    ("metric", "listener"), [("eval_zero_shot/wer", "transcriber"), ("zero_shot/speaker_similarity", "speaker_encoder")]
)
def test_the_right_checkpoint_is_loaded(
    higgs: Any, voices: Voices, tmp_path: Path, kind: Callable[..., Trainer], metric: str, listener: str
) -> None:
    backend = MemoryBackend()
    callback = speaking_callback(backend, clips=CLIPS, **{listener: Turns()})
    made = make_trainer(
        higgs,
        voices,
        tmp_path,
        [callback],
        kind=kind,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
    )
    made.train()
    tag = metric.removeprefix("eval_")
    shown = backend.scalars(tag)
    choose = {"zero_shot/wer": min, "zero_shot/speaker_similarity": max}[tag]
    best = choose(range(1, STEPS + 1), key=shown.__getitem__)
    assert list(shown.values()).count(shown[best]) == 1
    assert 1 < best < STEPS
    assert made.state.best_global_step == best
    assert made.state.best_metric == pytest.approx(shown[best])


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("zero_shot/beauty", "zero_shot/beauty is no number of docs/metrics.md"),
        ("eval_zero_shot/wer", "no transcriber was given, and zero_shot/wer needs one"),
        ("zero_shot/speaker_similarity", "no speaker encoder was given, and zero_shot/speaker_similarity needs one"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(
    higgs: Any, voices: Voices, tmp_path: Path, metric: str, said: str
) -> None:
    made = make_trainer(
        higgs,
        voices,
        tmp_path,
        [speaking_callback(MemoryBackend())],
        metric_for_best_model=metric,
    )
    with pytest.raises(ValueError, match=said):
        made.train()
    assert made.state.global_step == 0
