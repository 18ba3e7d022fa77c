"""Mistakes that people make, each planted, with the rules that name its cause."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import torch
from mistakes.trainings import Batch, Planted
from support import codec_tokens
from torch import Tensor, nn
from transformers import Trainer

from trainer.chatml import AudioContent, Sample, TextContent
from trainer.dataset import Example
from trainer.higgs_trainer import HiggsAudioTrainer
from trainer.model import add_lora, freeze_llm

IGNORE = -100


# Labels and loss


def shifted(batch: Batch, by: int, text: bool = True) -> Batch:
    """Labels moved along the sequence by ``by`` places (audio along its frames), as though the loss did not shift."""
    made = dict(batch)
    for name in ("labels", "audio_labels") if text else ("audio_labels",):
        labels = batch[name]
        moved = torch.full_like(labels, IGNORE)
        if by > 0:  # the label of the next place comes to this one
            moved[:, :-by] = labels[:, by:]
        else:
            moved[:, -by:] = labels[:, :by]
        made[name] = moved
    return made


def without_audio_ends(batch: Batch) -> Batch:
    labels = batch["audio_labels"].clone()
    labels[labels == END()] = IGNORE
    return {**batch, "audio_labels": labels}


def END() -> int:  # noqa: N802  (a constant of the demonstration, known once that is prepared)
    """The stream's end id of the demonstration's codec."""
    from mistakes.trainings import laboratory

    return int(laboratory().processor.audio_stream_eos_id)


def all_supervised(batch: Batch) -> Batch:
    mask, frames = batch["attention_mask"].bool(), batch["audio_input_ids_mask"].bool()
    return {
        **batch,
        "labels": batch["input_ids"].masked_fill(~mask, IGNORE),
        "audio_labels": batch["audio_input_ids"].masked_fill(~frames[..., None], IGNORE),
    }


def prompt_supervised(batch: Batch) -> Batch:
    return {**batch, "labels": batch["input_ids"].masked_fill(~batch["attention_mask"].bool(), IGNORE)}


def reference_supervised(batch: Batch) -> Batch:
    frames = batch["audio_input_ids_mask"].bool()
    own = batch["audio_labels"] != IGNORE
    rest = batch["audio_input_ids"].masked_fill(~frames[..., None], IGNORE)
    return {**batch, "audio_labels": torch.where(own, batch["audio_labels"], rest)}


def nothing_supervised(every: int, first: int = 0) -> Callable[[Batch], Batch]:
    count = iter(range(-first, 10**9))

    def plant(batch: Batch) -> Batch:
        if next(count) % every:
            return batch
        return {**batch, **{name: torch.full_like(batch[name], IGNORE) for name in ("labels", "audio_labels")}}

    return plant


class Loss:
    """A loss in place of the model's own: every part of it weighted, or shifted once more."""

    def __init__(self, loss: Any, weights: Callable[[int], float], config: Any) -> None:
        self._loss, self._weights, self._config, self._part = loss, weights, config, 0

    def begin(self) -> None:
        self._part = 0
        self._loss.begin()

    def __call__(self, logits: Tensor, labels: Tensor, vocab_size: int, **given: Any) -> Tensor:
        text = vocab_size == self._config.vocab_size
        part, self._part = (0, self._part) if text else (1 + self._part, self._part + 1)
        return self._loss(logits, labels, vocab_size, **given) * self._weights(part)


def weighted(weights: Callable[[int], float]) -> Callable[[HiggsAudioTrainer], None]:
    def plant(trainer: HiggsAudioTrainer) -> None:
        base: Any = trainer.model
        trainer._loss = base.loss_function = Loss(trainer._loss, weights, base.config)  # type: ignore[assignment]

    return plant


