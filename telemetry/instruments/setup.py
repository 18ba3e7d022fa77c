"""Set-up: modes, what the optimizer holds and changes, what is trained, and the batch's references: once, at first."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from telemetry.delivery.recorder import Emitter
from telemetry.families.base import Stream, each_logits
from telemetry.instruments.asked import FirstStep
from telemetry.instruments.base import Step
from telemetry.measures.token_stats import token_statistics
from telemetry.probes.forward import Microbatch, Reading
from telemetry.probes.sharding import (
    forwards_are_collective,
    is_fsdp1,
    is_gathered,
    is_unsummed,
    is_zero,
    own_part,
    own_value,
    split_as,
    whole_shape,
)
from telemetry.records import Max, Mean, Metric, Scalar

SAMPLED = 64  # parameters of which it is looked whether a step moves them
_ENTRIES = 4096  # of each at most
_NORMED = 1024  # values of each parameter by which ranks are compared
OTHERS = "FSDP or ZeRO has the optimizer hold other tensors than those that the model has now"
PARTS = "each rank holds a part of the weights that no other has"


class SetupInstrument(FirstStep):
    """Numbers under ``setup/`` of the first due step that need no history.

    The module modes in training, how far the loss is from chance, which parameters are trained, which of them the
    optimizer holds and the first step moves, whether adapters take part, and the references of the batch's samples.
    """

    def __init__(self) -> None:
        super().__init__()
        self._before: list[tuple[nn.Parameter, Tensor, Tensor, Tensor]] = []
        self._clips: list[tuple[Tensor, Tensor, Tensor]] = []

    def begin(self, step: Step) -> None:
        """Begin with nothing."""
        super().begin(step)
        self._before, self._clips = [], []
        if not self.looks:
            return
        norms = [own_value(one, is_main=True) for name, one in step.model.named_parameters() if _is_norm(name, one)]
        own = [one for one in norms if one is not None]
        if own:
            untouched = torch.stack([((one == 1) | (one == 0)).all() for one in own])
            step.recorder.metric("setup/norms/untouched_fraction", Mean(untouched.sum(), len(own)))

    def inputs(self, step: Step, microbatch: Microbatch) -> None:
        """Look at the modes that training runs in, and keep the batch's codes."""
        if not self.looks:
            return
        if (share := training_share(step.model)) is not None:
            step.recorder.metric("setup/modes/training_fraction", Mean(share, 1))
        audio = microbatch.view.audio if microbatch.view is not None else None
        if audio is not None and step.is_main:
            self._clips.append((audio.codes.clone(), audio.reference.clone(), audio.target.clone()))

    def outputs(self, step: Step, microbatch: Microbatch, reading: Reading) -> None:
        """Measure the loss of every sequence against that of a guess."""
        for stream, together in each_logits(reading.streams if self.looks else ()):
            for one in (stream, *map(_among_its_own, together)):
                for tag, value in _against_chance(one) if one is not None else ():
                    step.recorder.metric(tag, value)

    def before_update(self, step: Step, optimizer: Any) -> None:
        """See what the optimizer holds, and keep some weights."""
        if not self.looks:
            return
        trained = [one for one in step.model.parameters() if one.requires_grad]
        if any(map(is_zero, trained)) or is_fsdp1(step.model) or is_gathered(step.model):
            step.recorder.absent("setup/optimizer", OTHERS)
            return
        held = _held(optimizer)
        if not held:
            return
        known = sum(one.numel() for one in trained)
        step.recorder.metric(
            "setup/optimizer/held_fraction", Mean(sum(one.numel() for one in trained if id(one) in held), known)
        )
        step.recorder.metric("setup/optimizer/learning_rate", Max(max(held.values())))
        every = max(1, len(trained) // SAMPLED)
        self._before = [kept for one in trained[::every] if (kept := _kept(one, step.is_main)) is not None]

    def after_update(self, step: Step, optimizer: Any) -> None:
        """See which of them have moved."""
        before, self._before = self._before, []
        for parameter, index, value, pushed in before:
            part = own_part(parameter, step.is_main)
            if part is not None:
                moved = (part.flatten()[index] != value) & pushed
                step.recorder.metric("setup/optimizer/moved_fraction", Mean(moved.sum(), pushed.sum()))

    def finish(self, step: Step) -> None:
        """Show what is trained, and compare references; on every due step, compare ranks."""
        if step.world_size > 1 and forwards_are_collective(step.model):
            step.recorder.absent("setup/ranks/weights_apart", PARTS)
        elif step.world_size > 1:
            size = _size(step.model)
            step.recorder.metric("setup/ranks/weights_apart", Apart(size, -size))
        if not self.looks:
            return
        for name, (trained, count) in _trained(step).items():
            step.recorder.metric(f"setup/trained/{name}", Mean(trained, count))
        adapters = [module for module in step.model.modules() if "_disable_adapters" in vars(module)]  # as peft has it
        if adapters:
            active = sum(not module._disable_adapters for module in adapters)
            step.recorder.metric("setup/adapters/active_fraction", Mean(active, len(adapters)))
        clips, self._clips = self._clips, []
        if clips:
            tensors = {
                f"{kind}{at}": one for at, clip in enumerate(clips) for kind, one in zip("crt", clip, strict=True)
            }
            step.recorder.show(tensors, partial(_references, len(clips)))


class Apart(Metric):
    """How far the largest and the smallest of a value that ranks should share lie apart, over its size.

    Components: the value, and minus the value. Absent of a value of 0.
    """

    ops = ("max", "max")

    def _result(self, most: np.ndarray, least: np.ndarray) -> float | None:  # type: ignore[override]
        return float(most + least) / abs(float(most)) if most else None


def _is_norm(name: str, parameter: nn.Parameter) -> bool:
    return len(whole_shape(parameter)) == 1 and "norm" in name.lower()


def _size(model: nn.Module) -> Tensor:
    """0-d float64: the norms of some values of every parameter, added up. The same to the bit where they are."""
    some = [parameter.detach().flatten()[:_NORMED].float() for parameter in model.parameters() if parameter.numel()]
    return torch.stack([one.to(some[0].device) for one in torch._foreach_norm(some)]).double().sum()


def training_share(model: nn.Module) -> float | None:
    """Return the share of the modules with dropout or batch norm that are in training mode; None without any."""
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.modules.batchnorm._BatchNorm)
    acting = [module for module in model.modules() if isinstance(module, kinds) and getattr(module, "p", 1) > 0]
    attention = [module for module in model.modules() if getattr(module, "attention_dropout", 0)]
    told = [*acting, *attention]
    return sum(module.training for module in told) / len(told) if told else None


