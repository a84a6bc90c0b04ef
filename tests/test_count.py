"""Parameters and operations, against sums by hand."""

from itertools import combinations

import pytest
import torch
from torch import nn

from st_moe_pytorch import Expert, MoE, SparseMoEBlock, TopNGating
from st_moe_pytorch.tools.count import count_parameters, flops_per_token

DIM = 16


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


def by_enumeration(moe):
    """Mean over all sets of experts of the parameters that a token uses, each once."""
    rest = size(moe.gate) + (size(moe.shared_expert) if moe.shared_expert is not None else 0)
    sets = list(combinations(moe.experts.experts, moe.gate.top_n))
    return rest + sum(len_of({p for expert in chosen for p in expert.parameters()}) for chosen in sets) / len(sets)


def len_of(parameters):
    return sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize("top_n", [1, 2, 3])
def test_a_token_uses_its_experts_and_all_else(top_n):
    moe = MoE(DIM, 5, gating_top_n=top_n, shared_expert=nn.Linear(DIM, DIM))
    model = nn.ModuleList([nn.Embedding(10, DIM), SparseMoEBlock(moe)])
    others = size(model) - 5 * size(moe.experts.experts[0])
    assert count_parameters(model) == (size(model), others + top_n * size(moe.experts.experts[0]))


def test_different_experts_and_those_with_parameters_in_common():
    experts = [Expert(DIM, 1 + i) for i in range(4)]
    experts[2].net[2].weight = experts[1].net[2].weight = nn.Parameter(torch.ones(DIM, 10))
    for expert in experts:
        expert.adapter = nn.Linear(DIM, 3) if expert is experts[0] else experts[0].adapter
    moe = MoE(DIM, 4, experts=experts)
    assert count_parameters(moe) == (size(moe), round(by_enumeration(moe)))
    tied = nn.ModuleDict({"moe": moe, "elsewhere": experts[3]})
    more = size(experts[3]) - size(experts[3].adapter)
    assert count_parameters(tied) == (size(moe), round(by_enumeration(moe) + more / 2))


def test_experts_of_another_make():
    moe = MoE(DIM, 4)
    moe.experts = nn.Bilinear(4, DIM, DIM)
    assert count_parameters(moe) == (size(moe), size(moe.gate) + size(moe.experts) // 2)


def test_gates_without_top_n_are_refused():
    moe = MoE(DIM, 4)
    moe.gate = nn.Linear(DIM, 4)
    with pytest.raises(ValueError, match="gates must have top_n, choices of a token, got a Linear without"):
        count_parameters(moe)


def dropless(top_n, train=True):
    gate = TopNGating(DIM, 8, top_n=top_n, policy_train="all", capacity_factor_train=None)
    return MoE(DIM, 8, gate=gate, experts=[Expert(DIM) for _ in range(8)])


HIDDEN = int(DIM * 8 / 3)
EXPERT = 2 * 3 * DIM * HIDDEN  # three matrices
ROUTER = 2 * DIM * 8


@pytest.mark.parametrize("top_n", [1, 2, 3])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operations_of_a_layer(top_n, device):
    moe, x = dropless(top_n).to(device), torch.randn(2, 500, DIM, device=device)
    spare = EXPERT / 1000 if device == "meta" else 0  # nobody's row
    flops = flops_per_token(moe, x)
    assert flops.forward == pytest.approx(ROUTER + top_n * EXPERT + spare, rel=1e-12)
    inputs = ROUTER  # no gradient of x through the router, nor through the first matrix of experts that run one by one
    first = 0 if device == "meta" else top_n * EXPERT * 2 / 3
    with_inputs = flops_per_token(moe, x.requires_grad_())
    assert with_inputs.backward == pytest.approx(2 * (ROUTER + top_n * EXPERT + spare), rel=1e-12)
    assert flops.backward <= with_inputs.backward - inputs
    assert flops.backward >= with_inputs.backward - inputs - first
    assert all(parameter.grad is None for parameter in moe.parameters())


def test_capacity_counts_what_it_keeps_on_data_and_all_slots_without():
    with torch.device("meta"):
        moe, x = MoE(DIM, 8, capacity_factor_train=1.0), torch.empty(1, 800, DIM)
    assert flops_per_token(moe, x).forward == pytest.approx(ROUTER + EXPERT * 801 / 800, rel=1e-12)
    moe = MoE(DIM, 8, capacity_factor_train=1.0)
    torch.manual_seed(0)
    x = torch.randn(1, 800, DIM) + torch.randn(DIM)  # alike, so that some experts are full and others not
    torch.manual_seed(1)
    kept = moe.gate.route(x).kept.sum().item()
    torch.manual_seed(1)
    assert flops_per_token(moe, x=x).forward == pytest.approx(ROUTER + EXPERT * kept / 800, rel=1e-12)
    assert kept < 800


def test_ids_are_tokens_and_frozen_parameters_take_less():
    model = nn.Sequential(nn.Embedding(10, DIM), nn.Linear(DIM, 8), nn.Linear(8, 4))
    ids = torch.zeros(2, 6, dtype=torch.long)
    forward = 2 * (DIM * 8 + 8 * 4)
    assert flops_per_token(model, ids) == (forward, 2 * forward)
    with torch.no_grad():
        assert flops_per_token(model, ids) == (forward, 2 * forward)
    model[:2].requires_grad_(False)
    assert flops_per_token(model, ids) == (forward, 2 * 8 * 4)
    assert flops_per_token(model.requires_grad_(False), ids) == (forward, 0)
