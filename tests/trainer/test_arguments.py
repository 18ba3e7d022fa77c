"""The command line: what it takes, what it says of itself, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trainer.arguments import ScriptArguments
from trainer.train_v2_ddp import (
    check_layers,
    component_options,
    main,
    make_training_arguments,
    parse_arguments,
    trainer_destinations,
)

REQUIRED = ["--model_path", "m", "--train_data_file", "t.json", "--output_dir", "out"]
ARGUMENTS = [
    "model_path",
    "audio_tokenizer_path",
    "train_data_file",
    "eval_data_file",
    "validation_split",
    "output_dir",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "warmup_steps",
    "max_grad_norm",
    "logging_steps",
    "save_steps",
    "eval_steps",
    "seed",
    "bf16",
    "use_lora",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "freeze_llm",
    "disable_eval",
    "resume_from_checkpoint",
    "report_to",
    "logging_dir",
    "enable_strategic_logging",
    "strategic_logging_steps",
    "strategic_logging_components",
    "telemetry_audio",
    "attention_layers",
    "text_audio_cosine",
    "zero_shot_clips",
    "speaker_encoder",
    "transcriber",
    "wandb_all_ranks",
    "skip_bad_samples",
]


def parse(*more: str) -> ScriptArguments:
    return parse_arguments([*REQUIRED, *more])


def help_of(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Argument → all that ``--help`` says of it, in one line."""
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--help"])
    assert caught.value.code == 0
    entries: dict[str, list[str]] = {}
    name = ""
    for line in capsys.readouterr().out.partition("options:")[2].splitlines():
        if line.startswith("  -"):
            name = line.split()[0].rstrip(",")
            entries[name] = []
        if name:
            entries[name].append(line.strip())
    return {name: " ".join(" ".join(lines).split()) for name, lines in entries.items()}


def test_help_explains_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    entries = help_of(capsys)
    assert {f"--{name}" for name in ARGUMENTS} <= entries.keys()
    for name in ARGUMENTS:
        said = entries[f"--{name}"].split("(default:")[0]
        words = [word for word in said.replace(name.upper(), "").split() if word.strip(".,").isalpha()]
        assert len(words) >= 2, f"--{name}: {said}"
    for component in ("inputs", "outputs", "shared_attention", "zero_shot"):
        assert component in entries["--strategic_logging_components"]


def test_defaults() -> None:
    arguments = parse()
    assert arguments.strategic_logging_steps == 100
    assert arguments.strategic_logging_components == ["inputs", "outputs", "shared_attention", "zero_shot"]
    assert arguments.audio_tokenizer_path is None
    flags = ("enable_strategic_logging", "bf16", "use_lora", "freeze_llm", "disable_eval", "skip_bad_samples")
    assert not any(getattr(arguments, flag) for flag in flags)
    assert arguments.logs == Path("out/logs")
    assert parse("--logging_dir", "elsewhere").logs == Path("elsewhere")


