"""What a due step of other models costs, as ratios to the steps around it: Csm with codes, Dia, and a fused loss.

The last is a language model by TRL's SFTTrainer, whose logits are computed again on a due step.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    CsmConfig,
    CsmForConditionalGeneration,
    DiaConfig,
    DiaDecoderConfig,
    DiaEncoderConfig,
    DiaForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from tests.benchmarks.step_time import ON_GPU, SMALL, Stopwatch, telemetry

FRAMES, BATCH, WORDS = 128, 2, 32_000
SHAPE: dict[str, Any] = SMALL


def describe() -> str:
    """What is trained here."""
    return f"real codebooks, 8 layers, 640 wide, batch {BATCH}, {FRAMES} frames"


def csm() -> tuple[Any, list[dict[str, Tensor]]]:
    """Csm with its 32 codebooks of 2,051 ids; the second half of the frames is taught."""
    depth = {**SHAPE, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    depth |= {"num_key_value_heads": 2, "backbone_hidden_size": SHAPE["hidden_size"]}
    config = CsmConfig(**SHAPE, text_vocab_size=1000, audio_token_id=998, audio_eos_token_id=999, pad_token_id=0,
                       bos_token_id=1, depth_decoder_config=depth)  # fmt: skip
    model = CsmForConditionalGeneration(config)
    model.codec_model.requires_grad_(False)
    codes = torch.randint(1, 2048, (8, FRAMES, 32), generator=torch.Generator().manual_seed(0))
    labels = codes.clone()
    labels[:, : FRAMES // 2] = -100
    return model, [{"input_ids": one, "labels": own} for one, own in zip(codes, labels, strict=True)]


def dia() -> tuple[Any, list[dict[str, Tensor]]]:
    """Dia with its 9 codebooks of 1,028 ids."""
    decoder = DiaDecoderConfig(
        **SHAPE, cross_num_attention_heads=10, cross_num_key_value_heads=10, cross_head_dim=64, cross_hidden_size=640
    )
    model = DiaForConditionalGeneration(
        DiaConfig(encoder_config=DiaEncoderConfig(**{**SHAPE, "num_key_value_heads": 10}), decoder_config=decoder)
    )
    chance = torch.Generator().manual_seed(0)
    data = []
    for _ in range(8):
        codes = torch.randint(0, 1024, (FRAMES + 1, 9), generator=chance)
        text = torch.randint(1, 256, (FRAMES,), generator=chance)
        data.append({"input_ids": text, "decoder_input_ids": codes[:-1], "labels": codes[1:].t()})
    return model, data


def text() -> tuple[Any, list[dict[str, Tensor]]]:
    """A language model of 32,000 words; all of them are taught."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=WORDS, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    ids = torch.randint(3, WORDS, (8, 2 * FRAMES), generator=torch.Generator().manual_seed(0))
    return model, [{"input_ids": one} for one in ids]


MODELS: dict[str, Callable[[], tuple[Any, list[dict[str, Tensor]]]]] = {"Csm": csm, "Dia": dia, "SFT": text}


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch; codebooks of Dia's labels lie under each other."""
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return {**batch, "labels": batch["labels"].flatten(0, 1)} if "decoder_input_ids" in batch else batch


def fine_tuner(model: Any, data: list[dict[str, Tensor]], common: dict[str, Any], callbacks: list[Any]) -> Any:
    """TRL's SFTTrainer."""
    import datasets
    import trl

    datasets.disable_progress_bars()
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>")),
        pad_token="<pad>", bos_token="<s>", eos_token="</s>",
    )  # fmt: skip
    rows = datasets.Dataset.from_dict({"input_ids": [row["input_ids"].tolist() for row in data]})
    arguments = trl.SFTConfig(**common, max_length=None, gradient_checkpointing=False)
    return trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=words, callbacks=callbacks)


def measure(name: str, components: list[str] | None, pairs: int, directory: str) -> list[tuple[float, float]]:
    """Seconds of a due step, and the mean of the two steps around it, which are not due."""
    torch.manual_seed(0)
    model, data = MODELS[name]()
    watch = Stopwatch()
    common: dict[str, Any] = {
        "output_dir": directory,
        "max_steps": 2 * pairs + 4,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-5,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "use_cpu": not ON_GPU,
        "bf16": ON_GPU,
    }
    callbacks = [telemetry(components, 2), watch]
    if name == "SFT":
        trainer = fine_tuner(model, data, common, callbacks)
    else:
        arguments = TrainingArguments(**common)
        trainer = Trainer(model, arguments, collate, data, callbacks=callbacks)  # type: ignore[arg-type]
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    seconds = watch.seconds  # of step 1, 2, ...; even steps are due, and the first two warm up
    return [(seconds[at], (seconds[at - 1] + seconds[at + 1]) / 2) for at in range(3, 2 * pairs + 2, 2)]


def report(pairs: int, brief: bool = False) -> list[tuple[str, ...]]:
    """Rows of model and components, median seconds of a due and of another step, median ratio and its quartiles.

    ``brief``: of all components together only.
    """
    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as directory:
        for name in MODELS:
            for components in [None] if brief else [["outputs"], None]:
                measured = measure(name, components, pairs, directory)
                low, middle, high = statistics.quantiles([due / other for due, other in measured], n=4)
                due, other = (statistics.median(seconds) for seconds in zip(*measured, strict=True))
                mode = f"{name}, {'all' if components is None else components[0]}"
                rows.append((mode, f"{due:.3f}", f"{other:.3f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}"))
    return rows
