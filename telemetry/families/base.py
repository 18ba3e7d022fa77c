"""What a batch and a forward pass mean, told by each model family to everything that measures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from telemetry.families.speech import Speaker

IGNORE_INDEX = -100
NO_LOGITS = "the model computed no logits for it (a fused loss, or no such head)"
NO_LABELS = "the model was given no labels for it, and does not run on a batch that shows them"

# Parts of a decoder's parameter names, as transformers writes them → gradient groups.
DECODER_GROUPS = (
    ("embed_tokens", "text_embedding"),
    ("self_attn", "shared_attention"),
    (".mlp.", "text_ffn"),
    ("norm", "norms"),
)

BOOK = "codebook_"  # and its number: the name of a codebook's stream

Group = Literal["text", "audio"]
Alignment = Literal["shifted", "aligned", "given_shifted"]


# Tags that say nothing of models that are no conversations about a reference voice → why.
NO_CONVERSATION: Mapping[str, str] = MappingProxyType({
    "zero_shot/reference/present_fraction": "this kind of model is trained on samples without a reference voice too",
    "zero_shot/chatml/compliance": "prompts of this kind of model are no conversations in ChatML",
})  # fmt: skip


@dataclass(frozen=True)
class AudioView:
    """The audio of a microbatch, laid out along the sequence. ``C`` codebooks.

    Attributes:
        codes: int64 ``[batch, sequence, C]``, the codes given at each audio position, 0 elsewhere.
        labels: int64 ``[batch, sequence, C]``, unshifted; :data:`IGNORE_INDEX` where nothing is supervised.
        reference, target: bool ``[batch, sequence]``: audio that is not, and that is, supervised on. A clip is target
            when any of its codes has a label.
        starts: bool ``[batch, sequence]``: first position of each clip.
        vocabulary: ids of one codebook, special ids included.
        bos_id, eos_id: the stream's begin and end ids; a begin of -1 for a stream without one.
        frames, placeholders: int64 ``[batch]``: code frames handed over, and positions that ask for one (whole clips,
            where one position asks for a clip).
        delay: frames that each codebook of a clip is shifted by.
        ends: bool ``[batch, sequence, C]``: the codes that are ends, where ``eos_id`` is an entry of the codebooks too;
            None where every ``eos_id`` is an end.
        after: int64 ``[batch, C]``: the labels of the frame after the last position, of a model that is given shifted
            labels, and so none but this one frame less; None where every label has its position.
        reference_codes: bool ``[batch, sequence, C]``: the reference's codes, where a delay pattern mixes them with
            those of the target; None where they are all codes of its positions.
        held: bool ``[batch, sequence, C]``: where a position holds a code of a codebook; None where every position of
            audio holds one of each, or an end.
        embedded: bool ``[batch, sequence]``: audio that is given without codes, as embeddings of ``features`` or as
            waveforms that the model encodes itself; None where there is no such audio.
        features: what an audio encoder of the model is given, ``[clips, channels, frames]``: no clips where nothing is
            given, None where the model has no such encoder.
        features_real: bool ``[clips, frames]``, False at the features' padding.
        labelled: False where no labels of the batch are known at all: which audio is target is not known then.
    """

    codes: Tensor
    labels: Tensor
    reference: Tensor
    target: Tensor
    starts: Tensor
    vocabulary: int
    bos_id: int
    eos_id: int
    frames: Tensor
    placeholders: Tensor
    delay: tuple[int, ...]
    ends: Tensor | None = None
    after: Tensor | None = None
    reference_codes: Tensor | None = None
    held: Tensor | None = None
    embedded: Tensor | None = None
    features: Tensor | None = None
    features_real: Tensor | None = None
    labelled: bool = True

    @property
    def codebooks(self) -> int:
        """Number of codebooks."""
        return self.codes.shape[-1]

    @property
    def is_end(self) -> Tensor:
        """bool ``[batch, sequence, C]``: the codes that are ends."""
        return self.codes == self.eos_id if self.ends is None else self.ends


@dataclass(frozen=True)
class BatchView:
    """One microbatch as its family reads it. Made without waiting for the device.

    Attributes:
        input_ids: int64 ``[batch, sequence]``.
        real: bool ``[batch, sequence]``, False at padding.
        text: bool ``[batch, sequence]``: neither padding nor audio.
        text_labels: int64 ``[batch, sequence]``, unshifted, or None without text labels.
        vocabulary: ids of the text vocabulary.
        audio: the audio, or None for a batch or family without any.
        exists: bool ``[batch, sequence]``, False at positions that only the view has: room for what a model expands
            inside of its forward pass. None where the model has them all.
        decoded_from: the first position that the decoder is given, of a model whose encoder is given those before.
    """

    input_ids: Tensor
    real: Tensor
    text: Tensor
    text_labels: Tensor | None
    vocabulary: int
    audio: AudioView | None = None
    exists: Tensor | None = None
    decoded_from: int = 0

    @property
    def positions(self) -> int | Tensor:
        """How many positions the model has, padding included."""
        return self.input_ids.numel() if self.exists is None else self.exists.sum()


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward network of a layer, and where it meets the residual stream.

    Attributes:
        module: its forward returns ``[..., hidden]``.
        added: the module whose output is added to the residual stream: ``module`` itself, or a norm after it.
        residual: a module whose first argument is the residual stream that it is added to, position by position as
            the output; None where the layer has no such module.
    """

    module: nn.Module
    added: nn.Module
    residual: nn.Module | None


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    Attributes:
        index: counted from 0.
        attention: the module that is handed to the attention function.
        feed_forward: ``text_ffn``, and ``audio_ffn`` where audio has a network of its own.
        cross_attention: the same for attention to an encoder's positions; None without one.
    """

    index: int
    attention: nn.Module
    feed_forward: Mapping[str, FeedForward]
    cross_attention: nn.Module | None = None


@dataclass(frozen=True)
class Stream:
    """One or several sequences of tokens that a model learns to predict. ``V`` ids, ``C`` sequences beside each other.

    Attributes:
        name: of its metrics: ``text``, ``codebook_3``. A tuple of ``C`` names for sequences beside each other, which
            cost less than one by one.
        logits: ``[..., V]``, or ``[..., C, V]``.
        labels: int64 ``[...]`` or ``[..., C]``; :data:`IGNORE_INDEX` where nothing is supervised.
        group: the modality that it counts to.
        alignment: ``shifted``: the loss shifts labels ``[batch, sequence, ...]``, logits at *t* predict labels at
            *t + 1*; ``aligned``: logits predict the labels of their own position; ``given_shifted``: so they do, as
            labels were shifted before the model was given them.
        weight: of its mean in the model's loss.
        denominator: what the model's loss divides the sum over its tokens by, a number or one for each of ``C``; None
            where that is the number of its own supervised tokens in the pass.
        rows: int64 ``[rows]``, where logits ``[rows, ...]`` cover some positions of labels ``[batch, sequence, ...]``
            only: the index into ``batch × sequence`` of each. None where they cover all.
        each: 0-d, how many supervised tokens each row stands for, where logits were computed again beside a fused
            loss: more than 1 where there are too many for all. None for the model's own logits.
        turns: int64, the labels' shape: those of all streams that take turns in these logits, of which a position has
            one; None where all labels are the stream's own.
        entries: first id of its codebook, and how many there are, where the vocabulary has others; None where it has
            not.
        bos_id, eos_id: ids of its begin and its end, which are no entries of a codebook; None where it has none.
        ends: bool, the shape of :attr:`predicted`: where an end is to be predicted, for a stream whose ``eos_id`` is
            an entry of its codebook too; None where every ``eos_id`` is an end.
    """

    name: str | tuple[str, ...]
    logits: Tensor
    labels: Tensor
    group: Group
    alignment: Alignment
    weight: float = 1.0
    denominator: Tensor | float | None = None
    rows: Tensor | None = None
    each: Tensor | None = None
    turns: Tensor | None = None
    entries: tuple[int, int] | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    ends: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """One name for each sequence."""
        return (self.name,) if isinstance(self.name, str) else self.name

    @functools.cached_property
    def targets(self) -> Tensor:
        """What is predicted at each position, of the labels' shape, on the logits' device."""
        labels = self.labels.to(self.logits.device, non_blocking=True)
        return shift_labels(labels) if self.alignment == "shifted" else labels

    @functools.cached_property
    def predicted(self) -> Tensor:
        """What each row of logits predicts: int64, the logits' shape without the last dimension."""
        return self.targets if self.rows is None else self.targets.flatten(0, 1)[self.rows]

    def whole(self) -> Stream:
        """All streams that take turns in its logits as one, of text; itself where it has the logits to itself."""
        if self.turns is None:
            return self
        return replace(self, name="text", group="text", labels=self.turns, turns=None, entries=None)

    def fault(self) -> str:
        """Say what does not fit together, by shapes and dtypes alone; "" for a stream that can be read."""
        block = not isinstance(self.name, str)
        if self.group not in get_args(Group) or self.alignment not in get_args(Alignment):
            known = ", ".join(get_args(Group) + get_args(Alignment))
            return f"group {self.group!r} and alignment {self.alignment!r} are to be of {known}"
        if not self.logits.is_floating_point() or self.labels.is_floating_point():
            return f"logits are {self.logits.dtype}, labels {self.labels.dtype}: floats and ids are expected"
        if block and (not self.labels.dim() or self.labels.shape[-1] != len(self.names)):
            return (
                f"labels {tuple(self.labels.shape)} for {len(self.names)} sequences: their last dimension is expected"
            )
        if self.labels.dim() - block < 2 and (self.alignment == "shifted" or self.rows is not None):
            return f"labels {tuple(self.labels.shape)} have no batch and sequence to be shifted or taken rows of"
        over = self.labels.shape if self.rows is None else (*self.rows.shape, *self.labels.shape[2:])
        given = tuple(self.logits.shape)
        if given[:-1] == tuple(over) and given:
            return ""
        cover = len(given) == len(over) + 1 > 2 and given[:1] == tuple(over[:1]) and given[1] < over[1]
        what = "do not cover every position" if cover else "do not fit the labels"
        expected = ", ".join(map(str, over))
        return f"the logits {what}: {given}, where ({expected}, vocabulary) is expected"


