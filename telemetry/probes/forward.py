"""Reads the passes of a due step: what each is given, the streams that it predicts, and the model's own loss."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from telemetry.families.base import (
    Absent,
    BatchView,
    Declared,
    Divided,
    Family,
    LossPart,
    Overruled,
    Rest,
    Seen,
    Stream,
    output,
)
from telemetry.once import Once
from telemetry.probes.batches import PreparedBatch
from telemetry.probes.watch import Watch, named_arguments

logger = logging.getLogger(__name__)

NOT_SHOWN = "a compiled model does not show its logits for it"


@dataclass(frozen=True)
class Microbatch:
    """One forward pass of a step.

    Attributes:
        inputs: the model's keyword arguments.
        view: how the family reads them; None where it cannot.
        metadata: one mapping a sample of what the model does not see, or empty where the trainer offers none.
            Keys, all optional: ``sample_id``, ``speaker``, ``language``, ``ref_transcript``, ``target_transcript``
            (str); ``reference``, ``target`` (sequences of objects with ``samples``, ``sampling_rate``, ``seconds``
            and, where samples were resampled, ``file_sampling_rate``; read in the background).
        beside: what of its batch the model was not given by name: labels, and the ids of what it was given embedded.
    """

    inputs: Mapping[str, Any]
    view: BatchView | None
    metadata: Sequence[Mapping[str, Any]] = ()
    beside: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def known(self) -> Mapping[str, Any]:
        """What a family reads: the inputs, and what is known beside them."""
        return {**self.inputs, **self.beside}

    @property
    def withheld(self) -> Mapping[str, Tensor]:
        """Labels that the model was not given by any name: the trainer's loss is not the model's."""
        given = {id(value) for value in self.inputs.values()}
        return {n: value for n, value in self.beside.items() if n != "input_ids" and id(value) not in given}

    def sample_id(self, row: int) -> str:
        """Name of a sample: its id, or its row in the batch."""
        known = self.metadata[row].get("sample_id") if row < len(self.metadata) else None
        return str(known) if known is not None else f"row {row}"


def _unheard(_function: Callable[[Callable[[], Iterator[Stream]]], None]) -> bool:
    return False


@dataclass(frozen=True)
class Reading:
    """What a pass has given.

    Attributes:
        streams: what it has predicted; every one fits together.
        parts: what else its loss consists of.
        rests: the part that is left of it, where there is one.
        divided: parts of its loss that the trainer has divided by what it has counted.
        overruled: what its batch asks for and the model does otherwise.
        absent: what of it cannot be read, and why.
        loss: as the model returned it, 0-d; None where it returned none.
        watched: whether the pass was watched: one that was handed over may round its logits otherwise than its loss.
        on_gradients: has a function called in the backward pass, once for each tensor that logits were made of, with
            what gives the streams whose logits are then the loss's gradient with respect to them. Returns whether there
            is such a tensor.
    """

    streams: Sequence[Stream] = ()
    parts: Sequence[LossPart] = ()
    rests: Sequence[Rest] = ()
    divided: Sequence[Divided] = ()
    overruled: Sequence[Overruled] = ()
    absent: Sequence[Absent] = ()
    loss: Tensor | None = None
    watched: bool = True
    on_gradients: Callable[[Callable[[Callable[[], Iterator[Stream]]], None]], bool] = _unheard


@dataclass
class _Pass:
    microbatch: Microbatch
    modules: dict[str, Any] = field(default_factory=dict)
    given: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)
    autocast: dict[str, torch.dtype] = field(default_factory=dict)


class PassReader:
    """Reads every pass of a due step, watched or handed over.

    Args:
        family: reads batches and outputs; None where there is none, and only the model's own loss is read.
        inputs: told of a microbatch that the model is about to run on.
        outputs: told of a microbatch that the model has run on, and what that has given.

    Attributes:
        passes: read since :meth:`attach`.
    """

    def __init__(
        self,
        family: Family | None,
        inputs: Callable[[Microbatch], None],
        outputs: Callable[[Microbatch, Reading], None],
    ) -> None:
        self._family = family if family is not None else Family(None)  # which reads nothing
        self._inputs = inputs
        self._outputs = outputs
        self._pass: _Pass | None = None
        self._metadata: Sequence[Mapping[str, Any]] = ()
        self._batch: PreparedBatch | None = None
        self._faults: dict[Hashable, str] = {}
        self._once = Once(logger)
        self.passes = 0

    def announce(self, metadata: Sequence[Mapping[str, Any]]) -> None:
        """Say what the next pass's samples are, where the batch itself no longer does."""
        self._metadata = metadata

    def prepare(self, batch: Mapping[str, Any], label_names: Collection[str] = ()) -> None:
        """Say what the next passes run on, labels included: see :class:`PreparedBatch`."""
        self._batch = PreparedBatch(batch, label_names)

    def attach(self, watch: Watch) -> None:
        """Begin to read; passes are counted from here."""
        self.forget()
        self.passes = 0
        if watch.usable:
            watch.passes(self, self._begin, self._end)
            watched = self._attempt("name modules to watch", self._family.watched, {})
            for name, module in watched.items():
                watch.before(self, module, functools.partial(self._note, name, module))
                watch.after(self, module, functools.partial(self._keep, name))

    def forget(self) -> None:
        """Let go of the last pass, and of what has been said of the next."""
        self._pass = None
        self._metadata = ()
        self._batch = None

    @torch.no_grad()
    def replay(self, inputs: Mapping[str, Any], outputs: Any) -> None:
        """Read a pass that was handed over instead of watched."""
        inputs = dict(inputs)
        self.announce(inputs.pop("metadata", None) or self._metadata)
        self._begin(inputs)
        self._end(outputs, watched=False)

    def _begin(self, inputs: Mapping[str, Any]) -> None:
        self.passes += 1
        metadata, self._metadata = self._metadata, ()
        beside = self._batch.beside(inputs) if self._batch is not None else {}
        # None for a batch that the family cannot read, which the model may still be able to
        view = self._attempt("read a batch", functools.partial(self._family.view, {**inputs, **beside}), None)
        self._pass = _Pass(Microbatch(inputs, view, metadata, beside))
        self._inputs(self._pass.microbatch)

    def _note(self, name: str, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if self._pass is not None:
            self._pass.given.setdefault(name, []).append(named_arguments(module, args, kwargs))

    def _keep(self, name: str, output: Any) -> None:
        if self._pass is not None:
            self._pass.modules[name] = output
            self._pass.autocast |= _autocast()

    def _end(self, outputs: Any, watched: bool = True) -> None:
        ended, self._pass = self._pass, None
        if ended is not None and outputs is not None:
            self._outputs(ended.microbatch, self._reading(ended, outputs, watched))

    def _reading(self, ended: _Pass, outputs: Any, watched: bool) -> Reading:
        microbatch, family = ended.microbatch, self._family
        inputs, view = microbatch.known, microbatch.view
        loss = model_loss(microbatch.inputs, outputs)
        seen = Seen(view, missing=NOT_SHOWN)
        if watched:
            seen = Seen(view, ended.modules, ended.given, ended.autocast)
        failed = Absent("text", f"family {family.name} cannot read what the model returned")
        found = self._attempt("read outputs", lambda: list(family.streams(inputs, outputs, seen)), [failed])
        declared = [self._checked(one) for one in found]
        streams = [one for one in declared if isinstance(one, Stream)]
        # Of labels that the model was not given it has made no loss: of that nothing is said.
        of_loss = declared if loss is not None or not microbatch.withheld else []
        return Reading(
            streams=streams,
            parts=[one for one in of_loss if isinstance(one, LossPart)],
            rests=[one for one in of_loss if isinstance(one, Rest)],
            divided=[one for one in of_loss if isinstance(one, Divided)],
            overruled=[one for one in of_loss if isinstance(one, Overruled)],
            absent=[one for one in declared if isinstance(one, Absent)],
            loss=loss,
            watched=watched,
            on_gradients=functools.partial(_on_gradients, family, inputs, outputs, seen, streams),
        )

    def _checked(self, declared: Declared) -> Declared:
        """The same, or for a stream whose parts do not fit together why it is absent."""
        if not isinstance(declared, Stream):
            return declared
        tensors = (declared.logits, declared.labels, *([] if declared.rows is None else [declared.rows]))
        key = (declared.name, *((tensor.shape, tensor.dtype) for tensor in tensors))
        if key not in self._faults:
            fault = declared.fault()
            self._faults[key] = fault and f"{fault} (family {self._family.name})"
        fault = self._faults[key]
        return Absent(declared.group, fault) if fault else replace(declared, logits=declared.logits.detach())

    def _attempt(self, doing: str, action: Any, otherwise: Any) -> Any:
        """What a family gives; where it raises, which is said once, something else."""
        try:
            return action()
        except Exception:  # noqa: BLE001  (said once, with its traceback)
            said = "family %s cannot %s; training goes on"
            self._once.say(doing, said, self._family.name, doing, level=logging.ERROR, traceback=True)
            return otherwise


def _on_gradients(
    family: Family,
    inputs: Mapping[str, Any],
    outputs: Any,
    seen: Seen,
    streams: Sequence[Stream],
    function: Callable[[Callable[[], Iterator[Stream]]], None],
) -> bool:
    """See :class:`Reading`. A family reads a gradient as it reads the logits that it is of.

    What is kept until then is the batch, and neither outputs nor graph. Logits that were computed again, of a fused
    loss, have no gradient.
    """
    sizes = {stream.logits.shape[-1] * each for stream in streams if stream.each is None for each in
             (1, len(stream.names))}  # fmt: skip
    places: dict[tuple[str, Any], Any] = {("module", name): value for name, value in seen.modules.items()}
    named = outputs.items() if isinstance(outputs, Mapping) else ()
    places |= {("output", name): value for name, value in named}
    if isinstance(outputs, tuple):
        places |= {("place", number): value for number, value in enumerate(outputs)}
    bare = Seen(seen.view, {}, seen.given, seen.autocast)
    hooked = False
    for place, value in places.items():
        if isinstance(value, Tensor) and value.requires_grad and value.dim() > 1 and value.shape[-1] in sizes:
            _hear_gradient(value, functools.partial(_with_gradient, family, inputs, bare, function, place))
            hooked = True
    return hooked


_COPIES = ("ToCopyBackward", "PreBackwardFunctionForModule")  # the latter is DeepSpeed's


def _hear_gradient(value: Tensor, hear: Callable[[Tensor], None]) -> None:
    """Have a function called with the gradient of a tensor, or of what it is a copy of.

    Under autocast, what a model returns is a copy of the logits that its loss is made of; under ZeRO-3 of every tensor.
    """
    node = value.grad_fn
    while node is not None and node.name().startswith(_COPIES) and node.next_functions:
        node = node.next_functions[0][0]
    if node is None or node is value.grad_fn:
        value.register_hook(hear)
    else:
        node.register_prehook(lambda gradients: hear(gradients[0]) if gradients[0] is not None else None)


def _with_gradient(
    family: Family,
    inputs: Mapping[str, Any],
    seen: Seen,
    function: Callable[[Callable[[], Iterator[Stream]]], None],
    place: tuple[str, Any],
    gradient: Tensor,
) -> None:
    kind, name = place
    modules = {name: gradient} if kind == "module" else {}
    outputs: Any = {name: gradient} if kind == "output" else (gradient,) if kind == "place" else {}
    given = replace(seen, modules=modules)
    function(lambda: (one for one in streams_of(family, inputs, outputs, given) if one.each is None))


def _autocast() -> dict[str, torch.dtype]:
    """What autocast computes in at this moment, by type of device."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kinds = ["cpu", *([] if accelerator is None else [accelerator.type])]
    return {kind: torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}


def model_loss(inputs: Mapping[str, Any], outputs: Any) -> Tensor | None:
    """The loss that a model returned, cut from the graph, as a tensor of its own; None where it returned none.

    A tuple's first part is one where it has no dimension and the model was given labels.
    """
    loss = output(outputs, "loss")
    if isinstance(outputs, tuple) and loss is None and outputs and any("label" in name for name in inputs):
        loss = outputs[0]
    if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
        return None
    return loss.detach().clone()  # the Trainer scales its loss in place


@contextlib.contextmanager
def watched_aside(family: Family, view: BatchView | None) -> Iterator[Seen]:
    """What a family is given of a pass that is run aside, inside, as soon as its modules have run."""
    seen = Seen(view, {}, {})

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen.given.setdefault(name, []).append(named_arguments(module, args, kwargs))  # type: ignore[attr-defined]
            seen.modules[name] = output  # type: ignore[index]

        return hook

    watched = family.watched().items()
    handles = [module.register_forward_hook(note(name), with_kwargs=True) for name, module in watched]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def streams_of(family: Family, inputs: Mapping[str, Any], outputs: Any, seen: Seen) -> Iterator[Stream]:
    """Return the streams of a pass that is run aside; nothing is said of the rest."""
    for declared in family.streams(inputs, outputs, seen):
        if isinstance(declared, Stream) and not declared.fault():
            yield declared
