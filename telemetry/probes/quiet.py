"""Runs the model aside: forward passes and generation that leave training as it was."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from telemetry.probes.sharding import fsdp2_modules


@contextlib.contextmanager
def set_aside(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` may be run, forward or to generate, without a trace in training.

    No gradients; every module in eval mode (which also turns dropout and gradient checkpointing off), each with its own
    flag back afterwards; random states of Python, NumPy, torch and the model's devices as before; buffers that a longer
    sequence makes a module replace (rotary frequencies) and the numbers kept beside them, the model's configuration and
    its generation configuration as before; parameters of FSDP2 sharded again; nothing is compiled. All of it also when
    the inside raises.

    Use it on the training thread. Under FSDP2 a forward pass that raises is given up with whatever gradients are on
    their way: run it between optimizer steps only. Buffers that a module changes in place, in eval mode, stay changed.

    Args:
        model: the model, wrapped or not.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_random_states(model))
        stack.callback(_restorer(model))
        stack.enter_context(_resharded(model))
        if is_compiled(model):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        # Not inference_mode: buffers and FSDP2's gathered parameters made inside would be inference tensors for good,
        # which autograd refuses to save in the next training step.
        stack.enter_context(torch.no_grad())
        for module in model.modules():
            # Not eval(): some modules override it to do more than set the flag.
            module.training = False
        yield


def is_compiled(model: nn.Module) -> bool:
    """Whether calling the model may run what ``torch.compile`` has made or would make of any part of it."""
    return any(
        getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )


@contextlib.contextmanager
def _random_states(model: nn.Module) -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # the one that data sets draw from
    cpu = torch.get_rng_state()
    on_devices = {device: _device_state(device) for device in _devices(model)}
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        for device, state in on_devices.items():
            torch.get_device_module(device).set_rng_state(state, *_named(device))


def _devices(model: nn.Module) -> set[torch.device]:
    """The devices with a random state that the model may draw from: those it lies on, and the one in use."""
    found = {parameter.device for parameter in model.parameters()} | _device_in_use()
    return {device for device in found if device.type not in ("cpu", "meta")}


def _device_in_use() -> set[torch.device]:
    """The accelerator that this process computes on, also where parameters are offloaded; none that still sleeps."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return set()
    module = torch.get_device_module(accelerator)
    if not (hasattr(module, "is_initialized") and module.is_initialized()):
        return set()
    return {torch.device(accelerator.type, module.current_device())}


def _device_state(device: torch.device) -> torch.Tensor:
    state: torch.Tensor = torch.get_device_module(device).get_rng_state(*_named(device))
    return state


def _named(device: torch.device) -> tuple[torch.device, ...]:
    """Apple's GPUs are one device with one state, and take no name for it."""
    return () if device.type == "mps" else (device,)


def _restorer(model: nn.Module) -> Callable[[], None]:
    """What puts flags, replaced buffers and configurations back."""
    modules = [(module, module.training) for module in model.modules()]
    holders = [(module, dict(module._buffers), _numbers(module)) for module, _ in modules if module._buffers]
    configs = [(config, copy.deepcopy(vars(config))) for config in _configs(model)]

    def restore() -> None:
        for module, training in modules:
            module.training = training
        for module, buffers, numbers in holders:
            module._buffers.update(buffers)
            vars(module).update(numbers)
        for config, values in configs:
            _put_back(config, values)

    return restore


def _numbers(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float)}


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration of the model, each once."""
    found = [getattr(module, name, None) for module in model.modules() for name in ("config", "generation_config")]
    return list({id(config): config for config in found if hasattr(config, "__dict__")}.values())


def _put_back(config: Any, values: dict[str, Any]) -> None:
    held = vars(config)
    for name in held.keys() - values.keys():
        del held[name]
    for name, value in values.items():
        if name not in held or held[name] != value:
            held[name] = value


@contextlib.contextmanager
def _resharded(model: nn.Module) -> Iterator[None]:
    """FSDP2 keeps the root's parameters gathered after a forward pass, for a backward that does not come here."""
    sharded = fsdp2_modules(model)
    try:
        yield
    except BaseException:
        # A pass cut short leaves its modules waiting for the rest of it; the next one would go without its hooks.
        if sharded and hasattr(sharded[0], "reset_iter_state"):
            sharded[0].reset_iter_state()
        raise
    finally:
        for module in sharded:
            module.reshard()