@dataclass(frozen=True)
class LossPart:
    """A part of the model's loss that no stream shows, weighted as the model adds it: a 0-d tensor."""

    name: str
    value: Tensor


@dataclass(frozen=True)
class Rest:
    """The part of the loss that is left when all that streams and other parts show is taken from what was returned.

    For what a model adds without showing it: it cannot be checked, and neither can the sum with it.
    """

    name: str


@dataclass(frozen=True)
class Divided:
    """A part of the loss that the trainer has divided by what it has counted, to be held against its own tokens.

    Attributes:
        name: of the part.
        tokens: 0-d: its supervised tokens in the pass.
        by: what its sum is divided by, for the tokens of all passes of the step.
    """

    name: str
    tokens: Tensor
    by: Tensor | float


@dataclass(frozen=True)
class Overruled:
    """Something that a batch asks for and the model does otherwise.

    Attributes:
        asked, done: what the batch asks for and what the model does instead, each with ``{}`` for a number.
        asks, does: 0-d: the numbers, of the pass. Nothing is overruled where ``asks`` is 0.
    """

    asked: str
    done: str
    asks: Tensor
    does: Tensor


@dataclass(frozen=True)
class Absent:
    """What of a pass cannot be read, and why.

    Attributes:
        name: of a stream, a group or a part of the loss.
        why: the reason, as people are told.
        in_loss: whether the model's loss has it all the same.
    """

    name: str
    why: str
    in_loss: bool = True


