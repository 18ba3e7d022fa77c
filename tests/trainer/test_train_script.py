"""The training script itself, run as people run it, on the demonstration."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.programs import BRIEF_FORK
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import trainer.train_v2_ddp
from telemetry.instruments.questions import inputs, outputs
from trainer.arguments import FineTuningArguments, ScriptArguments
from trainer.chatml import Message, Sample, Source, TextContent
from trainer.demo.prepare import Demonstration
from trainer.train_v2_ddp import STOPPED, find_checkpoint, main, split_samples, strategic_callbacks

SCRIPT = str(Path(trainer.train_v2_ddp.__file__))
TIMEOUT_SECONDS = 150


def run(*arguments: Any, interpreter: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    """A whole program of its own, in a new interpreter where that is given options."""
    python = (sys.executable, *interpreter) if interpreter else BRIEF_FORK
    return subprocess.run(
        [*python, SCRIPT, *map(str, arguments)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


def events(directory: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    return accumulator


def logged_steps(output_dir: Path, checkpoint: int, name: str = "loss") -> dict[int, float]:
    state = json.loads((output_dir / f"checkpoint-{checkpoint}" / "trainer_state.json").read_text(encoding="utf-8"))
    return {entry["step"]: entry[name] for entry in state["log_history"] if name in entry}


@pytest.fixture(scope="module")
def some_samples(demo: Demonstration) -> list[dict[str, Any]]:
    """Eight of the demonstration's samples, as a data file anywhere on this machine would have them."""
    samples = json.loads(demo.train_file.read_text(encoding="utf-8"))[:8]
    for item in (item for sample in samples for message in sample["messages"] for item in message["content"]):
        if isinstance(item, dict) and item["type"] == "audio":
            item["audio_url"] = str(demo.train_file.parent / item["audio_url"])
    return samples


@pytest.fixture
def data_file(some_samples: list[dict[str, Any]], tmp_path: Path) -> Path:
    return write_samples(tmp_path / "train.json", some_samples)


@pytest.fixture
def bad_data_file(some_samples: list[dict[str, Any]], tmp_path: Path) -> Path:
    """Its fourth sample's target is missing."""
    samples = copy.deepcopy(some_samples)
    samples[3]["messages"][2]["content"][1]["audio_url"] = "gone.wav"
    return write_samples(tmp_path / "bad.json", samples)


def write_samples(file: Path, samples: list[dict[str, Any]]) -> Path:
    file.write_text(json.dumps(samples, ensure_ascii=False), encoding="utf-8")
    return file


# As a program


