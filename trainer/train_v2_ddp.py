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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import trainer as _trainer  # noqa: F401  (first: repairs what transformers imports)

# isort: split
import torch
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from telemetry import printable
from trainer.arguments import FineTuningArguments, ScriptArguments, parse_arguments
from trainer.chatml import Sample, load_samples
from trainer.code_cache import CodeCache
from trainer.collator import VoiceCloningCollator
from trainer.dataset import VoiceCloningDataset
from trainer.higgs_trainer import HiggsAudioTrainer
from trainer.model import add_lora, describe_trainable, freeze_llm, load_model
from trainer.processing import check_processor, codec_of, load_processor

logger = logging.getLogger("trainer.train_v2_ddp")

STOPPED = 4
"""Exit code of a training that ``--stop_on`` has ended."""


def main(argv: Sequence[str] | None = None) -> None:
    """Train. Faults in arguments, data or checkpoints end the program before the first step, with one message."""
    try:
        arguments = script, training = parse_arguments(argv)
        set_up_logging(script)
        trainer = build_trainer(arguments)
        resume = find_checkpoint(training.resume_from_checkpoint, training.output_dir)
        wrong = look_at_the_data(trainer, script) if script.check_only or resume is None else 0
    except (ValueError, OSError, ImportError) as error:
        sys.exit(printable(f"error: {error}"))
    if script.check_only:
        sys.exit(int(wrong > 0))
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    summarize(trainer, script, training)
    if stopped := next(filter(None, (getattr(one, "stopped", "") for one in trainer.callback_handler.callbacks)), ""):
        if trainer.is_world_process_zero():
            logger.error("stopped, as --stop_on asks: %s", stopped)
        sys.exit(STOPPED)


def set_up_logging(script: ScriptArguments) -> None:
    """INFO on rank 0, warnings elsewhere."""
    if script.enable_strategic_logging:
        from telemetry import setup_logging

        setup_logging()
        return
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("trainer").setLevel(logging.INFO if is_main_rank() else logging.WARNING)


def is_main_rank() -> bool:
    """Whether this process is the one that talks."""
    return os.environ.get("RANK", "0") == "0"


def build_trainer(arguments: tuple[ScriptArguments, FineTuningArguments]) -> HiggsAudioTrainer:
    """Everything that training needs, checked.

    Raises:
        ValueError: names the argument or file, what is wrong with it and what to do.
    """
    script, training = arguments
    set_seed(training.seed)
    processor = load_processor(script.model_path, script.audio_tokenizer_path, training.device)
    train_samples, eval_samples = load_data(script, training.seed)
    model: Any = load_model(script.model_path)
    check_processor(processor, model.config)
    check_layers(script.attention_layers, model.config.num_hidden_layers)
    clips = [path for sample in train_samples + eval_samples for path in sample.references + sample.targets]
    codes = CodeCache(codec_of(processor)).encode(clips)
    if script.freeze_llm:
        freeze_llm(model)
    if script.use_lora:
        model = add_lora(model, script.lora_rank, script.lora_alpha, script.lora_dropout)
    logger.info(describe_trainable(model))
    # Where the Trainer's own TensorBoard callback writes.
    chosen = training.logging_dir or os.environ.get("TENSORBOARD_LOGGING_DIR")
    os.environ["TENSORBOARD_LOGGING_DIR"] = chosen or str(training.logs)
    return HiggsAudioTrainer(
        model=model,
        args=training,
        data_collator=VoiceCloningCollator(processor.tokenizer.pad_token_id, processor.audio_stream_eos_id),
        train_dataset=VoiceCloningDataset(train_samples, processor, codes),
        eval_dataset=VoiceCloningDataset(eval_samples, processor, codes) if eval_samples else None,
        processing_class=processor,
        callbacks=strategic_callbacks(script, training),
    )


# Data


