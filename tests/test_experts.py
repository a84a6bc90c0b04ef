"""Experts and the layers they are made of."""

import math

import pytest
import torch
from oracles import assert_close
from torch import nn

from st_moe_pytorch import GEGLU, Expert, Experts, RMSNorm


def test_geglu_and_norm_are_their_equations():
    x = torch.randn(3, 8, dtype=torch.float64)
    geglu = GEGLU(4).double()
    assert torch.equal(geglu.mult_bias, torch.ones(4, dtype=torch.float64))
    nn.init.normal_(geglu.mult_bias)
    gate = x[:, 4:]
    expected = 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2))) * x[:, :4] * geglu.mult_bias
    assert_close(geglu(x), expected)
    assert list(GEGLU(4, mult_bias=False).parameters()) == []

    norm = RMSNorm(8).double()
    nn.init.normal_(norm.gamma)
    assert_close(norm(x), x / x.square().mean(-1, keepdim=True).sqrt() * norm.gamma)


@pytest.mark.parametrize(("dim", "mult", "hidden"), [(32, 4, 85), (512, 4, 1365), (6, 1, 4), (10, 2.5, 16)])
def test_hidden_width(dim, mult, hidden):
    expert = Expert(dim, mult)
    assert expert.net[0].out_features == 2 * hidden
    assert expert.net[2].in_features == hidden


def test_initial_values_are_uniform_by_output_width():
    for linear in (m for m in Expert(64).modules() if isinstance(m, nn.Linear)):
        bound = linear.out_features**-0.5
        for parameter in linear.parameters():
            assert parameter.abs().max() <= bound
            assert parameter.abs().max() > 0.8 * bound
            assert abs(parameter.std() * math.sqrt(3) / bound - 1) < 0.2


@pytest.mark.parametrize("prenorm", [True, False])
def test_dropout_acts_on_hidden_units_and_leaves_checkpoints_alone(prenorm):
    plain, dropped = Expert(16, prenorm=prenorm), Expert(16, prenorm=prenorm, dropout=0.5)
    assert list(plain.state_dict()) == list(dropped.state_dict())
    dropped.load_state_dict(plain.state_dict())
    x = torch.randn(4, 16)
    assert not torch.equal(dropped(x), dropped(x))
    assert torch.equal(dropped.eval()(x), plain(x))

    # with all hidden units dropped, only the last bias is left
    silent = Expert(16, prenorm=prenorm, dropout=1.0)
    assert torch.equal(silent(x), silent.net[-1].bias.expand(4, 16))


class Recorder(nn.Module):
    """Multiplies by its number and remembers the shapes it saw."""

    def __init__(self, number):
        super().__init__()
        self.number, self.shapes = number, []

    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        return x * self.number


def test_rows_go_to_the_expert_that_owns_them_in_three_dimensions():
    experts = Experts([Recorder(i) for i in range(4)])
    rows = torch.ones(6, 3)
    assert experts(rows, torch.tensor([2, 0, 1, 3]))[:, 0].tolist() == [0, 0, 2, 3, 3, 3]
    assert [expert.shapes for expert in experts.experts] == [[(1, 2, 3)], [(1, 0, 3)], [(1, 1, 3)], [(1, 3, 3)]]


@pytest.mark.parametrize("is_distributed", [None, False])
def test_slots_go_to_their_expert(is_distributed):
    experts = Experts([Recorder(i) for i in range(4)])
    slots = experts(torch.ones(2, 4, 5, 3), is_distributed)
    assert slots.shape == (2, 4, 5, 3)
    assert slots[1, :, 2, 0].tolist() == [0, 1, 2, 3]
    assert experts.experts[1].shapes == [(2, 5, 3)]
    assert torch.equal(experts(torch.ones(2, 4, 5, 3), is_distributed=is_distributed), slots)


def test_every_parameter_gets_a_gradient_even_without_tokens():
    experts = Experts([Expert(4) for _ in range(3)])
    experts(torch.randn(5, 4), torch.tensor([0, 5, 0])).sum().backward()
    for number, expert in enumerate(experts.experts):
        for parameter in expert.parameters():
            assert (parameter.grad == 0).all() if number != 1 else parameter.grad.abs().max() > 0
