"""Reference audio of other samples of a batch, laid out in place of a sample's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from telemetry.families.base import AudioView

_FILL = -1  # beyond the end of a stream: no code


@dataclass(frozen=True)
class Swap:
    """A batch's codes with references swapped between samples.

    Attributes:
        codes: int64 ``[batch, sequence, C]``, the codes given at each audio position, 0 elsewhere.
        swapped: bool ``[batch]``: the samples that have another one's reference; the rest is as it was.
        present: bool ``[batch]``: the samples that have a reference.
    """

    codes: Tensor
    swapped: Tensor
    present: Tensor


@torch.no_grad()
def swap_references(audio: AudioView, speakers: Sequence[object]) -> Swap:
    """Gives every sample the reference of the next sample of the batch that has another speaker's.

    Lengths stay: the other reference is repeated or cut to fill the sample's own, and its codes go to where the own
    ones stand, codebook by codebook. So the delay pattern stays too, with its begins and ends of stream. Several clips
    are filled one after the other. Launches device work only.

    Args:
        audio: the batch.
        speakers: of every sample, None where it is not known. Where either is not, any other codes count as another
            speaker's; the same codes never do.
    """
    is_code = audio.reference.unsqueeze(-1) if audio.reference_codes is None else audio.reference_codes
    is_code = is_code & (audio.codes != audio.bos_id) & ~audio.is_end
    rank = is_code.long().cumsum(dim=1) - 1
    streams = _streams(audio.codes, is_code, rank)
    lengths = is_code.sum(dim=1).amin(dim=-1)
    partner, swapped = _partners(streams, lengths, speakers)
    source = rank.clamp(min=0) % lengths[partner].clamp(min=1)[:, None, None]
    others = streams[partner].gather(1, source)
    codes = torch.where(is_code & swapped[:, None, None], others, audio.codes)
    return Swap(codes, swapped, lengths > 0)


def _streams(codes: Tensor, is_code: Tensor, rank: Tensor) -> Tensor:
    """The reference's codes without delay: int64 ``[batch, sequence, C]``, the first at 0, :data:`_FILL` after."""
    end = codes.shape[1]
    streams = codes.new_full((codes.shape[0], end + 1, codes.shape[2]), _FILL)
    streams.scatter_(1, torch.where(is_code, rank, end), codes)
    streams[:, end] = _FILL  # where all that is no code has gone
    return streams[:, :end]


def _partners(streams: Tensor, lengths: Tensor, speakers: Sequence[object]) -> tuple[Tensor, Tensor]:
    """The sample, int64 ``[batch]``, whose reference each gets, and whether there is one, bool ``[batch]``."""
    batch = streams.shape[0]
    rows = torch.arange(batch, device=streams.device)
    nearest = torch.zeros_like(rows)
    allowed = _allowed(speakers).to(streams.device, non_blocking=True)
    for distance in range(batch - 1, 0, -1):
        differs = (streams != streams.roll(-distance, 0)).flatten(1).any(dim=1)
        both = (lengths > 0) & (lengths.roll(-distance, 0) > 0)
        nearest = torch.where(allowed[distance] & both & differs, distance, nearest)
    return (rows + nearest) % batch, nearest > 0


def _allowed(speakers: Sequence[object]) -> Tensor:
    """bool ``[batch, batch]``: whether the sample so many rows (first index) further on may have another speaker."""
    batch = len(speakers)
    pairs = [[(own, speakers[(row + step) % batch]) for row, own in enumerate(speakers)] for step in range(batch)]
    return torch.tensor([[None in pair or pair[0] != pair[1] for pair in row] for row in pairs], dtype=torch.bool)