class Undivided(HiggsAudioTrainer):
    """Forgets that losses of accumulated microbatches are parts of one."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return super().compute_loss(model, inputs, return_outputs, None)


class OwnLoss(HiggsAudioTrainer):
    """A loss written by hand that shifts labels which are shifted already."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = dict(inputs)
        labels = inputs.pop("labels"), inputs.pop("audio_labels")
        shown = super(HiggsAudioTrainer, self)
        moved = shifted({"labels": labels[0], "audio_labels": labels[1]}, 1)
        return shown.compute_loss(model, {**inputs, **moved}, return_outputs, None)


# Codes and text


def codes_changed(
    change: Callable[[Example], Tensor], labels_too: bool = True
) -> Callable[[list[Example]], list[Example]]:
    """Every frame's codes changed; labels follow where they are made of them."""

    def plant(examples: list[Example]) -> list[Example]:
        made = []
        for example in examples:
            codes = change(example)
            known = example.audio_labels != IGNORE
            labels = torch.where(known, codes, IGNORE) if labels_too else example.audio_labels
            made.append(dataclasses.replace(example, audio_input_ids=codes, audio_labels=labels))
        return made

    return plant


def reversed_codebooks(example: Example) -> Tensor:
    return example.audio_input_ids.flip(-1)


def permuted_codec(example: Example) -> Tensor:
    """Codes of a codec with other entries."""
    order = torch.randperm(int(END()) - 1, generator=torch.Generator().manual_seed(3))
    codes = example.audio_input_ids
    return torch.where(codes < len(order), order[codes.clamp(max=len(order) - 1)], codes)


def rolled(by: Callable[[int], int]) -> Callable[[Example], Tensor]:
    """Codebooks moved along the frames, each by its own number."""

    def change(example: Example) -> Tensor:
        codes = example.audio_input_ids
        columns = [torch.roll(codes[:, k], by(k), 0) for k in range(codes.shape[1])]
        return torch.stack(columns, -1)

    return change


def garbled(examples: list[Example]) -> list[Example]:
    """Text ids that another tokenizer has made."""
    made = []
    for example in examples:
        text = example.labels != IGNORE
        ids = torch.where(text, (example.input_ids * 7 + 11) % 200 + 20, example.input_ids)
        made.append(dataclasses.replace(example, input_ids=ids, labels=torch.where(text, ids, IGNORE)))
    return made


def texts_of(samples: list[Sample], order: list[int], which: str) -> list[Sample]:
    """Samples with each other's texts."""
    targets = [one.target_transcript for one in samples]
    references = [one.ref_transcript for one in samples]
    made = []
    for sample, other in zip(samples, order, strict=True):
        messages = []
        for message in sample.messages:
            content = list(message.content)
            for place, item in enumerate(content):
                if isinstance(item, TextContent):
                    text = item.text
                    if which == "target" and sample.target_transcript and sample.target_transcript in text:
                        text = text.replace(sample.target_transcript, targets[other] or "")
                    if which == "reference" and message.role == "user" and text == sample.ref_transcript:
                        text = references[other] or ""
                    content[place] = dataclasses.replace(item, text=text)
            messages.append(dataclasses.replace(message, content=tuple(content)))
        said = targets if which == "target" else references
        changed = {"target_transcript" if which == "target" else "ref_transcript": said[other]}
        made.append(dataclasses.replace(sample, messages=tuple(messages), **changed))
    return made


def shuffled(count: int) -> list[int]:
    order = list(range(count))
    random.Random(5).shuffle(order)
    return order


# Reference voice


def other_reference(choose: Callable[[list[Sample], int], Any]) -> Callable[[list[Sample]], list[Sample]]:
    """Samples whose reference clip is another's; None leaves it out."""

    def plant(samples: list[Sample]) -> list[Sample]:
        return [_with_reference(sample, choose(samples, index)) for index, sample in enumerate(samples)]

    return plant


def _with_reference(sample: Sample, path: Any) -> Sample:
    messages = []
    for message in sample.messages:
        content = []
        for item in message.content:
            if isinstance(item, AudioContent) and not item.is_target:
                if path is None:
                    continue
                item = dataclasses.replace(item, path=path)
            content.append(item)
        messages.append(dataclasses.replace(message, content=tuple(content)))
    return dataclasses.replace(sample, messages=tuple(messages))


