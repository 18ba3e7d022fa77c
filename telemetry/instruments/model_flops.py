"""The floating-point operations that training a model takes, and what a GPU could do of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from telemetry.probes.sharding import whole_shape

# Dense 16-bit operations a second, in 10^12, by the makers' data sheets; the first that a GPU's name has in it.
_PEAKS: Mapping[str, float] = {
    "B200": 2250, "GH200": 989, "H200 NVL": 835, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989,
    "H800 PCIe": 756, "H800": 989, "H20": 148,
    "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "A10G": 70, "A10": 125, "A6000": 155, "A40": 150,
    "A30": 165, "RTX 6000 Ada": 364, "RTX 4090": 165, "RTX 3090": 71, "V100-PCIE": 112, "V100": 125, "T4": 65,
    "MI300X": 1307,
}  # fmt: skip
_LESSER = r"(?! (?:D|Ti|SUPER|Laptop|Mobile)\b)"  # cards of the same name that do other than these
_A_PART = r"\bMIG\b|\bGRID\b|-\d+[ABCQ]\b"  # of a card, which other processes have the rest of
_EXPERTS = r"(^|_)(num|n)_(\w+_)?experts$"  # in a configuration
_NO_BFLOAT16 = ("V100-PCIE", "V100", "T4")


class UncountableError(Exception):
    """Why a model's operations are not counted."""


def operations_a_position(model: nn.Module, group_of: Callable[[str], str]) -> float:
    """Count the operations of a forward and backward pass for one position of a decoder's input.

    Six for each weight that multiplies it (Kaplan et al., 2020, section 2.1), as transformers counts them, and those
    of a head that shares its weights with an embedding; what attention computes of queries and keys is not in it. Of a
    feed-forward network for text and one for audio, of one size, every position goes through one.

    Args:
        model: a decoder, all of whose positions are those of its main input.
        group_of: the gradient group of a parameter, by its name.

    Raises:
        UncountableError: where other parts, or only some of the weights, work on a position.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "sub_configs", None):
        raise UncountableError("its parts do not all work on the positions of its main input")
    experts = (getattr(config, name, None) for name in dir(config) if re.search(_EXPERTS, name))
    if any(isinstance(number, int) and number > 1 for number in experts):
        raise UncountableError("only some of its experts work on a position")
    multiplied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} - multiplied
    weights, networks = 0, {"text_ffn": 0, "audio_ffn": 0}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            raise UncountableError("some of its parameters are frozen")
        if "encoder_attn" in name or "crossattention" in name:
            raise UncountableError("it may attend to an encoder, or not")
        shape = whole_shape(parameter)
        if len(shape) < 2 or id(parameter) in looked_up:
            continue
        weights += (size := shape.numel())
        if (group := group_of(name)) in networks:
            networks[group] += size
    if not weights:
        raise UncountableError("its weights do not show their shapes")
    if networks["audio_ffn"]:
        if len({*networks.values()}) > 1:
            raise UncountableError("its feed-forward networks for text and audio differ in size")
        weights -= networks["audio_ffn"]
    return 6.0 * weights


def peak_operations(gpu: str, dtype: torch.dtype) -> float | None:
    """Return what a GPU can do of dense operations in a second; None where that is not known.

    Args:
        gpu: its name, as its driver says it.
        dtype: of what is multiplied: of 16 bits.
    """
    if dtype not in (torch.bfloat16, torch.float16) or re.search(_A_PART, gpu):
        return None
    name = next((name for name in _PEAKS if re.search(rf"\b{name}\b{_LESSER}", gpu)), None)
    if name is None or (dtype == torch.bfloat16 and name in _NO_BFLOAT16):
        return None
    return _PEAKS[name] * 1e12
