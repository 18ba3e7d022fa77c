"""Trained parameters and their gradients: each once, in its group and layer, each rank its own part."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.batches import Voices
from support.references import HIGGS_GROUPS, group_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from telemetry.families import HiggsAudioV2Family
from telemetry.probes.gradients import (
    TrainedParameter,
    out_of_reach,
    own_gradients,
    steps_by_itself,
    trained_parameters,
)
from telemetry.probes.lockstep import can_keep_company
from telemetry.probes.sharding import is_split, own_part, ranks_of_a_batch, split_as


def test_every_gradient_is_in_its_group_and_layer_once(higgs: Any, voices: Voices) -> None:
    higgs.text_lm_head.weight.requires_grad_(False)
    higgs(**voices.batch([voices.conversation()])).loss.backward()
    parameters = trained_parameters(higgs, HiggsAudioV2Family(higgs))
    found = own_gradients(parameters, is_main=True)
    assert list(found) == list(range(len(parameters)))
    by_name = dict(higgs.named_parameters())
    assert [one.name for one in parameters] == [name for name in by_name if name != "text_lm_head.weight"]
    for index, one in enumerate(parameters):
        layer = re.search(r"\.layers\.(\d)\.(self_attn|mlp|audio_mlp)\.", one.name)
        assert one.tensor is by_name[one.name]
        assert one.group == group_of(one.name, HIGGS_GROUPS)
        assert one.layer == (int(layer[1]) if layer else None)
        assert found[index].data_ptr() == by_name[one.name].grad.data_ptr()
        assert not found[index].requires_grad


def test_shared_parameters_are_counted_once(higgs: Any) -> None:
    higgs.text_lm_head.weight = higgs.model.embed_tokens.weight
    higgs.model.embed_tokens.weight.grad = torch.ones_like(higgs.model.embed_tokens.weight)
    parameters = trained_parameters(higgs, HiggsAudioV2Family(higgs))
    assert [parameters[index].group for index in own_gradients(parameters, True)] == ["text_embedding"]


def test_without_gradients_there_are_none(higgs: Any) -> None:
    parameters = trained_parameters(higgs, HiggsAudioV2Family(higgs))
    assert own_gradients(parameters, True) == {}
    assert not any(one.has_gradient for one in parameters)
    assert out_of_reach(higgs) is None


def test_what_all_ranks_hold_alike_is_rank_0s() -> None:
    tensor = torch.ones(3)
    assert own_part(tensor, is_main=False) is None
    part = own_part(tensor, is_main=True)
    assert part is not None
    assert part.data_ptr() == tensor.data_ptr()


@pytest.fixture(params=[0, 1])
def rank_of_two(request: pytest.FixtureRequest) -> Iterator[int]:
    """This process as one rank of 2, with a second one that is only pretended."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=2)
    yield request.param
    dist.destroy_process_group()


