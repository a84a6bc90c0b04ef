"""The bias of a step over ranks is that of one process with all tokens, to the last bit."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from harness import Workers
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh

from st_moe_pytorch import MoE, TopNGating
from st_moe_pytorch.distributed import data_parallel, shard_experts
from st_moe_pytorch.tools.balance import LossFreeBalance

SEQUENCES = 12
SIZES = {1: (12,), 2: (5, 7), 3: (9, 0, 3), 4: (1, 0, 4, 7)}
"""How many sequences each rank has: not the same number, and some none."""


def model_of_gates():
    """Two gates whose logits are their tokens: products, and sigmoids but for 16, round by how many come at once."""
    gates = [TopNGating(5, 5, balance_bias=True), TopNGating(16, 16, top_n=3, balance_bias=True, score="sigmoid")]
    for gate in gates:
        nn.init.eye_(gate.to_gates.weight)
    return nn.ModuleList(gates)


def biases(sizes, rank, rule, group=None):
    """What steps make of the biases and say of the loads, with this rank's part of each step in two micro-batches."""
    model = model_of_gates()
    balance = LossFreeBalance(model, rule, rate=0.5, process_group=group)
    generator = torch.Generator().manual_seed(3)
    loads = []
    for _ in range(3):
        for gate in model:
            x = torch.randn(SEQUENCES, 6, gate.dim, generator=generator) + torch.randn(gate.dim, generator=generator)
            mask = torch.rand(SEQUENCES, 6, generator=generator) < 0.8
            mine, real = x.split(sizes)[rank], mask.split(sizes)[rank]
            with balance:
                for part in (slice(0, 2), slice(2, None)):
                    gate.route(mine[part], mask=real[part])
        loads.append(torch.cat(list(balance.step().values())))
    return torch.cat([gate.bias for gate in model]), torch.stack(loads)


def check(rank, rule, expected):
    bias, loads = biases(SIZES[dist.get_world_size()], rank, rule)
    assert torch.equal(bias.view(torch.int32), expected[0].view(torch.int32))
    assert torch.equal(loads, expected[1])


@pytest.mark.parametrize("workers", [2, 3, 4], indirect=True)
@pytest.mark.parametrize("rule", ["quantile", "sign"])
def test_biases_are_those_of_one_process(workers, rule):
    expected = biases(SIZES[1], 0, rule)
    assert expected[0].abs().max() > 0.1
    workers.run(check, rule, expected)


def check_a_group(rank, expected):
    group = dist.new_group([0, 1])
    if rank == 2:
        return
    bias, loads = biases(SIZES[2], rank, "quantile", group)
    assert torch.equal(bias, expected[0])
    assert torch.equal(loads, expected[1])


@pytest.mark.parametrize("workers", [3], indirect=True)
def test_ranks_of_a_group_balance_together(workers):
    workers.run(check_a_group, biases(SIZES[1], 0, "quantile"))


def check_that_all_raise(rank):
    """Ranks without a forward join those that had one, and raise only together."""
    model = model_of_gates()
    balance = LossFreeBalance(model)
    if rank == 0:
        with balance:
            model[0].route(torch.randn(1, 9, 5))
    assert {name: int(loads.sum()) for name, loads in balance.step().items()} == {"0": 18, "1": 0}
    with pytest.raises(RuntimeError, match="step must follow a forward"):
        balance.step()


@pytest.mark.parametrize("workers", [2], indirect=True)
def test_a_step_without_a_forward_is_one_on_no_rank(workers):
    workers.run(check_that_all_raise)


def layer_of_gates():
    """A layer whose logits are its tokens, and the tokens of a step."""
    gate = TopNGating(5, 5, balance_bias=True)
    nn.init.eye_(gate.to_gates.weight)
    x = torch.randn(SEQUENCES, 6, 5, generator=torch.Generator().manual_seed(4)) + torch.linspace(0, 2, 5)
    return MoE(5, 5, gate=gate), x


def two_steps(layer, model, x):
    """Two steps of balance, with losses and gradients, around a model that holds the layer."""
    balance = LossFreeBalance(model, rate=0.5)
    for _ in range(2):
        with balance:
            out = layer(x)
            (out.outputs.square().sum() + out.total_aux_loss).backward()
        balance.step()
    return model.gate.bias


def balance_and_save(rank, mesh_shape, expected, path):
    model, x = layer_of_gates()
    mesh = None if mesh_shape is None else init_device_mesh("cpu", mesh_shape, mesh_dim_names=("dp", "ep"))
    ddp = data_parallel(shard_experts(model, mesh))
    bias = two_steps(ddp, model, x.split(SIZES[4])[rank])
    assert torch.equal(bias, expected)
    dcp.save(get_model_state_dict(ddp), checkpoint_id=path)


def load_and_compare(rank, expected, path):
    model, _ = layer_of_gates()
    ddp = data_parallel(shard_experts(model))
    state = get_model_state_dict(ddp)
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(ddp, state)
    assert torch.equal(model.gate.bias, expected)


@pytest.mark.parametrize("mesh_shape", [None, (2, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("workers", [1, 3], indirect=True)
def test_sharded_layers_balance_as_one_process_does_and_checkpoints_hold_the_bias(workers, mesh_shape, tmp_path):
    model, x = layer_of_gates()
    expected = two_steps(model, model, x).clone()
    assert expected.abs().max() > 0.1
    four = Workers(4)
    four.run(balance_and_save, mesh_shape, expected, str(tmp_path))
    four.close()
    workers.run(load_and_compare, expected, str(tmp_path))