def of_another_speaker(samples: list[Sample], index: int) -> Any:
    others = [one for one in samples if one.speaker != samples[index].speaker]
    return others[(7 * index) % len(others)].references[0]


def hidden_by_mask(batch: Batch) -> Batch:
    """The attention mask leaves the reference's positions out."""
    from mistakes.trainings import laboratory

    view = laboratory().processor
    audio = (batch["input_ids"] == view.audio_token_id) | (batch["input_ids"] == view.audio_delay_token_id)
    mask = batch["attention_mask"].clone()
    for row in range(len(mask)):
        places = audio[row].nonzero().flatten()
        breaks = (places[1:] - places[:-1] > 1).nonzero().flatten()
        first = places[: int(breaks[0]) + 1] if len(breaks) else places[:0]
        mask[row, first] = 0
    return {**batch, "attention_mask": mask}


# Sound


def sounds(
    name: str, change: Callable[[Any, int], tuple[Any, int]], kinds: str
) -> Callable[[list[Sample]], list[Sample]]:
    """Samples whose clips are changed: references, targets or both."""

    def plant(samples: list[Sample]) -> list[Sample]:
        from mistakes.trainings import laboratory

        made = []
        for sample in samples:
            messages = []
            for message in sample.messages:
                content = [
                    dataclasses.replace(item, path=laboratory().sound(item.path, name, change))
                    if isinstance(item, AudioContent) and ("targets" if item.is_target else "references") in kinds
                    else item
                    for item in message.content
                ]
                messages.append(dataclasses.replace(message, content=tuple(content)))
            made.append(dataclasses.replace(sample, messages=tuple(messages)))
        return made

    return plant


def clipped(samples: Any, rate: int) -> tuple[Any, int]:
    return (samples * 30).clip(-1, 1), rate


def of_telephone(samples: Any, rate: int) -> tuple[Any, int]:
    return samples[:: rate // 8000], 8000


def silenced(samples: Any, rate: int) -> tuple[Any, int]:
    return samples * 0, rate


def cut_off(samples: Any, rate: int) -> tuple[Any, int]:
    return samples[: len(samples) * 6 // 10], rate


def some_silent(samples: list[Sample]) -> list[Sample]:
    plant = sounds("silent", silenced, "targets")
    return [plant([sample])[0] if index % 10 == 3 else sample for index, sample in enumerate(samples)]


# Data


def mostly_one(samples: list[Sample]) -> list[Sample]:
    return [samples[0] if index % 5 else sample for index, sample in enumerate(samples)]


def truncated(examples: list[Example]) -> list[Example]:
    """A length limit that cuts every target's end off, sequence and frames alike."""
    made = []
    for example in examples:
        cut = 12
        made.append(
            dataclasses.replace(
                example,
                input_ids=example.input_ids[:-cut],
                labels=example.labels[:-cut],
                audio_input_ids=example.audio_input_ids[: -cut + _after(example)],
                audio_labels=example.audio_labels[: -cut + _after(example)],
            )
        )
    return made


def _after(example: Example) -> int:
    """Positions after the last frame."""
    from mistakes.trainings import laboratory

    processor = laboratory().processor
    audio = (example.input_ids == processor.audio_token_id) | (example.input_ids == processor.audio_delay_token_id)
    return len(audio) - 1 - int(audio.nonzero()[-1])


# Optimizer and model


def frozen(part: str) -> Callable[[HiggsAudioTrainer], None]:
    def plant(trainer: HiggsAudioTrainer) -> None:
        for name, parameter in trainer.model.named_parameters():  # type: ignore[union-attr]
            if part in name:
                parameter.requires_grad_(False)

    return plant


def outside_of_the_optimizer(part: str) -> Callable[[HiggsAudioTrainer], None]:
    def plant(trainer: HiggsAudioTrainer) -> None:
        model: Any = trainer.model
        held = [
            parameter for name, parameter in model.named_parameters() if part not in name and parameter.requires_grad
        ]
        trainer.optimizer = torch.optim.AdamW(held or [nn.Parameter(torch.zeros(1))], lr=trainer.args.learning_rate)

    return plant


def with_lora(trainer: HiggsAudioTrainer) -> None:
    trainer.model = trainer.model_wrapped = add_lora(trainer.model, 4, 8, 0.0)


def of_another_model(trainer: HiggsAudioTrainer) -> None:
    """The optimizer was made before the model was loaded again."""
    before: Any = copy.deepcopy(trainer.model)
    trainer.optimizer = torch.optim.AdamW(before.parameters(), lr=trainer.args.learning_rate)


def ends_early(trainer: HiggsAudioTrainer) -> None:
    """The schedule was made for a tenth of the steps."""
    optimizer = trainer.create_optimizer()
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 4))


