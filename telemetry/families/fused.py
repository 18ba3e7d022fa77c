"""Logits where a loss is fused with the head: a model's own code, run again on its decoder's last hidden state."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

SAMPLE = 1024  # rows: logits of so many are small beside what a step keeps of its layers
SPREAD = "its loss is fused with a head that does not lie on this rank as a whole"


def decoders_of(model: nn.Module) -> list[nn.Module]:
    """Return the parts of a model of transformers that may give the last hidden state, the outermost first."""
    get_decoder = getattr(model, "get_decoder", None)
    found = [getattr(model, "base_model", None), get_decoder() if callable(get_decoder) else None]
    return list(dict.fromkeys(one for one in found if isinstance(one, nn.Module) and one is not model))


def last_hidden_state(given: Any) -> Tensor | None:
    """Return the last hidden state ``[batch, sequence, hidden]`` of what a decoder gave; None where it gave none."""
    hidden = given[0] if isinstance(given, tuple) and given else getattr(given, "last_hidden_state", None)
    return hidden if isinstance(hidden, Tensor) and hidden.dim() == 3 else None


def head_fault(model: nn.Module, decoder: nn.Module) -> str:
    """Say why what follows a model's decoder cannot be run again; "" where it can."""
    own_head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if any(isinstance(part, nn.Dropout) and part.p and part.training for part in own_head.modules()):
        return "its loss is fused with a head that draws at random (dropout)"
    heads = [module for child in _beside(model, decoder) for module in child.modules()]
    parameters = [one for head in heads for one in head.parameters(recurse=False)]
    spread = any(hasattr(one, "device_mesh") or one.is_meta or not one.numel() for one in parameters)
    # FSDP, tensor parallelism, ZeRO-3; or offloaded
    return SPREAD if spread or any(hasattr(head, "_fsdp_wrapped_module") for head in heads) else ""


def _beside(model: nn.Module, decoder: nn.Module) -> list[nn.Module]:
    return [child for child in model.children() if all(part is not decoder for part in child.modules())]


def logits_of(
    model: nn.Module, decoder: nn.Module, given: Any, hidden: Tensor, autocast: Mapping[str, torch.dtype]
) -> Tensor | None:
    """Return the logits that a model makes of its last hidden state, scaled and capped as its own code has it.

    Its class's forward pass is run without labels on a twin that shares all tensors: with no hook on it, nothing in
    training mode, and a decoder that gives what it has given. So nothing is drawn, nothing of the model changes, and
    what replaces the forward pass of one model (a patch with a fused loss) is left out. Where a class of one's own
    gives no logits, the class that it derives from does.

    Args:
        model: of transformers.
        decoder: what gives its last hidden state.
        given: what that gave.
        hidden: ``[batch, positions, hidden]``, of some positions.
        autocast: by type of device, what the pass has computed in.

    Returns:
        None where no class of the model's gives logits without labels.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    device = next((one.device for one in head.parameters()), hidden.device)
    hidden = hidden.to(device, non_blocking=True)
    again: Any = (hidden,) if isinstance(given, tuple) else type(given)(last_hidden_state=hidden)
    stand_in: Any = _bare(decoder)
    stand_in.forward = lambda *_args, **_options: again
    twin, dtype = _twin(model, {decoder: stand_in}), autocast.get(device.type)
    # Without its cache of weights: of earlier versions of torch, one that is filled without gradients would leave the
    # passes that come after without some.
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False):
        for kind in type(model).__mro__[: type(model).__mro__.index(nn.Module)]:
            if "forward" in vars(kind) and (logits := _tried(vars(kind)["forward"], twin, hidden)) is not None:
                return logits
    return None


def _tried(forward: Callable[..., Any], twin: nn.Module, hidden: Tensor) -> Tensor | None:
    try:
        logits = getattr(forward(twin, inputs_embeds=hidden, use_cache=False, return_dict=True), "logits", None)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001  (a forward pass that cannot do without labels, or without token ids)
        return None
    return logits if isinstance(logits, Tensor) and logits.shape[:-1] == hidden.shape[:-1] else None


def even_rows(supervised: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Choose ``size`` places of those that are supervised, evenly, without waiting for the device.

    Args:
        supervised: bool of any shape, of more than ``size`` places.
        size: how many places.

    Returns:
        Places in order, int64 ``[size]``, and how many supervised ones each stands for: 0-d float32, 1 where all are
        chosen. Of fewer than ``size`` supervised places all are; what is left of ``size`` is one that is not.
    """
    flat = supervised.flatten()
    numbers = flat.cumsum(0)  # of the supervised places, counted from 1
    count = numbers[-1]
    most = count.clamp(min=size)
    chosen = torch.arange(size, device=flat.device) * most // size
    rows = torch.searchsorted(numbers, chosen + 1)
    return torch.where(chosen < count, rows, flat.to(torch.int8).argmin()), most / size


_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def _bare(module: nn.Module) -> nn.Module:
    """A module with the same tensors and parts, and nothing that has been hooked to it."""
    held: dict[str, Any] = {**vars(module), "_compiled_call_impl": None}
    held |= {name: OrderedDict() for name in _HOOKS}
    held |= {name: dict(held[name]) for name in ("_parameters", "_buffers", "_modules")}
    made = object.__new__(type(module))
    vars(made).update(held, training=False)
    return made


def _twin(module: nn.Module, known: dict[nn.Module, nn.Module]) -> nn.Module:
    """A module and all its parts so, but those that are known."""
    if module not in known:
        made = known[module] = _bare(module)
        for name, part in module._modules.items():
            made._modules[name] = None if part is None else _twin(part, known)
    return known[module]