def test_plain_training_imports_no_telemetry(
    tiny_model_path: Path, bad_data_file: Path, data_file: Path, tmp_path: Path
) -> None:
    """In bfloat16, with a bad sample left out, evaluating, reporting to TensorBoard."""
    output, logs = tmp_path / "output", tmp_path / "logs"
    finished = run(
        *("--model_path", tiny_model_path, "--train_data_file", bad_data_file, "--eval_data_file", data_file),
        *("--output_dir", output, "--logging_dir", logs, "--max_steps", 2, "--eval_steps", 2, "--logging_steps", 1),
        *("--bf16", "--skip_bad_samples"),
        interpreter=("-X", "importtime"),
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", finished.stderr, flags=re.MULTILINE))
    assert {"trainer.higgs_trainer", "torch"} <= imported
    light = {
        "telemetry",
        "telemetry.logs",
        "telemetry.redaction",
    }  # what keeps a bad file's names from steering the terminal
    assert {name for name in imported if name.partition(".")[0] == "telemetry"} <= light

    said = [line for line in finished.stderr.splitlines() if not line.startswith("import time:")]
    left_out = [line for line in said if "WARNING" in line and "1 of 8" in line]
    assert left_out, said
    assert any("gone.wav" in line and "train-" in line for line in said)
    assert logged_steps(output, 2).keys() == {1, 2}
    assert logged_steps(output, 2, "eval_loss").keys() == {2}
    assert torch.load(output / "training_args.bin", weights_only=False).bf16 is True
    weights = load_file(output / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert (output / "chat_template.jinja").is_file()
    assert (output / "processor_config.json").is_file()
    assert "train/loss" in events(logs).Tags()["scalars"]


def test_two_ranks_write_one_event_file_and_one_of_them_speaks(
    tiny_model_path: Path, data_file: Path, tmp_path: Path
) -> None:
    output, logs, said = tmp_path / "output", tmp_path / "logs", tmp_path / "said"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--log-dir", str(said), "-r", "3")
    finished = run(
        *("--model_path", tiny_model_path, "--train_data_file", data_file, "--output_dir", output),
        *("--logging_dir", logs, "--max_steps", 12, "--logging_steps", 6, "--learning_rate", "1e-3"),
        *("--enable_strategic_logging", "--strategic_logging_steps", 10),
        interpreter=torchrun,
    )
    speech = {rank: "".join(f.read_text() for f in said.rglob(f"{rank}/std*.log")) for rank in (0, 1)}
    assert finished.returncode == 0, finished.stderr[-2000:] + speech[0][-2000:] + speech[1][-2000:]

    # Eight samples on two ranks are four steps an epoch: they shared the work, not each did all of it.
    assert logged_steps(output, 12, "epoch")[12] == 3.0
    [file] = tmp_path.rglob("*tfevents*")
    assert file.parent == logs
    written = events(logs)
    assert [event.step for event in written.Scalars("outputs/loss/total")] == [1, 10]
    assert [event.step for event in written.Scalars("gradients/total_norm")] == [1, 10]
    assert [event.step for event in written.Scalars("train/loss")] == [1, 6, 12]

    assert " INFO trainer.train_v2_ddp: " in speech[0]
    assert "tensorboard --logdir" in speech[0]
    assert " INFO " not in speech[1]
    assert "outputs" not in speech[1]  # the console's tree


def test_lora_run_resumes_bit_for_bit(tiny_model_path: Path, data_file: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    arguments = (
        *("--model_path", tiny_model_path, "--train_data_file", data_file, "--report_to", "none", "--max_steps", 6),
        *("--save_steps", 3, "--logging_steps", 1, "--gradient_accumulation_steps", 2, "--learning_rate", "1e-2"),
        *("--use_lora", "--lora_rank", 2, "--lora_dropout", 0.3),
    )
    first = run(*arguments, "--output_dir", whole)
    assert first.returncode == 0, first.stderr[-3000:]
    for step in (3, 6):
        adapters = load_file(whole / f"checkpoint-{step}" / "adapter_model.safetensors")
        assert adapters
        assert all(".lora_" in name for name in adapters)
        assert not (whole / f"checkpoint-{step}" / "model.safetensors").exists()

    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    second = run(*arguments, "--output_dir", resumed, "--resume_from_checkpoint", "last")
    assert second.returncode == 0, second.stderr[-3000:]
    # The log history was taken over from the checkpoint: two steps of the same number would show twice.
    state = json.loads((resumed / "checkpoint-6" / "trainer_state.json").read_text(encoding="utf-8"))
    assert [entry["step"] for entry in state["log_history"]] == [1, 2, 3, 4, 5, 6]
    assert "'epoch': '0.75'" not in second.stdout  # step 3 was not trained again

    before, after, again = (
        load_file(directory / "adapter_model.safetensors")
        for directory in (whole / "checkpoint-3", whole / "checkpoint-6", resumed / "checkpoint-6")
    )
    assert after.keys() == again.keys()
    assert all(torch.equal(after[name], again[name]) for name in after)
    assert not all(torch.equal(before[name], after[name]) for name in after)
    moments, again_moments = (
        torch.load(directory / "checkpoint-6" / "optimizer.pt")["state"] for directory in (whole, resumed)
    )
    assert moments.keys() == again_moments.keys()
    for index, state in moments.items():
        assert all(torch.equal(value, again_moments[index][name]) for name, value in state.items())


def test_a_bad_data_file_ends_the_program_with_one_clear_message(
    tiny_model_path: Path, bad_data_file: Path, tmp_path: Path
) -> None:
    finished = run(
        *("--model_path", tiny_model_path, "--train_data_file", bad_data_file, "--output_dir", tmp_path / "output"),
        *("--enable_strategic_logging", "--max_steps", 1),
    )
    assert finished.returncode == 1
    assert "Traceback" not in finished.stderr + finished.stdout
    message = finished.stderr[finished.stderr.index("error: ") :]
    for part in (str(bad_data_file), "sample 3 ('train-", "messages[2].content[1].audio_url", "gone.wav"):
        assert part in message
    assert not list(tmp_path.rglob("*tfevents*"))


# What can be told without a program of its own


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--model_path": "nowhere"}, "error: --model_path nowhere: no processor_config.json there"),
        ({"--audio_tokenizer_path": "nowhere"}, "error: no audio tokenizer at 'nowhere'"),
        ({"--train_data_file": "nowhere.json"}, "nowhere.json"),
        ({"--eval_data_file": "nowhere.json"}, "nowhere.json"),
        ({"--resume_from_checkpoint": "nowhere"}, "error: --resume_from_checkpoint nowhere: no such directory"),
        ({"--resume_from_checkpoint": "last"}, "error: --resume_from_checkpoint last: no checkpoint in "),
        (
            {"--enable_strategic_logging": "true", "--speaker_encoder": "no/such/model"},
            "error: cannot load the speaker encoder 'no/such/model'",
        ),
        (
            {"--enable_strategic_logging": "true", "--transcriber": "no/such/model"},
            "error: cannot load the transcriber 'no/such/model'",
        ),
        ({"--label_smoothing_factor": "0.1"}, "error: --label_smoothing_factor 0.1: "),
        ({"--fsdp": "true", "--fsdp_config": "nowhere.json"}, "nowhere.json"),
        ({"--validation_split": "0.99"}, "error: --validation_split 0.99 of 8 samples leaves nothing to train on"),
    ],
)
def test_what_is_not_there_is_said_without_a_traceback(
    changes: dict[str, str], said: str, tiny_model_path: Path, data_file: Path, tmp_path: Path
) -> None:
    options = {
        "--model_path": str(tiny_model_path),
        "--train_data_file": str(data_file),
        "--output_dir": str(tmp_path / "output"),
        "--report_to": "none",
        **changes,
    }
    with pytest.raises(SystemExit) as caught:
        main([part for option in options.items() for part in option])
    assert isinstance(caught.value.code, str)
    assert caught.value.code.startswith("error: ")
    assert said in caught.value.code


def test_the_trainers_own_arguments_do_what_they_say(
    tiny_model_path: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))  # put back afterwards: the script sets it
    output = tmp_path / "output"
    given = {"--model_path": tiny_model_path, "--train_data_file": data_file, "--output_dir": output}
    steps = {"--max_steps": 4, "--save_steps": 2, "--logging_steps": 1, "--report_to": "none", "--learning_rate": 1e-3}
    asked = {"--optim": "adafactor", "--lr_scheduler_type": "cosine", "--save_total_limit": 1}
    options = [str(part) for option in (given | steps | asked).items() for part in option]
    main([*options, "--activation_checkpointing"])

    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-4"]
    for step, rate in logged_steps(output, 4, "learning_rate").items():
        assert rate == pytest.approx(1e-3 * (1 + math.cos(math.pi * (step - 1) / 4)) / 2)
    moments = torch.load(output / "checkpoint-4" / "optimizer.pt")["state"]
    assert any("exp_avg_sq_row" in state for state in moments.values())
    assert torch.load(output / "training_args.bin", weights_only=False).activation_checkpointing is True


