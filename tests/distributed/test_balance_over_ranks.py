"""The bias of a step over ranks is that of one process with all tokens, to the last bit."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from st_moe_pytorch import TopNGating
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