def lora_outside(trainer: HiggsAudioTrainer) -> None:
    with_lora(trainer)
    outside_of_the_optimizer("lora_")(trainer)


def lora_off(trainer: HiggsAudioTrainer) -> None:
    """Adapters are trained that the forward pass leaves out."""
    with_lora(trainer)
    model: Any = trainer.model
    model.get_base_model().text_lm_head.requires_grad_(True)  # so that something is left to train
    for module in model.modules():
        if "_disable_adapters" in vars(module):
            module._disable_adapters = True


def in_bfloat16(trainer: HiggsAudioTrainer) -> None:
    trainer.model.to(torch.bfloat16)  # type: ignore[union-attr]


def bidirectional(trainer: HiggsAudioTrainer) -> None:
    for module in trainer.model.modules():  # type: ignore[union-attr]
        if hasattr(module, "is_causal"):
            module.is_causal = False
    config = trainer.model.config  # type: ignore[union-attr]
    config.is_causal = False


class EvalMode(HiggsAudioTrainer):
    """Leaves the model in evaluation mode."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        train, model.train = model.train, lambda mode=True: model
        model.eval()
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            model.train = train


class DropoutInEvaluation(HiggsAudioTrainer):
    """Forgets ``eval()`` before evaluations."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.model
        own = model.eval
        model.eval = lambda: model.train()
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            model.eval = own


def with_dropout(trainer: HiggsAudioTrainer) -> None:
    trainer.model.config.attention_dropout = 0.1  # type: ignore[union-attr]
    for module in trainer.model.modules():  # type: ignore[union-attr]
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1


class Skipping(HiggsAudioTrainer):
    """A step with a bad loss is left out, silently."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            model.zero_grad()
            return torch.zeros_like(loss)
        return loss


class NaNLoss(HiggsAudioTrainer):
    """One sample's loss is not a number."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.state.global_step == 6:
            return (found[0] * float("nan"), found[1]) if return_outputs else found * float("nan")
        return found


class SkippedNaN(Skipping, NaNLoss):
    """The two together."""


# Other models


def labels_moved(batch: Batch) -> Batch:
    """Labels shifted once more than the loss shifts them."""
    labels = torch.full_like(batch["labels"], IGNORE)
    labels[:, :-1] = batch["labels"][:, 1:]
    return {**batch, "labels": labels}


def csm_ends_masked(batch: Batch) -> Batch:
    labels = batch["labels"].clone()
    labels[(labels == 0).all(-1)] = IGNORE
    return {**batch, "labels": labels}


def token_changed(change: Callable[[Tensor], Tensor]) -> Callable[[Batch], Batch]:
    """Ids of codec tokens changed, of labels too."""

    def plant(batch: Batch) -> Batch:
        made = dict(batch)
        for name in ("input_ids", "labels"):
            made[name] = torch.where(batch[name] >= codec_tokens.FIRST, change(batch[name]), batch[name])
        return made

    return plant