def test_a_finding_that_training_is_to_stop_on_ends_it_with_a_checkpoint_and_exit_code_4(
    tiny_model_path: Path, data_file: Path, tmp_path: Path
) -> None:
    """A learning rate that rewrites the weights within a step."""
    output = tmp_path / "output"
    finished = run(
        *(
            "--model_path",
            tiny_model_path,
            "--train_data_file",
            data_file,
            "--output_dir",
            output,
            "--report_to",
            "none",
        ),
        *("--max_steps", 2000, "--logging_steps", 1, "--learning_rate", 100, "--enable_strategic_logging"),
        *("--strategic_logging_steps", 1, "--strategic_logging_components", "shared_attention"),
        *("--stop_on", "update_size", "failing"),
    )
    assert finished.returncode == STOPPED == 4, finished.stderr[-3000:]
    last = finished.stderr.splitlines()[-1]
    assert re.search(r"ERROR trainer.train_v2_ddp: stopped, as --stop_on asks: .+ \(step \d+: ", last), last
    (checkpoint,) = output.glob("checkpoint-*")
    assert checkpoint.name != "checkpoint-2000"
    assert json.loads((output / "health.json").read_text())["verdict"] != "ok"
    assert (checkpoint / "health.json").is_file()
    assert (output / "alerts.jsonl").is_file()


