"""Command line of the training script: its own arguments, and all of the Trainer's with the script's defaults."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

COMPONENTS = ("inputs", "outputs", "shared_attention", "zero_shot")
DESTINATIONS = ("tensorboard", "wandb", "trackio", "all", "none")


@dataclass
class ScriptArguments:
    """What ``trainer/train_v2_ddp.py`` takes beside the Trainer's arguments. ``--help`` prints both."""

    _argument_group_name = "the script's own arguments"

    model_path: str = field(
        metadata={"help": "Directory or hub id of the Higgs Audio v2 model, tokenizer and processor."}
    )
    train_data_file: str = field(metadata={"help": "ChatML voice-cloning data, JSON or JSONL (docs/data_format.md)."})
    audio_tokenizer_path: str | None = field(
        default=None,
        metadata={"help": "Directory or hub id of the codec. Default: the one the model's processor names."},
    )
    eval_data_file: str | None = field(default=None, metadata={"help": "Evaluation data, in the same format."})
    validation_split: float = field(
        default=0.0,
        metadata={"help": "Without --eval_data_file: share of the training data to hold out, whole speakers first."},
    )
    disable_eval: bool = field(default=False, metadata={"help": "Never evaluate."})
    max_reference_seconds: float = field(default=30.0, metadata={"help": "Longest reference audio that is accepted."})
    skip_bad_samples: bool = field(
        default=False, metadata={"help": "Go on with the good samples of a data file and say which were left out."}
    )
    use_lora: bool = field(default=False, metadata={"help": "Train LoRA adapters on attention and both FFNs only."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters (alpha over rank)."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the adapters."})
    freeze_llm: bool = field(
        default=False,
        metadata={"help": "Train the audio parts only: audio FFNs, their norms, audio embedding and audio head."},
    )
    wandb_all_ranks: bool = field(
        default=False,
        metadata={
            "help": "Every rank writes to the W&B run, with its own system metrics and rank_<r>/ (docs/wandb.md)."
        },
    )
    enable_strategic_logging: bool = field(
        default=False, metadata={"help": "Measure what happens inside training steps (docs/strategic_logging.md)."}
    )
    strategic_logging_steps: int = field(default=100, metadata={"help": "Measure step 1 and every N optimizer steps."})
    strategic_logging_components: list[str] = field(
        default_factory=lambda: list(COMPONENTS),
        metadata={"help": "Which questions to answer. Default: all.", "choices": list(COMPONENTS)},
    )
    attention_layers: list[int] | None = field(
        default=None,
        metadata={
            "help": "Layers, from 0, whose attention and feed-forward networks are looked into. "
            "Default: the first, the middle and the last."
        },
    )
    text_audio_cosine: bool = field(
        default=False,
        metadata={
            "help": "Measure whether text and audio pull the shared attention the same way, for a forward and two "
            "backward passes more on every due step."
        },
    )
    alert_to: list[str] | None = field(
        default=None,
        metadata={
            "help": "Where alerts are sent: slack://, discord://, mailto://, jsons://, ... (docs/alerts.md). "
            "Default: those in STRATEGIC_TELEMETRY_ALERT_TO."
        },
    )
    stop_on: list[str] = field(
        default_factory=list,
        metadata={
            "help": "End the training, with a checkpoint and exit code 4, on findings: 'failing', 'warning' "
            "or names of rules (docs/alerts.md). Default: never."
        },
    )
    health_rules: str | None = field(
        default=None,
        metadata={"help": "YAML or JSON file with other limits for rules, and rules of your own (docs/health.md)."},
    )
    telemetry_audio: str = field(
        default="on",
        metadata={"help": "'off' keeps every number and sends no sound anywhere.", "choices": ["on", "off"]},
    )
    zero_shot_clips: int = field(
        default=4, metadata={"help": "Evaluation samples a rank that the model speaks at every evaluation; 0 for none."}
    )
    speaker_encoder: str | None = field(
        default=None,
        metadata={"help": "'resemblyzer', or directory or hub id of an x-vector model: the similarity of voices."},
    )
    transcriber: str | None = field(
        default=None,
        metadata={"help": "'pocketsphinx', or directory or hub id of a speech recognition model: word errors."},
    )
    opinion_scorer: str | None = field(default=None, metadata={"help": "'dnsmos': how good the sound is, 1 to 5."})

    check_only: bool = field(
        default=False,
        metadata={"help": "End after the checks of arguments, data and model: exit code 0 where all is well, else 1."},
    )

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything.

        Raises:
            ValueError: names the argument and what it may be.
        """
        require_positive(self, "strategic_logging_steps", "lora_rank", "max_reference_seconds")
        if not 0 <= self.validation_split < 1:
            raise ValueError(f"--validation_split must be at least 0 and below 1, got {self.validation_split}")
        if min(self.attention_layers or [0]) < 0:
            raise ValueError(f"--attention_layers counts from 0, got {self.attention_layers}")
        if self.zero_shot_clips < 0:
            raise ValueError(f"--zero_shot_clips must be at least 0, got {self.zero_shot_clips}")
        if self.use_lora and self.freeze_llm:
            raise ValueError("--use_lora already freezes every base parameter: leave --freeze_llm out")
        if self.eval_data_file and self.validation_split:
            raise ValueError("--eval_data_file and --validation_split exclude each other")

    @property
    def evaluates(self) -> bool:
        """Whether there is something to evaluate on, and evaluation is wanted."""
        return bool(self.eval_data_file or self.validation_split) and not self.disable_eval


@dataclass
class FineTuningArguments(TrainingArguments):
    """All of the Trainer's arguments; declared here are those with a default, help or check of the script's own.

    Attributes:
        destinations: where to report, each once. ``report_to`` is what the Trainer itself reports to.
    """

    _argument_group_name = "the Trainer's arguments"

    output_dir: str = field(metadata={"help": "Where checkpoints and the trained model go."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Samples a device and microbatch."})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "Samples a device at evaluation."})
    logging_steps: float = field(default=10, metadata={"help": "Log loss and learning rate every N steps."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step too."})
    eval_strategy: IntervalStrategy | str = field(
        default="steps", metadata={"help": "When to evaluate, where there is evaluation data."}
    )
    eval_steps: float | None = field(default=500, metadata={"help": "An evaluation every N steps."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint directory, or 'last' for the newest one in --output_dir."}
    )
    report_to: list[str] = field(
        default_factory=lambda: ["tensorboard"],
        metadata={
            "help": "Where to report, one or several. 'all' is tensorboard and wandb.",
            "choices": list(DESTINATIONS),
        },
    )
    logging_dir: str | None = field(default=None, metadata={"help": "TensorBoard files. Default: <output_dir>/logs."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Off: metadata travels in the batch."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Off: every batch has text and audio, and so a use for every parameter."}
    )
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels", "audio_labels"], metadata={"help": "Labels in the batches."}
    )

    def __post_init__(self) -> None:
        """Check, then let the Trainer's arguments do so; a machine without an accelerator trains on its CPU.

        Raises:
            ValueError: names the argument and what it may be.
        """
        require_positive(
            self,
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("logging_steps", "save_steps", "eval_steps"),
        )
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise ValueError(f"--learning_rate must be a finite number of at least 0, got {self.learning_rate}")
        if "none" in self.report_to and len(set(self.report_to)) > 1:
            raise ValueError(f"--report_to none excludes every other destination, got {' '.join(self.report_to)}")
        chosen = ["tensorboard", "wandb", *self.report_to] if "all" in self.report_to else self.report_to
        self.report_to = [name for name in dict.fromkeys(chosen) if name not in ("all", "none")]
        self.destinations = tuple(self.report_to)
        # Unless asked for, a CPU trains without bf16, and every rank for itself.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()

    @property
    def logs(self) -> Path:
        """Where TensorBoard files go."""
        return Path(self.logging_dir) if self.logging_dir else Path(self.output_dir) / "logs"


def require_positive(arguments: Any, *names: str) -> None:
    """Refuse values of 0, below 0 or NaN.

    Raises:
        ValueError: names the first such argument and its value.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} must be above 0, got {value:g}")


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[ScriptArguments, FineTuningArguments]:
    """Return a command line (by default the program's own) as checked arguments that fit together.

    Raises:
        ValueError: names the argument and what it may be.
        SystemExit: for what argparse refuses, with its message.
    """
    parser = HfArgumentParser(
        cast(Any, (ScriptArguments, FineTuningArguments)),
        description="Fine-tune Higgs Audio v2 for zero-shot voice cloning.",
        usage="%(prog)s --model_path MODEL --train_data_file FILE --output_dir DIR [argument ...]",
    )
    script, training = parser.parse_args_into_dataclasses(list(argv) if argv is not None else None)
    _fit_together(script, training)
    return script, training


