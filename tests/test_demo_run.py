"""The demonstration end to end: prepared, trained by the real script, opened in a real TensorBoard."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.tensorboard_server import LOADERS, Server, serve

from telemetry.backends.tensorboard.layout import FIRST_LOOK
from telemetry.catalogue import find
from telemetry.charts import QUESTIONS, matcher
from trainer.demo.prepare import Demonstration, prepare

ROOT = Path(__file__).parents[1]
STEPS = 12
DUE = [1, 6, 12]
HOSTILE = "a|b <|endoftext|> <script>alert(1)</script> `x` __init__ [y](z) \\ *bold*\nنص عربي &amp; " + "long " * 60
CODEBOOKS = range(8)

SCALARS = {
    *(f"inputs/tokens/{kind}" for kind in ("total", "text_fraction", "padding_fraction", "hidden_fraction")),
    *(f"inputs/tokens/{kind}_audio_fraction" for kind in ("reference", "target")),
    *(f"inputs/supervised/{kind}_fraction" for kind in ("text", "audio", "samples")),
    "inputs/invalid_ids",
    *(
        f"inputs/tensor/{name}/{kind}"
        for name in (
            "input_ids",
            "attention_mask",
            "labels",
            "audio_input_ids",
            "audio_input_ids_mask",
            "audio_labels",
        )
        for kind in ("min", "max", "mean", "std", "zero_fraction", "nonfinite")
    ),
    "outputs/loss/model",
    "outputs/loss/total",
    *(f"outputs/{kind}/{part}" for kind in ("loss", "accuracy", "top5", "entropy") for part in ("text", "audio")),
    *(f"outputs/{kind}/codebook_{k}" for kind in ("loss", "accuracy", "top5") for k in CODEBOOKS),
    *(f"outputs/codebook_{k}/{kind}" for kind in ("used_fraction", "perplexity") for k in CODEBOOKS),
    "outputs/eos/probability",
    "outputs/eos/supervised",
}
TABLES = {
    "inputs/tensors",
    "inputs/sequence",
    "inputs/hardest",
    "outputs/predictions",
    "zero_shot/chatml",
    "zero_shot/clips",
    "zero_shot/clips_by_speaker",
}
CLIPS = range(3)
HEARD = {f"zero_shot/clip_{i}/{kind}" for i in CLIPS for kind in ("reference", "target", "generated", "teacher_forced")}
EVALUATED = [0, STEPS]


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory: pytest.TempPathFactory) -> Demonstration:
    """The demonstration's files; every sample's system prompt is hostile."""
    made = prepare(tmp_path_factory.mktemp("demo"), show_progress=False)
    samples = json.loads(made.train_file.read_text(encoding="utf-8"))
    for sample in samples:
        sample["messages"][0]["content"] = HOSTILE
    made.train_file.write_text(json.dumps(samples), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def run(demonstration: Demonstration, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The logging directory and the console output of a short training."""
    directory = tmp_path_factory.mktemp("run")
    command = [
        *(sys.executable, str(ROOT / "trainer" / "train_v2_ddp.py")),
        *("--model_path", str(demonstration.model)),  # the codec is the one that the processor names
        *("--train_data_file", str(demonstration.train_file), "--eval_data_file", str(demonstration.eval_file)),
        *("--output_dir", str(directory / "output"), "--logging_dir", str(directory / "logs")),
        *("--max_steps", str(STEPS), "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"),
        *("--per_device_eval_batch_size", "4", "--learning_rate", "2e-3", "--logging_steps", "1", "--eval_steps", "12"),
        *("--enable_strategic_logging", "--strategic_logging_steps", "6", "--zero_shot_clips", "3"),
    ]
    environment = os.environ | {"HF_HOME": str(directory / "home"), "COLUMNS": "140"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory / "logs", done.stderr


@pytest.fixture(scope="module", params=list(LOADERS))
def server(request: pytest.FixtureRequest, run: tuple[Path, str]) -> Iterator[Server]:
    with serve(run[0], request.param) as answering:
        answering.wait_for(lambda: len(answering.scalars("train/loss")) == STEPS)
        yield answering


def test_every_tag_that_applies_is_served(server: Server) -> None:
    tags = server.tags("scalars")
    assert {tag for tag in tags if tag.startswith(("inputs/", "outputs/"))} == SCALARS
    assert {"gradients/total_norm", "zero_shot/chatml/compliance", "eval/loss", "train/grad_norm"} <= tags
    assert server.tags("text") >= TABLES
    assert (
        server.tags("audio")
        == {"inputs/reference", "inputs/target", *(f"inputs/hardest/{i}" for i in range(5))} | HEARD
    )
    assert server.tags("images") >= {f"zero_shot/clip_{i}/spectrogram" for i in CLIPS}
    assert all(find(tag) for tag in tags)


def test_custom_scalars_have_every_question_with_data_in_every_chart(server: Server) -> None:
    tags = server.tags("scalars")
    declared = {
        question.title: {chart.title: chart for chart in question.charts} for question in (FIRST_LOOK, *QUESTIONS)
    }
    shown = server.json("plugin/custom_scalars/layout")["category"]
    assert [category["title"] for category in shown] == list(declared)
    for category in shown:
        for chart in category["chart"]:
            served: set[str] = set()
            for regex in chart["multiline"]["tag"]:
                answer = server.json("plugin/custom_scalars/scalars", run=".", tag=regex)
                assert answer["regex_valid"]
                served |= answer["tag_to_events"].keys()
            patterns = declared[category["title"]][chart["title"]].tags
            assert served == {tag for tag in tags if any(matcher(pattern).fullmatch(tag) for pattern in patterns)}
            assert served, chart["title"]


def test_measured_steps_are_the_due_ones(server: Server) -> None:
    for tag in ("outputs/loss/total", "inputs/tokens/total", "gradients/total_norm"):
        assert [step for step, _ in server.scalars(tag)] == DUE


def test_the_recombined_loss_and_the_norm_are_the_trainers(server: Server) -> None:
    for ours, theirs in (("outputs/loss/total", "train/loss"), ("gradients/total_norm", "train/grad_norm")):
        logged = dict(server.scalars(theirs))
        for step, value in server.scalars(ours):
            assert value == pytest.approx(logged[step], rel=1e-5)


def test_training_goes_somewhere(server: Server) -> None:
    losses = [value for _, value in server.scalars("outputs/loss/total")]
    assert losses[-1] < 0.9 * losses[0]
    assert dict(server.scalars("outputs/eos/supervised")) == dict.fromkeys(DUE, 1.0)
    assert dict(server.scalars("zero_shot/reference/present_fraction")) == dict.fromkeys(DUE, 1.0)
    assert dict(server.scalars("inputs/invalid_ids")) == dict.fromkeys(DUE, 0.0)


def test_speech_is_heard_at_the_codecs_rate(server: Server) -> None:
    for tag in ("inputs/reference", "inputs/target"):
        for sample in (0, 1):
            clips = server.clips(tag, sample)
            assert sorted(clips) == DUE
            assert all(clip.rate == 16_000 and clip.rms > 0.01 and len(clip.samples) > 8_000 for clip in clips.values())


def test_what_the_model_says_is_heard(server: Server) -> None:
    for tag in HEARD:
        clips = server.clips(tag, 0)
        assert sorted(clips) == EVALUATED
        assert all(clip.rate == 16_000 and len(clip.samples) for clip in clips.values())
    for i in CLIPS:
        before, after = (server.clips(f"zero_shot/clip_{i}/generated", 0)[step] for step in EVALUATED)
        assert not np.array_equal(before.samples, after.samples)
    for number in ("duration_ratio", "silence_fraction", "mel_distance", "mel_distance_shuffled", "eos_hit_rate"):
        assert [step for step, _ in server.scalars(f"zero_shot/{number}")] == EVALUATED
    assert "zero_shot/wer" not in server.tags("scalars")


def test_clips_of_training_voices_and_of_others_are_compared(server: Server, demonstration: Demonstration) -> None:
    samples = json.loads(demonstration.train_file.read_text(encoding="utf-8"))
    training_voices = {sample["speaker"] for sample in samples}
    header, *rows = (
        [html.unescape(cell.replace("<br>", "")) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.DOTALL)]
        for row in server.texts("zero_shot/clips_by_speaker")[STEPS].split("</tr>")[:-1]
    )
    clips = {"training": 0, "other": 0}
    for row in (dict(zip(header, cells, strict=True)) for cells in rows):
        clips["training" if row["speaker"] in training_voices else "other"] += int(row["clips"])
        assert float(row["mel_distance"]) > 0
        assert float(row["mel_distance_shuffled"]) > 0
    assert clips == {"training": 1, "other": 2}