@pytest.mark.parametrize(("same", "code"), [(False, 0), (True, 1)])
def test_checks_alone_end_the_program(
    same: bool, code: int, tiny_model_path: Path, some_samples: list[dict[str, Any]], tmp_path: Path,
    trainer_log: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Data that are as they should be; and references that are their targets."""
    samples = copy.deepcopy(some_samples)
    for sample in samples if same else []:
        clips = [item for message in sample["messages"] for item in message["content"]
                 if isinstance(item, dict) and item["type"] == "audio"]  # fmt: skip
        clips[0]["audio_url"] = clips[-1]["audio_url"]
    options = {
        "--model_path": tiny_model_path,
        "--train_data_file": write_samples(tmp_path / "data.json", samples),
        "--output_dir": tmp_path / "output",
        "--check_only": "true",
    }
    with pytest.raises(SystemExit) as caught:
        main([str(part) for option in options.items() for part in option])
    assert caught.value.code == code
    said = [record.getMessage() for record in trainer_log.records]
    assert any("data: 8 of 8 samples listened to" in one for one in said)
    named = [one for one in said if "the same clip" in one]
    assert len(named) == same
    assert all("setup/data/equal_fraction = 1; samples train-" in one for one in named)
    assert not list((tmp_path / "output").glob("checkpoint-*"))


def script_arguments(**more: Any) -> ScriptArguments:
    return ScriptArguments(model_path="m", train_data_file="t", **more)


def callbacks(tmp_path: Path, **more: Any) -> list[Any]:
    return strategic_callbacks(script_arguments(**more), FineTuningArguments(output_dir=str(tmp_path / "output")))


def test_which_checkpoint_is_resumed_from(tmp_path: Path) -> None:
    for step in (2, 10):
        (tmp_path / "output" / f"checkpoint-{step}").mkdir(parents=True)

    def found(asked: str | None) -> str | None:
        return find_checkpoint(asked, str(tmp_path / "output"))

    newest, other = (str(tmp_path / "output" / f"checkpoint-{step}") for step in (10, 2))
    assert found("last") == found("True") == newest
    assert found(other) == other
    assert found(None) is found("") is found("false") is None


def test_telemetry_is_made_only_when_asked_for(tmp_path: Path) -> None:
    assert callbacks(tmp_path) == []
    [made] = callbacks(
        tmp_path,
        enable_strategic_logging=True,
        strategic_logging_steps=5,
        strategic_logging_components=["outputs", "inputs"],
    )
    asked = [type(one) for one in (*outputs(), *inputs())]
    assert [type(one) for one in made.instruments] == asked
    assert [step for step in range(1, 12) if made.is_due(step)] == [1, 5, 10]


@pytest.mark.parametrize(("said", "enabled"), [({}, True), ({"telemetry_audio": "off"}, False)])
def test_sound_is_off_where_it_is_not_wanted(said: dict[str, str], enabled: bool, tmp_path: Path) -> None:
    [made] = callbacks(tmp_path, enable_strategic_logging=True, **said)
    assert made.sound.enabled is enabled


def bare_sample(index: int, speaker: str | None) -> Sample:
    message = Message("assistant", (TextContent("words"),))
    source = Source(Path("data.json"), index)
    return Sample(f"id-{index}", (message,), speaker, None, None, None, 0, source)


def ids(samples: list[Sample]) -> list[str]:
    return [sample.sample_id for sample in samples]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_whole_speakers_are_held_out(share: float, seed: int, trainer_log: pytest.LogCaptureFixture) -> None:
    samples = [bare_sample(index, f"speaker {index % 5}") for index in range(20)]
    train, held = split_samples(samples, share, seed)
    assert {sample.speaker for sample in train}.isdisjoint({sample.speaker for sample in held})
    assert sorted(ids(train) + ids(held)) == sorted(ids(samples))
    assert share * 20 <= len(held) < share * 20 + 4  # no more speakers than it takes
    for part in (train, held):  # the order of the file is kept
        assert ids(part) == [sample.sample_id for sample in samples if sample in part]
    assert ids(split_samples(samples, share, seed)[1]) == ids(held)
    assert f"held out {len(held)} of 20 samples by speaker" in trainer_log.text


@pytest.mark.parametrize("speakers", [[None], ["one"], ["one", None]])
def test_samples_are_held_out_where_speakers_cannot_be(
    speakers: list[str | None], trainer_log: pytest.LogCaptureFixture
) -> None:
    samples = [bare_sample(index, speakers[index % len(speakers)]) for index in range(10)]
    train, held = split_samples(samples, 0.25, 0)
    assert (len(train), len(held)) == (7, 3)
    assert "held out 3 of 10 samples by sample" in trainer_log.text


def test_the_split_is_a_matter_of_the_seed_and_not_of_the_global_random_state() -> None:
    samples = [bare_sample(index, None) for index in range(30)]
    splits = {tuple(ids(split_samples(samples, 0.2, seed)[1])) for seed in range(5)}
    assert len(splits) == 5
    assert split_samples(samples, 0.0, 0) == (samples, [])


def test_a_split_of_everything_is_refused() -> None:
    samples = [bare_sample(0, "a"), bare_sample(1, "b")]
    with pytest.raises(ValueError, match=r"--validation_split 0\.9 of 2 samples leaves nothing to train on"):
        split_samples(samples, 0.9, 0)


@pytest.mark.parametrize(("rank", "level"), [(None, logging.INFO), ("0", logging.INFO), ("1", logging.WARNING)])
def test_without_telemetry_too_only_rank_0_talks(rank: str | None, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("trainer")
    before = logger.level
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    try:
        trainer.train_v2_ddp.set_up_logging(script_arguments())
        assert logger.level == level
    finally:
        logger.setLevel(before)
