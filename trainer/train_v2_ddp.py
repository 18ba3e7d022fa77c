"""Fine-tunes Higgs Audio v2 for zero-shot voice cloning.

python trainer/train_v2_ddp.py --model_path ... --train_data_file ... --output_dir ...
torchrun --nproc_per_node=2 trainer/train_v2_ddp.py ...
"""

from __future__ import annotations

import functools
import logging
import os
import random
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import trainer as _trainer  # noqa: F401  (first: repairs what transformers imports)

# isort: split
import torch
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from trainer.arguments import ScriptArguments
from trainer.chatml import DataFileError, Sample, load_samples
from trainer.clip_summary import ClipSummary
from trainer.code_cache import CodeCache
from trainer.collator import VoiceCloningCollator
from trainer.dataset import VoiceCloningDataset
from trainer.higgs_trainer import HiggsAudioTrainer
from trainer.model import add_lora, describe_trainable, freeze_llm, load_model
from trainer.processing import check_processor, codec_of, load_processor

logger = logging.getLogger("trainer.train_v2_ddp")


def main(argv: Sequence[str] | None = None) -> None:
    """Train. Faults in arguments, data or checkpoints end the program before the first step, with one message."""
    try:
        arguments = parse_arguments(argv)
        set_up_logging(arguments)
        trainer = build_trainer(arguments)
        resume = find_checkpoint(arguments)
    except (DataFileError, ValueError) as error:
        sys.exit(f"error: {error}")
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    summarize(trainer, arguments)


def parse_arguments(argv: Sequence[str] | None = None) -> ScriptArguments:
    """The command line as checked arguments."""
    parser = HfArgumentParser(cast(Any, ScriptArguments), description=__doc__)
    (arguments,) = parser.parse_args_into_dataclasses(list(argv) if argv is not None else None)
    return arguments


def set_up_logging(arguments: ScriptArguments) -> None:
    """INFO on rank 0, warnings elsewhere."""
    if arguments.enable_strategic_logging:
        from telemetry import setup_logging

        setup_logging()
        return
    level = logging.INFO if is_main_rank() else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("trainer").setLevel(level)


def is_main_rank() -> bool:
    """Whether this process is the one that talks."""
    return os.environ.get("RANK", "0") == "0"


def build_trainer(arguments: ScriptArguments) -> HiggsAudioTrainer:
    """Everything that training needs, checked."""
    training_arguments = make_training_arguments(arguments)
    set_seed(arguments.seed)
    processor = load_processor(arguments.model_path, arguments.audio_tokenizer_path, training_arguments.device)
    train_samples, eval_samples = load_data(arguments)
    model: Any = load_model(arguments.model_path)
    check_processor(processor, model.config)
    check_layers(arguments.attention_layers, model.config.num_hidden_layers)
    clips = [path for sample in train_samples + eval_samples for path in sample.references + sample.targets]
    codes = CodeCache(codec_of(processor)).encode(clips)
    if arguments.freeze_llm:
        freeze_llm(model)
    if arguments.use_lora:
        model = add_lora(model, arguments.lora_rank, arguments.lora_alpha, arguments.lora_dropout)
    logger.info(describe_trainable(model))
    return HiggsAudioTrainer(
        model=model,
        args=training_arguments,
        data_collator=VoiceCloningCollator(processor.tokenizer.pad_token_id, processor.audio_stream_eos_id),
        train_dataset=VoiceCloningDataset(train_samples, processor, codes),
        eval_dataset=VoiceCloningDataset(eval_samples, processor, codes) if eval_samples else None,
        processing_class=processor,
        callbacks=strategic_callbacks(arguments, {sample.speaker for sample in train_samples if sample.speaker}),
    )


def make_training_arguments(arguments: ScriptArguments) -> TrainingArguments:
    """The Trainer's arguments."""
    evaluates = bool(arguments.eval_data_file or arguments.validation_split) and not arguments.disable_eval
    if arguments.logging_dir or arguments.enable_strategic_logging:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(arguments.logs)
    return TrainingArguments(
        output_dir=arguments.output_dir,
        num_train_epochs=arguments.num_train_epochs,
        max_steps=arguments.max_steps,
        per_device_train_batch_size=arguments.per_device_train_batch_size,
        per_device_eval_batch_size=arguments.per_device_eval_batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        learning_rate=arguments.learning_rate,
        warmup_steps=arguments.warmup_steps,
        max_grad_norm=arguments.max_grad_norm,
        logging_steps=arguments.logging_steps,
        logging_first_step=True,
        save_steps=arguments.save_steps,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=arguments.eval_steps if evaluates else None,
        seed=arguments.seed,
        bf16=arguments.bf16,
        # Unless asked for, a CPU trains without bf16, and every rank for itself.
        use_cpu=not torch.accelerator.is_available(),
        report_to=trainer_destinations(arguments),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,  # metadata travels in the batch
        ddp_find_unused_parameters=False,  # every batch has text and audio, and so a use for every parameter
        label_names=["labels", "audio_labels"],
    )


def trainer_destinations(arguments: ScriptArguments) -> list[str]:
    """What the Trainer itself reports to: nothing where strategic logging does, which sends the Trainer's numbers too.

    The Trainer's own W&B callback would make the training thread wait for the server.
    """
    return [] if arguments.enable_strategic_logging else list(arguments.destinations)