def test_of_a_sharded_tensor_every_rank_has_its_shard(rank_of_two: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    shard = DTensor.from_local(torch.full((2, 3), 2.0), mesh, [Shard(0)], run_check=False)
    part = own_part(shard, is_main=rank_of_two == 0)
    assert type(part) is Tensor
    assert part.shape == (2, 3)
    copied = DTensor.from_local(torch.ones(3), mesh, [Replicate()], run_check=False)
    assert (own_part(copied, is_main=rank_of_two == 0) is None) == (rank_of_two == 1)


def test_a_shard_of_a_packed_weight_is_one(rank_of_two: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    packed = DTensor.from_local(torch.ones(2, 3), mesh, [_StridedShard(0, split_factor=2)], run_check=False)
    part = own_part(packed, is_main=rank_of_two == 0)
    assert part is not None
    assert part.shape == (2, 3)


def test_of_meshes_that_each_hold_the_whole_the_first_counts(rank_of_two: int) -> None:
    """As of a norm that FSDP2 shards, on the ranks that have another part of each layer."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("fsdp", "tp"))["fsdp"]
    shard = DTensor.from_local(torch.ones(2), mesh, [Shard(0)], run_check=False)
    assert (own_part(shard, is_main=rank_of_two == 0) is None) == (rank_of_two == 1)


def test_summands_of_a_gradient_are_no_gradient(rank_of_two: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, [Replicate()], run_check=False))
    assert out_of_reach(model) is None
    model.weight.grad = DTensor.from_local(torch.ones(2, 2), mesh, [Partial()], run_check=False)
    assert out_of_reach(model) == "that of weight is not added up over ranks before the optimizer steps"


def test_parts_that_do_not_say_how_they_are_split_are_out_of_reach(rank_of_two: int) -> None:
    """As Megatron and DeepSpeed's AutoTP mark them."""
    model = nn.Linear(2, 2)
    model.weight.tensor_model_parallel = False  # type: ignore[attr-defined]
    assert out_of_reach(model) is None
    model.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
    reason = out_of_reach(model)
    assert reason is not None
    assert "AutoTP" in reason


def test_a_gradient_that_is_whole_is_read_as_its_parameter_is_split(rank_of_two: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    columns = 2 + rank_of_two  # torch remembers how it split tensors of a layout, in a process that has one rank else
    whole = torch.arange(3.0 * columns).reshape(3, columns)
    local = whole[:2] if rank_of_two == 0 else whole[2:]
    parameter = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
    gradient = DTensor.from_local(whole, mesh, [Replicate()], run_check=False)
    part = own_part(split_as(gradient, parameter), is_main=rank_of_two == 0)
    assert part is not None
    assert part.equal(local)
    assert split_as(whole, whole) is whole


@pytest.mark.parametrize("names", [None, ("tp",), ("dp",)])
def test_ranks_with_parts_of_a_layer_have_one_batch(rank_of_two: int, names: tuple[str] | None) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=names)
    model = nn.Linear(2, 2)
    assert ranks_of_a_batch(model) == (0, 1)
    assert not is_split(model)
    model.weight = nn.Parameter(DTensor.from_local(torch.ones(1, 2), mesh, [Shard(0)], run_check=False))
    is_split_so = names != ("dp",)
    assert ranks_of_a_batch(model) == ((rank_of_two, 2) if is_split_so else (0, 1))
    assert is_split(model) == is_split_so


def test_ranks_with_shards_of_fsdp2_have_batches_of_their_own(rank_of_two: int) -> None:
    model = nn.Linear(2, 2)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    assert ranks_of_a_batch(model) == (0, 1)
    assert can_keep_company(model, [model])


def test_ranks_with_parts_of_a_layer_cannot_generate_side_by_side(rank_of_two: int) -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("fsdp", "tp"))
    model = nn.Linear(2, 2, bias=False)
    model.weight = nn.Parameter(DTensor.from_local(torch.ones(1, 2), mesh["tp"], [Shard(0)], run_check=False))
    fully_shard(model, mesh=mesh["fsdp"])
    assert ranks_of_a_batch(model) == (rank_of_two, 2)
    assert not can_keep_company(model, [model])


def test_zero_3_gives_each_rank_its_shard(rank_of_two: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for ``deepspeed.utils``, whose function of this name returns a rank's own part, filled up.

    Where DeepSpeed is installed it is itself tested, by ``test_zero_on_ranks.py``.
    """
    utils = ModuleType("deepspeed.utils")
    utils.safe_get_local_grad = lambda parameter: torch.full((2,), 3.0)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    monkeypatch.setitem(sys.modules, "deepspeed.utils", utils)
    parameter = nn.Parameter(torch.zeros(0))
    trained = [TrainedParameter("weight", "other", None, parameter)]
    assert not steps_by_itself(trained)
    assert own_gradients(trained, is_main=False) == {}
    parameter.ds_id, parameter.ds_numel = 0, 3  # type: ignore[attr-defined]
    assert steps_by_itself(trained)
    assert own_gradients(trained, is_main=False)[0].tolist() == [[3.0, 3.0], [3.0]][rank_of_two]


def test_flat_shards_of_fsdp1_are_out_of_reach() -> None:
    wrapper = nn.Module()
    wrapper._fsdp_wrapped_module = nn.Linear(1, 1)
    reason = out_of_reach(nn.Sequential(wrapper))
    assert reason is not None
    assert "FSDP2" in reason