def another_order(ids: Tensor) -> Tensor:
    """The codebooks of a frame in another order than the vocabulary's."""
    book, code = (ids - codec_tokens.FIRST) // codec_tokens.SIZE, (ids - codec_tokens.FIRST) % codec_tokens.SIZE
    return codec_tokens.FIRST + (codec_tokens.CODEBOOKS - 1 - book) * codec_tokens.SIZE + code


def another_codec(ids: Tensor) -> Tensor:
    book, code = (ids - codec_tokens.FIRST) // codec_tokens.SIZE, (ids - codec_tokens.FIRST) % codec_tokens.SIZE
    return codec_tokens.FIRST + book * codec_tokens.SIZE + (code * 3 + 5) % codec_tokens.SIZE


def token_ends_masked(batch: Batch) -> Batch:
    return {**batch, "labels": batch["labels"].masked_fill(batch["labels"] == codec_tokens.END, IGNORE)}


def without_mask(batch: Batch) -> Batch:
    return {name: one for name, one in batch.items() if name != "attention_mask"}


def loss_times(factor: float) -> type[HiggsAudioTrainer]:
    class Weighted(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            return (loss * factor, outputs) if return_outputs else loss * factor

    return Weighted  # type: ignore[return-value]


ASKED = ("setup/asked_labels",)
WEIGHT = ("setup/loss_weight",)
SOUND = ("health/reference_sound", "setup/data_sound")

MISTAKES: tuple[Planted, ...] = (
    # labels and loss
    Planted("labels shifted twice in the batch", ASKED, "labels", batch=lambda batch: shifted(batch, 1)),
    Planted("labels shifted twice in an own loss", ASKED, "labels", kind_of_trainer=OwnLoss),
    Planted("labels not shifted: the model sees its target", ASKED, "labels", batch=lambda batch: shifted(batch, -1)),
    Planted("audio labels alone shifted twice", ASKED, "labels", batch=lambda batch: shifted(batch, 1, text=False)),
    Planted("audio end of stream masked", ("health/eos_supervised",), "labels", batch=without_audio_ends),
    Planted("everything supervised", ("health/reference_masked",), "labels", batch=all_supervised),
    Planted("prompt text supervised", ("health/prompt_masked",), "labels", batch=prompt_supervised),
    Planted("reference audio supervised", ("health/reference_masked",), "labels", batch=reference_supervised),
    Planted("no labels in some batches", ("health/labels",), "labels", batch=nothing_supervised(3)),
    Planted("no labels in any batch", ("health/labels",), "labels", batch=nothing_supervised(1)),
    Planted("audio loss times 0", WEIGHT, "loss", trainer=weighted(lambda part: float(part == 0))),
    Planted("text loss times 0", WEIGHT, "loss", trainer=weighted(lambda part: float(part > 0))),
    Planted("codebook 0 alone in the loss", WEIGHT, "loss", trainer=weighted(lambda part: float(part < 2))),
    Planted("last codebook not in the loss", WEIGHT, "loss", trainer=weighted(lambda part: float(part < 4))),
    Planted("loss times 10", WEIGHT, "loss", trainer=weighted(lambda part: 10.0)),
    Planted(
        "accumulated loss not divided",
        WEIGHT,
        "loss",
        kind_of_trainer=Undivided,
        arguments={"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
    ),
    # codes and text
    Planted("codebooks in reversed order", ("setup/chance",), "codes", examples=codes_changed(reversed_codebooks)),
    Planted("codes of another codec", ("setup/chance",), "codes", examples=codes_changed(permuted_codec)),
    Planted("codebooks not delayed", ("health/chatml",), "codes", examples=codes_changed(rolled(lambda k: -k))),
    Planted("codebooks delayed twice", ("health/chatml",), "codes", examples=codes_changed(rolled(lambda k: k))),
    Planted(
        "labels of reversed codebooks",
        ASKED,
        "codes",
        batch=lambda b: {**b, "audio_labels": b["audio_labels"].flip(-1)},
    ),
    Planted("garbled text", ("health/chatml",), "text", examples=garbled),
    Planted(
        "transcripts shuffled",
        ("setup/data_words", "health/transcripts"),
        "text",
        samples=lambda s: texts_of(s, shuffled(len(s)), "target"),
    ),
    Planted(
        "reference transcript of another clip",
        ("setup/data_words", "health/transcripts"),
        "text",
        samples=lambda s: texts_of(s, shuffled(len(s)), "reference"),
    ),
    # reference voice
    Planted(
        "reference of another speaker",
        ("setup/data_voices", "health/reference_used"),
        "reference",
        samples=other_reference(of_another_speaker),
    ),
    Planted(
        "reference left out",
        ("health/reference_present",),
        "reference",
        samples=other_reference(lambda samples, index: None),
    ),
    Planted(
        "one reference for all",
        ("setup/references", "setup/data_pairs"),
        "reference",
        samples=other_reference(lambda samples, index: samples[0].references[0]),
    ),
    Planted(
        "reference equals the target",
        ("setup/references", "setup/data_pairs"),
        "reference",
        samples=other_reference(lambda samples, index: samples[index].targets[0]),
    ),
    Planted("reference hidden by the attention mask", ("health/mask_holes",), "reference", batch=hidden_by_mask),
    # data set
    Planted("one sample is 80 % of the data", ("setup/targets", "setup/data_pairs"), "data", samples=mostly_one),
    Planted("targets truncated by a length limit", ("health/eos_supervised",), "data", examples=truncated),
    # optimizer
    Planted("learning rate times 100", ("health/update_size",), "optimizer", arguments={"learning_rate": 5e-2}),
    Planted(
        "learning rate 0",
        ("health/updates_arrive", "health/learning_rate"),
        "optimizer",
        arguments={"learning_rate": 0.0},
    ),
    Planted(
        "audio parameters not in the optimizer",
        ("setup/optimizer", "health/updates_arrive"),
        "optimizer",
        trainer=outside_of_the_optimizer("audio_mlp"),
    ),
    Planted(
        "LoRA outside of the optimizer", ("setup/optimizer", "health/updates_arrive"), "optimizer", trainer=lora_outside
    ),
    Planted("LoRA off in the forward pass", ("setup/adapters",), "optimizer", trainer=lora_off),
    Planted("audio path frozen", ("setup/frozen",), "optimizer", trainer=frozen("audio_")),
    Planted("gradients clipped to 1e-6", ("health/clipping",), "optimizer", arguments={"max_grad_norm": 1e-6}),
    Planted(
        "bfloat16 weights that swallow steps",
        ("setup/optimizer", "health/updates_arrive"),
        "optimizer",
        trainer=in_bfloat16,
        arguments={"learning_rate": 1e-6},
    ),
    # numbers
    Planted("NaN from one sample", ("health/nonfinite",), "numbers", kind_of_trainer=NaNLoss),
    Planted("NaN from one sample, its step skipped", ("health/step_skipped",), "numbers", kind_of_trainer=SkippedNaN),
    # modes and model
    Planted(
        "dropout active in evaluation",
        ("setup/modes",),
        "modes",
        kind_of_trainer=DropoutInEvaluation,
        trainer=with_dropout,
    ),
    Planted("training in evaluation mode", ("setup/modes",), "modes", kind_of_trainer=EvalMode, trainer=with_dropout),
    Planted("bidirectional attention", ("setup/causality",), "modes", trainer=bidirectional),
    # sound
    Planted("all clips clipped", SOUND, "sound", samples=sounds("clipped", clipped, "references and targets")),
    Planted("all clips of 8 kHz", SOUND, "sound", samples=sounds("telephone", of_telephone, "references and targets")),
    Planted(
        "digital silence as reference",
        (*SOUND, "setup/references"),
        "reference",
        samples=sounds("silent", silenced, "references"),
    ),
    Planted("one clip in ten silent", ("setup/data_sound",), "sound", samples=some_silent),
    Planted("targets cut off", ("setup/data_sound",), "sound", samples=sounds("cut", cut_off, "targets")),
    # between due steps
    Planted(
        "NaN from one sample, between due steps and logs",
        ("health/loss_finite",),
        "numbers",
        kind_of_trainer=NaNLoss,
        arguments={"logging_steps": 100},
    ),
    Planted(
        "no labels in one batch, between due steps and logs",
        ("health/step_skipped", "health/labels"),
        "labels",
        batch=nothing_supervised(40, first=2),
        arguments={"logging_steps": 100},
    ),
    Planted("schedule that ends too early", ("health/learning_rate",), "optimizer", trainer=ends_early),
    Planted("optimizer of another model", ("setup/optimizer",), "optimizer", trainer=of_another_model),
    # other models
    Planted("Csm: labels shifted twice", ASKED, "labels", batch=labels_moved, model="csm"),
    Planted(
        "Csm: labels of reversed codebooks",
        ASKED,
        "codes",
        batch=lambda batch: {**batch, "labels": batch["labels"].flip(-1)},
        model="csm",
    ),
    Planted(
        "Csm: audio end of stream masked", ("health/eos_supervised",), "labels", batch=csm_ends_masked, model="csm"
    ),
    Planted("Csm: loss times 10", WEIGHT, "loss", kind_of_trainer=loss_times(10.0), model="csm"),
    Planted("codec tokens: labels shifted twice", ASKED, "labels", batch=labels_moved, model="codec_tokens"),
    Planted(
        "codec tokens: codebooks in another order",
        ("health/invalid_ids",),
        "codes",
        batch=token_changed(another_order),
        model="codec_tokens",
    ),
    Planted(
        "codec tokens: codes of another codec",
        ("setup/chance",),
        "codes",
        batch=token_changed(another_codec),
        model="codec_tokens",
    ),
    Planted(
        "codec tokens: end of speech masked",
        ("health/eos_supervised",),
        "labels",
        batch=token_ends_masked,
        model="codec_tokens",
    ),
    Planted(
        "codec tokens: padding on the left that no mask hides",
        ("setup/alone",),
        "modes",
        batch=without_mask,
        model="codec_tokens",
    ),
)

HEALTHY: tuple[Planted, ...] = (
    Planted("as it should be"),
    *(Planted(f"seed {seed}", arguments={"seed": seed}) for seed in (1, 2, 3)),
    *(Planted(f"learning rate {rate:g}", arguments={"learning_rate": rate}) for rate in (1e-4, 1e-3, 2e-3)),
    *(Planted(f"batches of {size}", arguments={"per_device_train_batch_size": size}) for size in (1, 2, 8)),
    Planted("accumulation 4", arguments={"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}),
    Planted("LoRA", trainer=with_lora),
    Planted("language model frozen", trainer=lambda trainer: freeze_llm(trainer.model)),
    Planted("embeddings frozen", trainer=frozen("embed")),
    Planted("bfloat16 by autocast", arguments={"bf16": True}),
    Planted("one speaker", samples=lambda samples: [one for one in samples if one.speaker == samples[0].speaker]),
    Planted("fresh weights", fresh=True),
    Planted("long warm-up", arguments={"lr_scheduler_type": "linear", "warmup_steps": 30}),
    Planted("cosine decay", arguments={"lr_scheduler_type": "cosine"}),
    Planted("dropout", trainer=with_dropout),
    Planted("weight decay", arguments={"weight_decay": 0.1}),
    Planted("activation checkpointing", arguments={"gradient_checkpointing": True}),
    Planted("Csm", model="csm"),
    Planted("codec tokens", model="codec_tokens"),
    Planted("text on TRL's trainer", model="text"),
)