def test_hostile_text_comes_back_unharmed(server: Server) -> None:
    for page in server.texts("inputs/sequence").values():
        assert not re.search(r"<(script|endoftext)", page)
        cell = next(cell for cell in re.findall(r"<td>(.*?)</td>", page, re.DOTALL) if "alert" in cell)
        shown = " ".join(html.unescape(re.sub(r"<br ?/?>", "\n", cell)).split())
        for part in ("a|b <|endoftext|> <script>alert(1)</script> `x` __init__ [y](z) \\ *bold*", "نص عربي &amp; long"):
            assert part in shown
        assert shown.startswith("<|start_header_id|>system<|end_header_id|>")
        assert shown.endswith("…")


def test_the_console_shows_the_step_and_how_to_open_it(run: tuple[Path, str]) -> None:
    logs, console = run
    assert "Is the data what I think it is?" in console
    assert re.search(
        rf"tensorboard --logdir {re.escape(str(logs.parent.parent))} --samples_per_plugin scalars=100000", console
    )
    assert "HEALTHY" not in console


def test_the_end_says_what_was_written(run: tuple[Path, str]) -> None:
    logs, console = run
    for line in (f"model: {logs.parent / 'output'}", f"checkpoints: checkpoint-{STEPS}", f"telemetry: {logs}"):
        assert line in console
