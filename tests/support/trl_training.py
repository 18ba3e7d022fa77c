"""Tiny trainings by TRL's trainers, and what the passes of each were given. TRL is imported where it is used."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from .models import SHAPE, SMALLER, sure
from .references import Outputs
from .steps import Snapshots

IGNORED = -100
SENTENCES = [" ".join(f"w{(5 * i + 3 * at) % 21}" for at in range(3 + i % 6)) for i in range(16)]
_WORDS = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", ":", *(f"w{i}" for i in range(22))]
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' : ' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + ' </s> ' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)
QUIET: Mapping[str, Any] = {
    **{"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False},
    **{"save_strategy": "no", "logging_steps": 1, "gradient_checkpointing": False, "learning_rate": 0.01},
    **{"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0},
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(_WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    fast.chat_template = _TEMPLATE
    return fast


def llama(dropout: float = 0.0) -> LlamaForCausalLM:
    """The same every time."""
    config = LlamaConfig(**SHAPE | SMALLER | {"vocab_size": len(_WORDS), "attention_dropout": dropout})
    return sure(lambda: LlamaForCausalLM(config), 3, 0.4)


@dataclass
class Passes(TrainerCallback):
    """Keeps what the model is given in every training pass, by step, and counts its other passes."""

    of_step: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    others: int = 0
    _step: int = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.register_forward_pre_hook(self._see, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step = state.global_step + 1

    def _see(self, _model: Any, _args: Any, inputs: Mapping[str, Any]) -> None:
        if torch.is_grad_enabled():
            self.of_step.setdefault(self._step, []).append(dict(inputs))
        else:
            self.others += 1


@dataclass
class Run:
    """A training that has ended."""

    trainer: Any
    passes: Passes
    snapshots: Snapshots

    def outputs(self, step: int) -> dict[str, float]:
        """Every scalar of ``outputs/``, worked out with the model as it was, without any fused loss."""
        model, outputs, losses = plain(self.snapshots.models[step]), Outputs(), []
        for inputs in self.passes.of_step[step]:
            given: dict[str, Any] = {n: value for n, value in inputs.items() if n not in ("labels", "fused_lm_head")}
            with torch.no_grad():
                logits = model(**given).logits
            virtual = logits.shape[1] - inputs["labels"].shape[1]  # of a learned prompt
            labels = torch.nn.functional.pad(inputs["labels"], (virtual, 0), value=IGNORED).tolist()
            for counted in (outputs, own := Outputs()):
                counted.add_text(labels, logits)
            losses.append(own.values()["outputs/loss/text"])
        mean = math.fsum(losses) / len(losses)  # TRL has the model's own loss divided by the tokens of its pass
        return outputs.values() | {"outputs/loss/total": mean, "outputs/loss/model": mean}

    def bits(self) -> dict[str, Tensor]:
        """Parameters, random numbers and the numbers that the trainer has logged, those that are times left out."""
        logged = {
            f"{at} {name}": torch.tensor(float(value))
            for at, row in enumerate(self.trainer.state.log_history)
            for name, value in row.items()
            if not name.endswith(("time", "per_second"))
        }
        return {**dict(self.trainer.model.named_parameters()), "random": torch.get_rng_state(), **logged}


def plain(model: Any) -> Any:
    """A copy in eval mode whose passes are its class's."""
    made = copy.deepcopy(model).eval()
    for module in made.modules():
        vars(module).pop("forward", None)
    return made


def train(
    kind: str,
    data: Mapping[str, Sequence[Any]],
    directory: Path,
    callbacks: Sequence[TrainerCallback] = (),
    dropout: float = 0.0,
    **more: Any,
) -> Run:
    """Train by one of TRL's trainers (``SFT``, ``DPO``, ``GRPO``), quietly.

    Args:
        data: columns of the training set.
        dropout: of the attention.
        more: of the trainer those that it takes, the rest of its arguments.
    """
    import datasets
    import trl

    passes, snapshots = Passes(), Snapshots()
    own = {n: more.pop(n) for n in ("peft_config", "ref_model", "reward_funcs", "eval_dataset") if n in more}
    if "eval_dataset" in own:
        own["eval_dataset"] = datasets.Dataset.from_dict(own["eval_dataset"])
    torch.manual_seed(7)
    with _silence():
        trainer = getattr(trl, f"{kind}Trainer")(
            llama(dropout),
            args=getattr(trl, f"{kind}Config")(str(directory), **{**QUIET, **more}),
            train_dataset=datasets.Dataset.from_dict(dict(data)),
            processing_class=tokenizer(),
            callbacks=[snapshots, passes, *callbacks],
            **own,
        )
        trainer.train()
    return Run(trainer, passes, snapshots)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without the progress bars of data sets."""
    import datasets

    datasets.disable_progress_bars()
    with contextlib.redirect_stdout(io.StringIO()):
        yield