def load_data(script: ScriptArguments, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Training and evaluation samples, every file checked as a whole."""
    load = functools.partial(
        load_samples,
        max_reference_seconds=script.max_reference_seconds,
        skip_bad_samples=script.skip_bad_samples,
        show_progress=is_main_rank(),
    )
    samples = load(script.train_data_file)
    if script.eval_data_file:
        return samples, load(script.eval_data_file)
    return split_samples(samples, script.validation_split, seed)


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


# Telemetry


def strategic_callbacks(script: ScriptArguments, training: FineTuningArguments) -> list[TrainerCallback]:
    """The telemetry that was asked for; nothing of it is imported otherwise."""
    if not script.enable_strategic_logging:
        return []
    from telemetry import SoundPolicy, StrategicTelemetry, backends_for

    return [
        StrategicTelemetry(
            components=script.strategic_logging_components,
            logging_steps=script.strategic_logging_steps,
            backends=backends_for(training.destinations, every_rank=script.wandb_all_ranks),
            logging_dir=training.logs,
            options=component_options(script),
            sound=SoundPolicy(enabled=script.telemetry_audio == "on"),
            alert_to=script.alert_to,
            stop_on=script.stop_on,
            health_rules=script.health_rules,
        )
    ]


@functools.cache
def listeners(speaker_encoder: str | None, transcriber: str | None) -> tuple[Any, Any]:
    """What compares voices and what writes down words, loaded once.

    Raises:
        ValueError: when one cannot be loaded.
    """
    from telemetry import load_speaker_encoder, load_transcriber

    return (
        load_speaker_encoder(speaker_encoder) if speaker_encoder else None,
        load_transcriber(transcriber) if transcriber else None,
    )


def component_options(script: ScriptArguments) -> dict[str, dict[str, Any]]:
    """What single components take beyond what all do, of those that were chosen."""
    speaker_encoder, transcriber = listeners(script.speaker_encoder, script.transcriber)
    options: dict[str, dict[str, Any]] = {
        "shared_attention": {"layers": script.attention_layers, "text_audio_cosine": script.text_audio_cosine},
        "zero_shot": {
            "clips": script.zero_shot_clips,
            "speaker_encoder": speaker_encoder,
            "transcriber": transcriber,
            "opinion_scorer": script.opinion_scorer,
        },
    }
    return {name: given for name, given in options.items() if name in script.strategic_logging_components}


def check_layers(chosen: Sequence[int] | None, layers: int) -> None:
    """Whether the model has the layers that are to be looked into.

    Raises:
        ValueError: when it does not.
    """
    beyond = [index for index in chosen or () if index >= layers]
    if beyond:
        raise ValueError(f"--attention_layers {' '.join(map(str, beyond))}: the model has layers 0 to {layers - 1}")


def look_at_the_data(trainer: HiggsAudioTrainer, script: ScriptArguments) -> int:
    """Go through the training data on rank 0, say what is wrong, and have telemetry show it; how much that is.

    Raises:
        ValueError: when what listens to it cannot be loaded.
    """
    if not is_main_rank() or not (script.enable_strategic_logging or script.check_only):
        return 0
    from telemetry import StrategicTelemetry, check_data

    data = cast(VoiceCloningDataset, trainer.train_dataset)
    report = check_data(
        [data.metadata(index) for index in range(len(data))],
        *listeners(script.speaker_encoder, script.transcriber),
        show_progress=not trainer.args.disable_tqdm,
    )
    for one in trainer.callback_handler.callbacks:
        if isinstance(one, StrategicTelemetry):
            one.instruments.append(report)
    for found in report.findings:
        level = logging.ERROR if found.failing else logging.WARNING
        logger.log(level, "%s: %s. What to do: %s", found.fault, printable(found.evidence), found.advice)
    looked, total = (int(report.values[f"setup/data/{name}"]) for name in ("looked_at", "samples"))
    logger.info("data: %d of %d samples listened to, %d findings", looked, total, len(report.findings))
    return len(report.findings)


# Checkpoints, and the end


def find_checkpoint(asked: str | None, output_dir: str) -> str | None:
    """The checkpoint to resume from: a directory, ``last`` for the newest one in ``output_dir``, or none.

    Raises:
        ValueError: when there is none where one was asked for.
    """
    if asked is None or asked.lower() in ("", "false", "none"):
        return None
    if asked.lower() not in ("last", "true"):
        if not Path(asked).is_dir():
            raise ValueError(f"--resume_from_checkpoint {asked}: no such directory")
        return asked
    found = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    if found is None:
        raise ValueError(f"--resume_from_checkpoint {asked}: no checkpoint in {output_dir}")
    return str(found)


def summarize(trainer: HiggsAudioTrainer, script: ScriptArguments, training: FineTuningArguments) -> None:
    """Say on rank 0 how the loss went, what was written, and how to open it."""
    if not trainer.is_world_process_zero():
        return
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if losses:
        logger.info("loss: %.4f at the first logged step, %.4f at the last", losses[0], losses[-1])
    output = Path(training.output_dir).resolve()
    logger.info("model: %s", output)
    logger.info("checkpoints: %s", ", ".join(sorted(path.name for path in output.glob("checkpoint-*"))) or "none")
    if script.enable_strategic_logging and "tensorboard" in training.destinations:
        from telemetry import launch_command

        logger.info("telemetry: %s", training.logs.resolve())
        logger.info("open the dashboard with: %s", launch_command(training.logs))


if __name__ == "__main__":
    try:
        main()
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
