"""The command line: what it takes, what it says of itself, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from trainer.arguments import FineTuningArguments, ScriptArguments, parse_arguments
from trainer.train_v2_ddp import check_layers, component_options, main

REQUIRED = ["--model_path", "m", "--train_data_file", "t.json", "--output_dir", "out"]
# Every argument that the script had before it took all of the Trainer's, and its default then.
DEFAULTS: dict[str, Any] = {
    "model_path": "m",
    "audio_tokenizer_path": None,
    "train_data_file": "t.json",
    "eval_data_file": None,
    "validation_split": 0.0,
    "max_reference_seconds": 30.0,
    "output_dir": "out",
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-5,
    "warmup_steps": 0,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "save_steps": 500,
    "eval_steps": 500,
    "seed": 42,
    "bf16": False,
    "use_lora": False,
    "lora_rank": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "freeze_llm": False,
    "disable_eval": False,
    "resume_from_checkpoint": None,
    "report_to": ["tensorboard"],
    "logging_dir": None,
    "enable_strategic_logging": False,
    "strategic_logging_steps": 100,
    "strategic_logging_components": ["inputs", "outputs", "shared_attention", "zero_shot"],
    "telemetry_audio": "on",
    "attention_layers": None,
    "text_audio_cosine": False,
    "zero_shot_clips": 4,
    "speaker_encoder": None,
    "transcriber": None,
    "opinion_scorer": None,
    "wandb_all_ranks": False,
    "skip_bad_samples": False,
}
# What the script sets of the Trainer's arguments beside those.
SET_FOR_THE_TRAINER: dict[str, Any] = {
    "logging_first_step": True,
    "eval_strategy": "steps",
    "remove_unused_columns": False,
    "ddp_find_unused_parameters": False,
    "label_names": ["labels", "audio_labels"],
}


def parse(*more: str) -> tuple[ScriptArguments, FineTuningArguments]:
    return parse_arguments([*REQUIRED, *more])


def parsed(*more: str) -> dict[str, Any]:
    """Both kinds of arguments by name."""
    return {name: value for part in parse(*more) for name, value in vars(part).items()}


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
    assert {f"--{name}" for name in DEFAULTS} <= entries.keys()
    for name in DEFAULTS:
        said = entries[f"--{name}"].split("(default:")[0]
        words = [word for word in said.replace(name.upper(), "").split() if word.strip(".,").isalpha()]
        assert len(words) >= 2, f"--{name}: {said}"
    for component in ("inputs", "outputs", "shared_attention", "zero_shot"):
        assert component in entries["--strategic_logging_components"]


def test_defaults() -> None:
    made = parsed("--eval_data_file", "e.json")
    expected = DEFAULTS | SET_FOR_THE_TRAINER | {"eval_data_file": "e.json"}
    assert {name: made[name] for name in expected} == expected
    assert parse()[1].logs == Path("out/logs")
    assert parse("--logging_dir", "elsewhere")[1].logs == Path("elsewhere")


def test_other_defaults_are_the_trainers() -> None:
    ours = parse("--eval_data_file", "e.json")[1].to_dict()
    theirs = TrainingArguments("out", use_cpu=True, eval_strategy="steps", eval_steps=500).to_dict()
    changed = {name for name, value in theirs.items() if ours[name] != value}
    assert changed <= DEFAULTS.keys() | SET_FOR_THE_TRAINER.keys()
    assert ours.keys() - theirs.keys() == {"logging_dir"}


def test_every_argument_of_before_is_taken() -> None:
    chosen = {
        "audio_tokenizer_path": "codec",
        "eval_data_file": "e.json",
        "resume_from_checkpoint": "last",
        "logging_dir": "logs",
        "attention_layers": [1, 2],
        "speaker_encoder": "encoder",
        "transcriber": "transcriber",
        "opinion_scorer": "dnsmos",
    }
    given = DEFAULTS | chosen
    assert None not in given.values()
    line = []
    for name, value in given.items():
        line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    made = {name: value for part in parse_arguments(line) for name, value in vars(part).items()}
    assert {name: made[name] for name in given} == given


def test_components_are_a_list() -> None:
    assert parse("--strategic_logging_components", "outputs", "inputs")[0].strategic_logging_components == [
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
    assert parse(*more)[1].report_to == destinations


def test_components_that_were_chosen_are_told_what_was_asked_of_them() -> None:
    asked = ["--attention_layers", "1", "2", "--text_audio_cosine", "--zero_shot_clips", "7"]
    attention = {"layers": [1, 2], "text_audio_cosine": True}
    clips = {"clips": 7, "speaker_encoder": None, "transcriber": None, "opinion_scorer": None}
    assert component_options(parse(*asked)[0]) == {"shared_attention": attention, "zero_shot": clips}
    components = ["--strategic_logging_components", "inputs", "shared_attention"]
    assert component_options(parse(*asked, *components)[0]) == {"shared_attention": attention}


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
        (["--eval_data_file", "e.json", "--eval_strategy", "no"], "no"),
        (["--eval_data_file", "e.json", "--eval_strategy", "epoch"], "epoch"),
    ],
)
def test_when_the_trainer_evaluates(more: list[str], strategy: str) -> None:
    _, made = parse("--eval_steps", "7", *more)
    assert made.eval_strategy == strategy
    assert made.do_eval is (strategy != "no")
    assert made.eval_steps == (7 if strategy == "steps" else None)
    assert made.remove_unused_columns is False


@pytest.mark.parametrize(
    "asked",
    [
        ["--load_best_model_at_end"],
        ["--eval_on_start"],
        ["--save_strategy", "best", "--metric_for_best_model", "loss"],
        ["--lr_scheduler_type", "reduce_lr_on_plateau"],
        ["--lr_scheduler_type", "greedy"],
    ],
)
def test_what_needs_evaluation_is_refused_without_it(asked: list[str]) -> None:
    named = "--save_strategy best" if "best" in asked else " ".join(asked)
    for more in ([], ["--eval_data_file", "e.json", "--disable_eval"]):
        with pytest.raises(ValueError, match=f"^{named} needs --eval_data_file or --validation_split, and no "):
            parse(*asked, *more)
    assert parse(*asked, "--eval_data_file", "e.json")[1].eval_strategy == "steps"


def test_all_of_the_trainers_arguments_reach_it() -> None:
    given = {
        "optim": "adafactor",
        "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": '{"num_cycles": 2}',
        "save_total_limit": "1",
        "metric_for_best_model": "eval_loss",
        "weight_decay": "0.1",
        "dataloader_num_workers": "2",
        "torch_compile": "true",
        "torch_compile_backend": "eager",
        "activation_checkpointing": "true",
    }
    _, made = parse(*(part for name, value in given.items() for part in (f"--{name}", value)))
    typed = {"lr_scheduler_kwargs": {"num_cycles": 2}, "save_total_limit": 1, "weight_decay": 0.1}
    flags = {"dataloader_num_workers": 2, "torch_compile": True, "activation_checkpointing": True}
    expected = given | typed | flags
    assert {name: getattr(made, name) for name in expected} == expected
    assert made.gradient_checkpointing is True
    assert parse("--fsdp", "full_shard")[1].fsdp_plugin_args is not None


def test_the_components_are_telemetrys_own() -> None:
    from telemetry import COMPONENTS as OFFERED  # the script names them without importing telemetry
    from trainer.arguments import COMPONENTS

    assert list(COMPONENTS) == list(OFFERED)