def _fit_together(script: ScriptArguments, training: FineTuningArguments) -> None:
    """Settle what only both kinds of arguments tell."""
    if script.wandb_all_ranks and not (script.enable_strategic_logging and "wandb" in training.destinations):
        raise ValueError("--wandb_all_ranks needs --enable_strategic_logging and --report_to wandb")
    if (script.alert_to or script.stop_on or script.health_rules) and not script.enable_strategic_logging:
        raise ValueError("--alert_to, --stop_on and --health_rules need --enable_strategic_logging")
    if script.enable_strategic_logging:
        # Telemetry sends the Trainer's numbers too, and the Trainer's own W&B callback would make the training thread
        # wait for the server.
        training.report_to = []
    if not script.evaluates:
        _refuse_what_needs_evaluation(training)
        training.eval_strategy, training.do_eval = IntervalStrategy.NO, False
    if training.eval_strategy != "steps":
        training.eval_steps = None


def _refuse_what_needs_evaluation(training: FineTuningArguments) -> None:
    needs = {
        "--load_best_model_at_end": training.load_best_model_at_end,
        "--eval_on_start": training.eval_on_start,
        "--save_strategy best": training.save_strategy == "best",
        "--lr_scheduler_type reduce_lr_on_plateau": training.lr_scheduler_type == "reduce_lr_on_plateau",
        "--lr_scheduler_type greedy": training.lr_scheduler_type == "greedy",
    }
    for argument, asked in needs.items():
        if asked:
            raise ValueError(f"{argument} needs --eval_data_file or --validation_split, and no --disable_eval")