def test_components_are_a_list() -> None:
    assert parse("--strategic_logging_components", "outputs", "inputs").strategic_logging_components == [
        "outputs",
        "inputs",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "logging_steps",
        "save_steps",
        "eval_steps",
        "strategic_logging_steps",
        "lora_rank",
        "max_reference_seconds",
    ],
)
@pytest.mark.parametrize("value", ["0", "-1"])
def test_counts_must_be_positive(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"--{name} must be above 0, got {value}"):
        parse(f"--{name}", value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--validation_split", "1"], "--validation_split must be at least 0 and below 1, got 1.0"),
        (["--validation_split", "-0.1"], "--validation_split must be at least 0 and below 1, got -0.1"),
        (["--validation_split", "nan"], "--validation_split must be at least 0 and below 1, got nan"),
        (["--learning_rate", "nan"], "--learning_rate must be a finite number of at least 0, got nan"),
        (["--learning_rate", "inf"], "--learning_rate must be a finite number of at least 0, got inf"),
        (["--learning_rate", "-1"], "--learning_rate must be a finite number of at least 0, got -1.0"),
        (["--max_reference_seconds", "nan"], "--max_reference_seconds must be above 0, got nan"),
        (["--attention_layers", "0", "-1"], "--attention_layers counts from 0, got [0, -1]"),
        (["--use_lora", "--freeze_llm"], "--use_lora already freezes every base parameter: leave --freeze_llm out"),
        (
            ["--eval_data_file", "e.json", "--validation_split", "0.1"],
            "--eval_data_file and --validation_split exclude each other",
        ),
        (["--report_to", "none", "wandb"], "--report_to none excludes every other destination, got none wandb"),
        (
            ["--wandb_all_ranks", "--report_to", "wandb"],
            "--wandb_all_ranks needs --enable_strategic_logging and --report_to wandb",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(more: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        parse(*more)
    with pytest.raises(SystemExit) as left:
        main([*REQUIRED, *more])
    assert left.value.code == f"error: {said}"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--telemetry_audio", "loud"], "argument --telemetry_audio/--telemetry-audio: invalid choice: 'loud'"),
        (["--report_to", "fax"], "argument --report_to/--report-to: invalid choice: 'fax'"),
        (["--strategic_logging_components", "weather"], "invalid choice: 'weather'"),
        (["--strategic_logging_components"], "expected at least one argument"),
        (["--max_steps", "many"], "argument --max_steps/--max-steps: invalid int value: 'many'"),
        (["--no_such_argument", "1"], "--no_such_argument"),
    ],
)
def test_what_the_parser_refuses(more: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ValueError)) as caught:
        parse(*more)
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 2
    assert said in capsys.readouterr().err + str(caught.value)


def test_required_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments([])
    assert caught.value.code == 2
    said = capsys.readouterr().err.partition("required: ")[2]
    assert all(name in said for name in ("--model_path", "--train_data_file", "--output_dir"))


@pytest.mark.parametrize(
    ("more", "destinations"),
    [
        ([], ["tensorboard"]),
        (["--report_to", "all"], ["tensorboard", "wandb"]),
        (["--report_to", "none"], []),
        (["--enable_strategic_logging"], []),  # it writes the Trainer's numbers to TensorBoard itself
        (["--report_to", "wandb", "tensorboard", "wandb"], ["wandb", "tensorboard"]),
        (["--enable_strategic_logging", "--report_to", "all"], []),
        (["--enable_strategic_logging", "--report_to", "wandb"], []),
    ],
)
def test_nothing_is_reported_twice(more: list[str], destinations: list[str]) -> None:
    assert trainer_destinations(parse(*more)) == destinations


def test_components_that_were_chosen_are_told_what_was_asked_of_them() -> None:
    asked = ["--attention_layers", "1", "2", "--text_audio_cosine", "--zero_shot_clips", "7"]
    attention = {"layers": [1, 2], "text_audio_cosine": True}
    clips = {"clips": 7, "speaker_encoder": None, "transcriber": None}
    assert component_options(parse(*asked)) == {"shared_attention": attention, "zero_shot": clips}
    components = ["--strategic_logging_components", "inputs", "shared_attention"]
    assert component_options(parse(*asked, *components)) == {"shared_attention": attention}


def test_a_layer_that_the_model_lacks_is_named() -> None:
    check_layers(None, 3)
    check_layers([0, 2], 3)
    with pytest.raises(ValueError, match="--attention_layers 3 9: the model has layers 0 to 2"):
        check_layers([3, 1, 9], 3)


@pytest.mark.parametrize(
    ("more", "strategy"),
    [
        ([], "no"),
        (["--eval_data_file", "e.json"], "steps"),
        (["--validation_split", "0.1"], "steps"),
        (["--eval_data_file", "e.json", "--disable_eval"], "no"),
    ],
)
def test_when_the_trainer_evaluates(
    more: list[str], strategy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")  # put back afterwards: the call below sets it
    made = make_training_arguments(parse("--eval_steps", "7", "--logging_dir", str(tmp_path), *more))
    assert made.eval_strategy == strategy
    assert made.eval_steps == (7 if strategy == "steps" else None)
    assert made.remove_unused_columns is False


def test_the_components_are_telemetrys_own() -> None:
    from telemetry import COMPONENTS as OFFERED  # the script names them without importing telemetry
    from trainer.arguments import COMPONENTS

    assert list(COMPONENTS) == list(OFFERED)
