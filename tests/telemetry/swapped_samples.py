"""Samples built with the reference of another, position by position."""

from __future__ import annotations

from dataclasses import replace

from transformers import HiggsAudioV2Config
from voice_batches import Sample


def reference_codes(sample: Sample, config: HiggsAudioV2Config) -> list[list[int]]:
    """By codebook, without delay, begin and end."""
    special = (config.audio_stream_bos_id, config.audio_stream_eos_id)
    return [
        [p.codes[k] for p in sample if p.kind == "reference" and p.codes is not None and p.codes[k] not in special]
        for k in range(config.num_codebooks)
    ]


def with_reference_of(sample: Sample, other: Sample, config: HiggsAudioV2Config) -> Sample:
    """Of a sample with one clip: what codebook ``k`` has at frame ``f`` is the other's code ``f - 1 - k``, repeated."""
    given = reference_codes(other, config)
    changed: Sample = []
    frame = 0
    for position in sample:
        if position.kind != "reference" or position.codes is None:
            changed.append(position)
            continue
        frame = 0 if position.begins else frame + 1
        codes = list(position.codes)
        for k, code in enumerate(codes):
            if code not in (config.audio_stream_bos_id, config.audio_stream_eos_id):
                codes[k] = given[k][(frame - 1 - k) % len(given[k])]
        changed.append(replace(position, codes=tuple(codes)))
    return changed