Declared: TypeAlias = Stream | LossPart | Rest | Divided | Overruled | Absent


@dataclass(frozen=True)
class Seen:
    """What a family is given of a pass beside its inputs and outputs.

    Attributes:
        view: the batch, as :meth:`Family.view` has read it.
        modules: outputs of the modules that :meth:`Family.watched` names; without those that have not run.
        given: what those modules were given, by the names of their forward's parameters: one mapping a call.
        autocast: what those modules computed in by autocast, by type of device; without those where it was off.
        missing: why the output of a module that should have run is not there.
    """

    view: BatchView | None = None
    modules: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    autocast: Mapping[str, torch.dtype] = field(default_factory=dict)
    missing: str = NO_LOGITS


class Family:
    """How one kind of model is read. Bound to one model; holds no tensor of any batch.

    A subclass states what it can, :meth:`streams` first; all else is absent.

    Args:
        model: the module that has been found by its class's name.

    Attributes:
        name: what it is called in messages.
        modalities: what its models read and predict.
        groups: part of a parameter's name → gradient group of the catalogue; the first that fits.
        meaningless: tags of the catalogue that would say nothing of such models → why.
    """

    name: ClassVar[str] = ""
    modalities: tuple[Group, ...] = ("text",)
    groups: Sequence[tuple[str, str]] = ()
    meaningless: Mapping[str, str] = MappingProxyType({})

    def __init_subclass__(cls) -> None:
        cls.name = cls.__dict__.get("name", cls.__name__)

    def __init__(self, model: Any) -> None:
        self.model = model

    @functools.cached_property
    def speaker(self) -> Speaker | None:
        """What makes the model speak; None where nothing does."""
        return None

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        """Whether a model that is named as expected is what it is named."""
        return True

    def streams(self, inputs: Mapping[str, Any], outputs: Any, seen: Seen) -> Iterable[Declared]:
        """Declare what a pass has predicted, what else its loss consists of, and what of it does not show.

        Called after the model's forward pass. Must not wait for the device.

        Args:
            inputs: the model's keyword arguments, and labels of its batch that the trainer has kept from it.
            outputs: what it returned.
            seen: the batch as it was read, and what watched modules gave.
        """
        return ()

    def watched(self) -> Mapping[str, nn.Module]:
        """Modules whose outputs and arguments :meth:`streams` is to be given, by a name of one's own."""
        return {}

    def view(self, inputs: Mapping[str, Any]) -> BatchView | None:
        """Read a batch (see :meth:`streams`), or None where it cannot be laid out position by position."""
        return None

    def group_of(self, parameter_name: str) -> str:
        """Return the catalogue's gradient group of a parameter."""
        return next((group for part, group in self.groups if part in parameter_name), "other")

    def layers(self) -> Sequence[Layer]:
        """Return the decoder layers, in order; none where the model does not show them."""
        return ()

    def served(self, view: BatchView) -> Mapping[str, Tensor]:
        """Say which positions each feed-forward network is given, padding included: bool ``[batch, sequence]``.

        A network that is given a part of a batch gets its positions one after the other, sample by sample.
        """
        return {}

    def coded(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a batch with codes in the place of waveforms that the model encodes in its forward pass.

        Called aside from training, where the model may be used and waited for; what it returns is for :meth:`view`,
        :meth:`swap_reference` and :meth:`hide_reference` of the same family, and need not be what the model takes.
        """
        return inputs

    @property
    def swaps_references(self) -> bool:
        """Whether the model can be given other reference audio."""
        return type(self).swap_reference is not Family.swap_reference

    def swap_reference(self, inputs: Mapping[str, Any], codes: Tensor | None) -> dict[str, Any]:
        """Return the model's keyword arguments for a batch with other codes, with no more than it predicts from.

        Args:
            inputs: of the batch.
            codes: int64 ``[batch, sequence, C]``, at its audio positions; None for its own.
        """
        raise TypeError(f"family {self.name} swaps no references")

    def hide_reference(self, inputs: Mapping[str, Any], positions: Tensor) -> dict[str, Any]:
        """As :meth:`swap_reference`, with no position reading some ``positions``, bool ``[batch, sequence]``.

        All positions stay where they are: position ids are those that the model would have counted.

        Raises:
            ValueError: when the batch's attention mask is not ``[batch, sequence]``.
        """
        given, mask = self.swap_reference(inputs, None), inputs.get("attention_mask")
        mask = torch.ones_like(positions, dtype=torch.long) if mask is None else mask
        if mask.shape != positions.shape:
            raise ValueError(f"positions {tuple(positions.shape)} cannot be hidden by a mask {tuple(mask.shape)}")
        counted = torch.arange(positions.shape[1], device=positions.device).unsqueeze(0)
        return {"position_ids": counted, **given, "attention_mask": mask.masked_fill(positions, 0)}


class FamilyMaker(Protocol):
    """A class of families, or what declares one."""

    def fits(self, model: nn.Module, /) -> bool: ...
    def __call__(self, model: Any, /) -> Family: ...


MakerT = TypeVar("MakerT", bound=FamilyMaker)
_READERS: dict[str, FamilyMaker] = {}


def reads(*class_names: str) -> Callable[[MakerT], MakerT]:
    """Register a family for models by the names of their classes, or of classes that theirs derive from."""

    def register(family: MakerT) -> MakerT:
        _READERS.update(dict.fromkeys(class_names, family))
        return family

    return register


def registered_families() -> dict[type[Family], list[str]]:
    """Return the families of telemetry's own and of users, each with the names of the classes that it reads."""
    found: dict[type[Family], list[str]] = {}
    for name, maker in _READERS.items():
        if isinstance(maker, type) and issubclass(maker, Family):
            found.setdefault(maker, []).append(name)
    return found


def registered_family(model: nn.Module) -> Family | None:
    """Return the registered family of a model, wrapped (DDP, FSDP, PEFT) or not; None for an unknown one."""
    for module in model.modules():
        for kind in type(module).__mro__:
            family = _READERS.get(kind.__name__)
            if family is not None and family.fits(module):
                return family(module)
    return None


def output(outputs: Any, name: str) -> Any:
    """Return a named part of what a model returned, a mapping or an object; None where it is not there."""
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def shift_labels(labels: Tensor) -> Tensor:
    """Labels of the next position, aligned with the logits that predict them.

    Args:
        labels: int64 ``[batch, sequence, ...]``, unshifted.

    Returns:
        The same shape; the last position, which predicts nothing, is :data:`IGNORE_INDEX`.
    """
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE_INDEX)], dim=1)