def load_data(arguments: ScriptArguments) -> tuple[list[Sample], list[Sample]]:
    """Training and evaluation samples, every file checked as a whole."""
    load = functools.partial(
        load_samples,
        max_reference_seconds=arguments.max_reference_seconds,
        skip_bad_samples=arguments.skip_bad_samples,
        show_progress=is_main_rank(),
    )
    samples = load(arguments.train_data_file)
    if arguments.eval_data_file:
        return samples, load(arguments.eval_data_file)
    return split_samples(samples, arguments.validation_split, arguments.seed)


def split_samples(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Hold out about ``share`` of the samples: whole speakers where all are named, so that evaluation is zero-shot.

    Raises:
        ValueError: when nothing would be left to train on.
    """
    if not share:
        return list(samples), []
    by_speaker = all(sample.speaker for sample in samples) and len({sample.speaker for sample in samples}) > 1
    keys = [sample.speaker if by_speaker else sample.sample_id for sample in samples]
    order = sorted(set(keys), key=str)
    random.Random(seed).shuffle(order)
    held: set[str | None] = set()
    while order and sum(key in held for key in keys) < share * len(samples):
        held.add(order.pop())
    train = [sample for sample, key in zip(samples, keys, strict=True) if key not in held]
    if not train:
        raise ValueError(f"--validation_split {share} of {len(samples)} samples leaves nothing to train on")
    kind = "speaker" if by_speaker else "sample"
    logger.info("held out %d of %d samples by %s", len(samples) - len(train), len(samples), kind)
    return train, [sample for sample, key in zip(samples, keys, strict=True) if key in held]


def strategic_callbacks(arguments: ScriptArguments, voices: Collection[str] = ()) -> list[TrainerCallback]:
    """The telemetry that was asked for; nothing of it is imported otherwise. ``voices``: those of the training data."""
    if not arguments.enable_strategic_logging:
        return []
    from telemetry import (
        ConsoleBackend,
        SoundPolicy,
        StrategicTelemetry,
        TensorBoardBackend,
        TrackioBackend,
        WandbBackend,
    )

    made: dict[str, Callable[[], Any]] = {
        "tensorboard": TensorBoardBackend,
        "trackio": TrackioBackend,
        "wandb": functools.partial(WandbBackend, every_rank=arguments.wandb_all_ranks),
    }
    backends = [ConsoleBackend(), *(make() for name, make in made.items() if name in arguments.destinations)]
    backends.append(ClipSummary(voices))
    return [
        StrategicTelemetry(
            components=arguments.strategic_logging_components,
            logging_steps=arguments.strategic_logging_steps,
            backends=backends,
            logging_dir=arguments.logs,
            options=component_options(arguments),
            sound=SoundPolicy(enabled=arguments.telemetry_audio == "on"),
        )
    ]


def component_options(arguments: ScriptArguments) -> dict[str, dict[str, Any]]:
    """What single components take beyond what all do, of those that were chosen."""
    options: dict[str, dict[str, Any]] = {
        "shared_attention": {
            "layers": arguments.attention_layers,
            "text_audio_cosine": arguments.text_audio_cosine,
        },
        "zero_shot": {
            "clips": arguments.zero_shot_clips,
            "speaker_encoder": arguments.speaker_encoder,
            "transcriber": arguments.transcriber,
        },
    }
    return {name: given for name, given in options.items() if name in arguments.strategic_logging_components}


def check_layers(chosen: Sequence[int] | None, layers: int) -> None:
    """Whether the model has the layers that are to be looked into.

    Raises:
        ValueError: when it does not.
    """
    beyond = [index for index in chosen or () if index >= layers]
    if beyond:
        raise ValueError(f"--attention_layers {' '.join(map(str, beyond))}: the model has layers 0 to {layers - 1}")


def find_checkpoint(arguments: ScriptArguments) -> str | None:
    """The checkpoint to resume from.

    Raises:
        ValueError: when there is none where one was asked for.
    """
    asked = arguments.resume_from_checkpoint
    if asked is None or asked.lower() in ("", "false", "none"):
        return None
    if asked.lower() not in ("last", "true"):
        if not Path(asked).is_dir():
            raise ValueError(f"--resume_from_checkpoint {asked}: no such directory")
        return asked
    found = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).is_dir() else None
    if found is None:
        raise ValueError(f"--resume_from_checkpoint {asked}: no checkpoint in {arguments.output_dir}")
    return str(found)


def summarize(trainer: HiggsAudioTrainer, arguments: ScriptArguments) -> None:
    """Say on rank 0 how the loss went, what was written, and how to open it."""
    if not trainer.is_world_process_zero():
        return
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if losses:
        logger.info("loss: %.4f at the first logged step, %.4f at the last", losses[0], losses[-1])
    for line in clip_lines(trainer):
        logger.info("%s", line)
    output = Path(arguments.output_dir).resolve()
    logger.info("model: %s", output)
    logger.info("checkpoints: %s", ", ".join(sorted(path.name for path in output.glob("checkpoint-*"))) or "none")
    if arguments.enable_strategic_logging and "tensorboard" in arguments.destinations:
        from telemetry import launch_command

        logger.info("telemetry: %s", arguments.logs.resolve())
        logger.info("open the dashboard with: %s", launch_command(arguments.logs))


def clip_lines(trainer: HiggsAudioTrainer) -> Iterator[str]:
    """What telemetry has measured of the clips generated last."""
    members = (getattr(callback, "members", ()) for callback in trainer.callback_handler.callbacks)
    backends = next((own[0].backends or () for own in members if own), ())
    return (line for backend in backends if isinstance(backend, ClipSummary) for line in backend.lines())


if __name__ == "__main__":
    try:
        main()
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
