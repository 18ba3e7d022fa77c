"""Command line of the training script."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

COMPONENTS = ("inputs", "outputs", "shared_attention", "zero_shot")
DESTINATIONS = ("tensorboard", "wandb", "trackio", "all", "none")


@dataclass
class ScriptArguments:
    """What ``trainer/train_v2_ddp.py`` takes. ``--help`` prints it."""

    model_path: str = field(
        metadata={"help": "Directory or hub id of the Higgs Audio v2 model, tokenizer and processor."}
    )
    train_data_file: str = field(metadata={"help": "ChatML voice-cloning data, JSON or JSONL (docs/data_format.md)."})
    output_dir: str = field(metadata={"help": "Where checkpoints and the trained model go."})
    audio_tokenizer_path: str | None = field(
        default=None,
        metadata={"help": "Directory or hub id of the codec. Default: the one the model's processor names."},
    )
    eval_data_file: str | None = field(default=None, metadata={"help": "Evaluation data, in the same format."})
    validation_split: float = field(
        default=0.0,
        metadata={"help": "Without --eval_data_file: share of the training data to hold out, whole speakers first."},
    )
    max_reference_seconds: float = field(default=30.0, metadata={"help": "Longest reference audio that is accepted."})
    skip_bad_samples: bool = field(
        default=False, metadata={"help": "Go on with the good samples of a data file and say which were left out."}
    )
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the training data."})
    max_steps: int = field(default=-1, metadata={"help": "Optimizer steps; overrides --num_train_epochs when above 0."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Samples a device and microbatch."})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "Samples a device at evaluation."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Microbatches an optimizer step."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate of AdamW."})
    warmup_steps: int = field(default=0, metadata={"help": "Steps of linear warm-up before the linear decay."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm; 0 turns it off."})
    logging_steps: int = field(default=10, metadata={"help": "The Trainer logs loss and learning rate every N steps."})
    save_steps: int = field(default=500, metadata={"help": "A checkpoint every N steps."})
    eval_steps: int = field(default=500, metadata={"help": "An evaluation every N steps."})
    seed: int = field(default=42, metadata={"help": "Of data order, dropout and new weights."})
    bf16: bool = field(default=False, metadata={"help": "Mixed precision in bfloat16."})
    use_lora: bool = field(default=False, metadata={"help": "Train LoRA adapters on attention and both FFNs only."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters (alpha over rank)."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the adapters."})
    freeze_llm: bool = field(
        default=False,
        metadata={"help": "Train the audio parts only: audio FFNs, their norms, audio embedding and audio head."},
    )
    disable_eval: bool = field(default=False, metadata={"help": "Never evaluate."})
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
    wandb_all_ranks: bool = field(
        default=False,
        metadata={
            "help": "Every rank writes to the W&B run, with its own system metrics and rank_<r>/ (docs/wandb.md)."
        },
    )
    logging_dir: str | None = field(default=None, metadata={"help": "TensorBoard files. Default: <output_dir>/logs."})
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
    telemetry_audio: str = field(
        default="on",
        metadata={"help": "'off' keeps every number and sends no sound anywhere.", "choices": ["on", "off"]},
    )
    zero_shot_clips: int = field(
        default=4, metadata={"help": "Evaluation samples a rank that the model speaks at every evaluation; 0 for none."}
    )
    speaker_encoder: str | None = field(
        default=None,
        metadata={"help": "Directory or hub id of an x-vector model (WavLM): measures the similarity of voices."},
    )
    transcriber: str | None = field(
        default=None,
        metadata={"help": "Directory or hub id of a speech recognition model: measures word and character errors."},
    )

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything.

        Raises:
            ValueError: names the argument and what it may be.
        """
        positive = (
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "logging_steps",
            "save_steps", "eval_steps", "strategic_logging_steps", "lora_rank", "max_reference_seconds",
        )  # fmt: skip
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.validation_split < 1:
            raise ValueError(f"--validation_split must be at least 0 and below 1, got {self.validation_split}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise ValueError(f"--learning_rate must be a finite number of at least 0, got {self.learning_rate}")
        if min(self.attention_layers or [0]) < 0:
            raise ValueError(f"--attention_layers counts from 0, got {self.attention_layers}")
        if self.zero_shot_clips < 0:
            raise ValueError(f"--zero_shot_clips must be at least 0, got {self.zero_shot_clips}")
        if self.use_lora and self.freeze_llm:
            raise ValueError("--use_lora already freezes every base parameter: leave --freeze_llm out")
        if "none" in self.report_to and len(set(self.report_to)) > 1:
            raise ValueError(f"--report_to none excludes every other destination, got {' '.join(self.report_to)}")
        if self.wandb_all_ranks and not (self.enable_strategic_logging and "wandb" in self.destinations):
            raise ValueError("--wandb_all_ranks needs --enable_strategic_logging and --report_to wandb")
        if self.eval_data_file and self.validation_split:
            raise ValueError("--eval_data_file and --validation_split exclude each other")

    @property
    def destinations(self) -> tuple[str, ...]:
        """Where to report, each once."""
        chosen = ["tensorboard", "wandb", *self.report_to] if "all" in self.report_to else self.report_to
        return tuple(dict.fromkeys(name for name in chosen if name not in ("all", "none")))

    @property
    def logs(self) -> Path:
        """Where TensorBoard files go."""
        return Path(self.logging_dir) if self.logging_dir else Path(self.output_dir) / "logs"