def real_positions(
    inputs: Mapping[str, Any], input_ids: Tensor, pad_id: int | None = None, labels: Any = None
) -> Tensor:
    """bool ``[batch, sequence]``: not padding.

    By an attention mask of positions. Otherwise padding is what no query of a real position attends to, where the mask
    is one of queries and keys; and a run of ``pad_id`` without labels that a sequence begins or ends with.

    Args:
        inputs: with an ``attention_mask``, or without.
        input_ids: int64 ``[batch, sequence]``.
        pad_id: what the model's configuration says that sequences are filled with.
        labels: of the ids, unshifted; anything else is none.
    """
    mask = inputs.get("attention_mask")
    if isinstance(mask, Mapping):  # one for each kind of layer
        mask = mask.get("full_attention")
    if isinstance(mask, Tensor) and mask.shape == input_ids.shape:
        return mask.bool()
    real = torch.ones_like(input_ids, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.dim() in (3, 4) and mask.shape[-2:] == input_ids.shape[1:] * 2:
        real = real & _attended(mask)
    if pad_id is None:
        return real
    filled = input_ids == pad_id
    if isinstance(labels, Tensor) and labels.shape == input_ids.shape:
        filled = filled & (labels == IGNORE_INDEX)
    runs = (filled.long().cumprod(1), filled.flip(1).long().cumprod(1).flip(1))
    return real & ~(runs[0] | runs[1]).bool()


def _attended(mask: Tensor) -> Tensor:
    """bool ``[batch, keys]``: the keys that queries of real positions see; a mask ``[batch, (heads,) queries, keys]``.

    Queries of padding may be let see everything, so that their softmax has something to add up to: where not even the
    last position sees everything, those that do are padding.
    """
    seen = mask > -1e4 if mask.is_floating_point() else mask.bool()  # what is added to logits is about 0 where seen
    seen = seen.any(dim=1) if seen.dim() == 4 else seen
    everything = seen.all(dim=2)
    return (seen & ~everything.unsqueeze(2)).any(dim=1) | everything[:, -1:]


def clips_with(starts: Tensor, is_audio: Tensor, marked: Tensor) -> Tensor:
    """bool ``[batch, sequence]``: audio positions of the clips that hold a marked position."""
    clip = starts.long().cumsum(dim=1)
    held = torch.zeros(clip.shape[0], clip.shape[1] + 1, dtype=torch.long, device=clip.device)
    held = held.scatter_reduce(1, clip, (marked & is_audio).long(), reduce="amax")
    return is_audio & held.gather(1, clip).bool()


def clip_length(audio: AudioView, begin: int) -> int:
    """Positions of the clip that begins at ``begin``, in a batch of one."""
    spoken = (audio.reference | audio.target)[0, begin:]
    others = audio.starts[0, begin:].clone()
    others[0] = False
    stops = ~spoken | others
    return int(stops.long().argmax()) if bool(stops.any()) else len(stops)


def decoder_audio(
    codes: Tensor,
    shifted: Tensor | None,
    is_audio: Tensor,
    text: int,
    is_code: Tensor,
    **known: Any,
) -> AudioView:
    """Lay out the audio of an encoder-decoder after its encoder's text. What comes before a first label is reference.

    Args:
        codes: int64 ``[batch, frames, C]``, what the decoder is given, a begin first.
        shifted: its labels, ``[batch, frames, C]``, each at the position that predicts it; None where they are unknown.
        is_audio: bool ``[batch, text + frames]``.
        text: positions of the encoder.
        is_code: bool ``[batch, frames, C]``: the codes that are neither begin, end nor padding.
        known: what else the view says: vocabulary, ids, delay.
    """
    labels, after = torch.full_like(codes, IGNORE_INDEX), None
    if shifted is not None:  # the last label is that of a frame that the decoder is not given
        labels[:, 1:], after = shifted[:, :-1], shifted[:, -1]
    room = codes.new_zeros(codes.shape[0], text, codes.shape[2])
    codes = torch.cat([room, codes], dim=1)
    labels = torch.cat([torch.full_like(room, IGNORE_INDEX), labels], dim=1)
    labels = labels.masked_fill(~is_audio.unsqueeze(-1), IGNORE_INDEX)
    is_code = torch.cat([torch.zeros_like(room, dtype=torch.bool), is_code], dim=1) & is_audio.unsqueeze(-1)
    unlabelled = is_code & (labels == IGNORE_INDEX)
    begun = (labels != IGNORE_INDEX).any(dim=-1).long().cumsum(dim=1) > 0
    reference = is_audio & ~begun & (unlabelled.any(dim=-1) & ~begun).any(dim=1, keepdim=True)
    count = is_audio.sum(dim=1)
    return AudioView(
        codes=codes.masked_fill(~is_audio.unsqueeze(-1), 0),
        labels=labels,
        reference=reference,
        target=is_audio & ~reference,
        starts=_first(is_audio) | _first(is_audio & ~reference),
        frames=count,
        placeholders=count,
        after=after,
        reference_codes=unlabelled & reference.any(dim=1)[:, None, None],
        labelled=shifted is not None,
        **known,
    )


def _first(marked: Tensor) -> Tensor:
    """The first marked position of every sample, bool ``[batch, sequence]``."""
    return marked & (marked.long().cumsum(dim=1) == 1)


def decoder_layers(decoder: Any) -> list[Any]:
    """The layers of a decoder as transformers writes them (``layers``, each with ``self_attn``); else none."""
    layers = getattr(decoder, "layers", None)
    found = list(layers) if isinstance(layers, nn.ModuleList) else []
    return found if all(hasattr(layer, "self_attn") for layer in found) else []


def moved(values: Tensor, held: Tensor, asking: Tensor, otherwise: Tensor | int) -> Tensor:
    """The values at marked places, in order, at the places that ask for one: as a model's own masked scatter does it.

    Without boolean indexing, which would wait for the device.

    Args:
        values: int64 ``[batch, places, codebooks]``.
        held: bool ``[batch, places]``: the places whose values are taken.
        asking: bool ``[batch, others]``: the places that get one.
        otherwise: what all other places get, and those for which there is no value left.

    Returns:
        int64 ``[batch, others, codebooks]``.
    """
    flat = values.flatten(0, 1)
    if not flat.shape[0]:
        flat, held = values.new_zeros(1, values.shape[-1]), held.new_zeros(1)
    held_first = torch.argsort(held.flatten().to(torch.int8), descending=True, stable=True)
    rank = (asking.flatten().long().cumsum(0) - 1).view_as(asking)
    source = held_first[rank.clamp(0, flat.shape[0] - 1)]
    given = asking & (rank < held.sum())
    return torch.where(given.unsqueeze(-1), flat[source], otherwise)


def marked_rows(marked: Tensor, count: int) -> Tensor:
    """The first ``count`` marked places of bool ``[batch, sequence]``, in order: int64, indices into all places."""
    return torch.argsort(marked.flatten().to(torch.int8), descending=True, stable=True)[:count]


def each_logits(streams: Iterable[Stream]) -> Iterator[tuple[Stream, list[Stream]]]:
    """Go through the logits of streams: all that take turns in some as one, and those as they are declared."""
    taking_turns: dict[int, list[Stream]] = {}
    for at, stream in enumerate(streams):
        taking_turns.setdefault(at if stream.turns is None else -1 - id(stream.turns), []).append(stream)
    for together in taking_turns.values():
        yield together[0].whole(), together


def codebook_names(codebooks: int) -> tuple[str, ...]:
    """Names of the streams of ``codebooks`` codebooks."""
    return tuple(f"{BOOK}{k}" for k in range(codebooks))