def _among_its_own(stream: Stream) -> Stream | None:
    """The stream of a codebook as if there were no other ids than its entries; None for one that has its own logits.

    Which codebook's turn it is, a model learns long before it learns codes.
    """
    if stream.entries is None:
        return None
    first, size = stream.entries
    labels = torch.where(stream.labels >= 0, stream.labels - first, stream.labels)
    return replace(stream, logits=stream.logits[..., first : first + size], labels=labels, turns=None, entries=None)


def _against_chance(stream: Stream) -> Sequence[tuple[str, Any]]:
    """Loss over ``ln V`` of each group: above 1, it knows less than who knows nothing."""
    size = stream.logits.shape[-1]
    if size < 2:
        return []
    stats = token_statistics(stream.logits, stream.predicted)
    counted = (stream.predicted >= 0) & (stream.predicted < size)
    total = torch.where(counted, stats.nll.double(), 0.0)
    block = len(stream.names)
    return [
        (
            f"setup/chance/{name}",
            Mean(total.reshape(-1, block)[:, k].sum() / math.log(size), counted.reshape(-1, block)[:, k].sum()),
        )
        for k, name in enumerate(stream.names)
    ]


def _held(optimizer: Any) -> dict[int, float]:
    """Identity → learning rate of every parameter that an optimizer holds; none where it does not say."""
    groups = getattr(getattr(optimizer, "optimizer", optimizer), "param_groups", None) or ()
    return {id(one): float(group.get("lr") or 0) for group in groups for one in group.get("params", ())}


def _kept(parameter: nn.Parameter, is_main: bool) -> tuple[nn.Parameter, Tensor, Tensor, Tensor] | None:
    """Some entries of this rank's part, their values, and which have a gradient: what has none need not move."""
    gradient = parameter.grad
    if gradient is None or gradient.is_sparse or is_unsummed(gradient):
        return None
    part, own = own_part(split_as(gradient, parameter), is_main), own_part(parameter, is_main)
    if part is None or own is None or part.shape != own.shape or not part.numel():
        return None
    flat = part.flatten()
    largest, index = flat.abs().topk(min(_ENTRIES, max(1, flat.numel() // 4)))
    return parameter, index, own.flatten()[index].clone(), largest > 0


def _trained(step: Step) -> dict[str, tuple[int, int]]:
    """Group → its trained parameters, and all of them."""
    found: dict[str, tuple[int, int]] = {}
    for name, parameter in step.model.named_parameters():
        group = step.family.group_of(name) if step.family is not None else "other"
        trained, count = found.get(group, (0, 0))
        size = whole_shape(parameter).numel()
        found[group] = trained + size * parameter.requires_grad, count + size
    return found


def _references(microbatches: int, host: Mapping[str, Tensor], emit: Emitter) -> None:
    """Scalars of the references: equal to the target, the same for all, without anything in them."""
    references, targets = [], []
    for at in range(microbatches):
        codes, reference, target = (np.asarray(host[f"{kind}{at}"]) for kind in "crt")
        for row in range(len(codes)):
            references.append(codes[row][reference[row]])
            targets.append(codes[row][target[row]])
    present = [index for index, one in enumerate(references) if len(one)]
    if not present:
        return
    equal = sum(np.array_equal(references[index], targets[index]) for index in present)
    constant = sum(len(references[index]) > 8 and _is_constant(references[index]) for index in present)
    different = len({references[index].tobytes() for index in present})
    emit.record(Scalar("setup/references/equal_fraction", equal / len(present)))
    emit.record(Scalar("setup/references/constant_fraction", constant / len(present)))
    emit.record(Scalar("setup/references/samples", float(len(present))))
    emit.record(Scalar("setup/references/different", float(different)))
    said = Counter(one.tobytes() for one in targets if len(one))
    emit.record(Scalar("setup/targets/samples", float(sum(said.values()))))
    emit.record(Scalar("setup/targets/different", float(len(said))))
    if said:
        emit.record(Scalar("setup/targets/commonest_fraction", max(said.values()) / sum(said.values())))


def _is_constant(codes: np.ndarray) -> bool:
    """Whether the middle of a clip holds hardly anything but one frame again and again."""
    middle = codes[len(codes) // 4 : -len(codes) // 4 or None]
    return len(np.unique(middle, axis=0)) <= max(1, len(middle) // 10)
