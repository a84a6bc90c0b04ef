"""Experts and the layers they are made of."""

import math

import numpy as np
import pytest
import torch
from oracles import assert_close
from torch import nn

from st_moe_pytorch import GEGLU, Expert, Experts, MoE, RMSNorm
from st_moe_pytorch.layers import gated_unit


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


@pytest.mark.parametrize("tokens", [3, 70_000])
def test_results_of_geglu_have_the_dtype_of_its_input(tokens):
    geglu = GEGLU(4)
    z = torch.randn(tokens, 8, dtype=torch.bfloat16, requires_grad=True)
    geglu(z).float().sum().backward()
    assert geglu(z).dtype == z.grad.dtype == torch.bfloat16
    assert geglu.mult_bias.grad.dtype == torch.float32


@pytest.mark.parametrize(("dim", "mult", "hidden"), [(32, 4, 85), (512, 4, 1365), (6, 1, 4), (10, 2.5, 16)])
def test_hidden_width(dim, mult, hidden):
    expert = Expert(dim, hidden_mult=mult)
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
    assert experts(rows, torch.tensor([2, 2, 3, 6], dtype=torch.int32))[:, 0].tolist() == [0, 0, 2, 3, 3, 3]
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
    experts(torch.randn(5, 4), torch.tensor([0, 5, 5], dtype=torch.int32)).sum().backward()
    for number, expert in enumerate(experts.experts):
        for parameter in expert.parameters():
            assert (parameter.grad == 0).all() if number != 1 else parameter.grad.abs().max() > 0


def rows_to(*counts, dim=4):
    """Rows for experts of so many each, and nobody's."""
    return torch.randn(sum(counts) + 1, dim, requires_grad=True), torch.tensor(counts).cumsum(0).to(torch.int32)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(4, 4, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


class Convolution(nn.Module):
    """Refuses sequences shorter than its kernel."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3)

    def forward(self, x):
        return nn.functional.pad(self.conv(x.transpose(1, 2)), (1, 1)).transpose(1, 2)


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(x[0])[None]


@pytest.mark.parametrize("kind", [Recurrent, Convolution, Normalised])
@pytest.mark.parametrize("counts", [(0, 5, 0), (4, 0, 4)])
def test_experts_that_cannot_run_on_no_tokens_are_passed_over_with_gradients_of_zero(kind, counts):
    experts = Experts([kind() for _ in range(3)])
    x, offsets = rows_to(*counts)
    experts(x, offsets)[:-1].square().sum().backward()
    for count, expert in zip(counts, experts.experts, strict=True):
        for parameter in expert.parameters():
            assert (parameter.grad == 0).all() if count == 0 else parameter.grad.abs().max() > 0
    with torch.no_grad():
        assert experts(x, offsets).shape == x.shape


@pytest.mark.parametrize("kind", [Recurrent, Convolution, Normalised])
def test_where_nobody_has_tokens_the_error_says_what_experts_need(kind):
    try:
        kind()(torch.empty(1, 0, 4))
    except Exception:
        with pytest.raises(
            RuntimeError, match="experts must be able to run on no tokens where none of them has any"
        ) as caught:
            Experts([kind()])(*rows_to(0))
        assert caught.value.__cause__.__notes__ == ["This was expert 0, called with tokens of shape (1, 0, 4)."]
    else:
        assert Experts([kind()])(*rows_to(0)).shape == (1, 4)


class Failing(nn.Module):
    def forward(self, x):
        raise ZeroDivisionError("oh")


def test_an_error_of_an_expert_names_it():
    with pytest.raises(ZeroDivisionError) as caught:
        Experts([nn.Identity(), Failing()])(*rows_to(2, 3))
    assert caught.value.__notes__ == ["This was expert 1, called with tokens of shape (1, 3, 4)."]


def test_without_gradients_idle_experts_run_only_with_hooks_or_if_all_are():
    experts, hooked = Experts([Recorder(i) for i in range(4)]), []
    experts.experts[2].register_forward_pre_hook(lambda module, args: hooked.append(args[0].shape))
    with torch.no_grad():
        experts(*rows_to(0, 3, 0, 0))
        assert [expert.shapes for expert in experts.experts] == [[], [(1, 3, 4)], [(1, 0, 4)], []]
        assert hooked == [(1, 0, 4)]
        assert experts(*rows_to(0, 0, 0, 0)).shape == (1, 4)
    assert [len(expert.shapes) for expert in experts.experts] == [1, 1, 2, 0]


def test_an_expert_that_changes_its_input_is_named():
    experts = Experts([nn.Identity(), nn.ReLU(inplace=True)])
    rows, offsets = rows_to(2, 3)
    with pytest.raises(RuntimeError, match="inplace") as caught:
        experts(rows * 1, offsets)
    assert "This was expert 1" in caught.value.__notes__[0]
    with torch.no_grad():
        assert torch.equal(experts(rows.clone(), offsets)[2:5], rows[2:5].relu())


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (
            torch.tensor([2, 3]),
            "offsets must have shape and dtype .*int32: where the rows of each expert end, not how many.*int64",
        ),
        (torch.tensor([5], dtype=torch.int32), r"offsets must have shape and dtype \(2,\)"),
        (
            torch.tensor([3, 2], dtype=torch.int32),
            r"offsets must not decrease, nor go beyond the 5 rows of x, got \[3, 2\]",
        ),
        (torch.tensor([3, 6], dtype=torch.int32), r"beyond the 5 rows of x, got \[3, 6\]"),
    ],
)
def test_offsets_are_checked(offsets, message):
    with pytest.raises(ValueError, match=message):
        Experts([nn.Identity(), nn.Identity()])(torch.randn(5, 4), offsets)


def test_layouts_of_other_ranks_are_refused():
    experts = Experts([nn.Identity(), nn.Identity()])
    with pytest.raises(ValueError, match=r"x must be rows \(t, width\) where offsets are given, got \(1, 5, 4\)"):
        experts(torch.randn(1, 5, 4), torch.tensor([2, 5], dtype=torch.int32))
    with pytest.raises(
        ValueError, match=r"x must have shape \(batch, 2, slots, width\) without offsets, got \(1, 3, 5, 4\)"
    ):
        experts(torch.randn(1, 3, 5, 4))


@pytest.mark.parametrize("strategy", [3, None])
def test_what_is_no_strategy_is_refused(strategy):
    with pytest.raises(ValueError, match="strategy must be one of 'all_to_all', 'all_gather', got"):
        Experts([nn.Identity()], strategy=strategy)


def test_sizes_and_settings_may_be_numpys_or_tensors():
    moe = MoE(np.int64(8), np.int32(4), np.float32(2), gating_top_n=np.int64(1), balance_loss_coef=torch.tensor(0.5))
    _, total, balance, z = moe(torch.randn(1, 9, 8))
    assert_close(total, 0.5 * balance + 1e-3 * z, 1e-6)
    with pytest.raises(TypeError):
        MoE("8")


def test_tokens_of_inference_mode_work_where_nothing_is_differentiated():
    moe = MoE(8, 4).eval()
    with torch.inference_mode():
        x = torch.randn(1, 9, 8)
        expected = moe(x).outputs
    with torch.no_grad():
        assert torch.equal(moe(x).outputs, expected)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        moe(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_token_of_zeros_has_a_norm_and_gradients(dtype):
    norm, x = RMSNorm(8).to(dtype), torch.zeros(3, 8, dtype=dtype, requires_grad=True)
    y = norm(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert not y.any()
    assert x.grad.isfinite().all()
    assert norm.gamma.grad.isfinite().all()


REFERENCE = {
    "gelu": lambda gate: gate * 0.5 * (1 + torch.erf(gate / 2**0.5)),
    "gelu_tanh": lambda gate: gate * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))),
    "silu": lambda gate: gate / (1 + torch.exp(-gate)),
}


@pytest.mark.parametrize("activation", REFERENCE)
@pytest.mark.parametrize("small", [0, 2**18])
def test_activations_are_their_definitions(activation, small, monkeypatch):
    monkeypatch.setattr("st_moe_pytorch.layers.SMALL", small)
    layer = GEGLU(4, activation=activation).double()
    nn.init.normal_(layer.mult_bias)
    z = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    x, gate = z.chunk(2, dim=-1)
    expected, cotangent = x * REFERENCE[activation](gate) * layer.mult_bias, torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(z), expected, rtol=1e-12, atol=1e-14)
    for leaf in (z, layer.mult_bias):
        found, wanted = (torch.autograd.grad(y, leaf, cotangent, retain_graph=True)[0] for y in (layer(z), expected))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    assert f"activation='{activation}'" in repr(layer)


@pytest.mark.parametrize("activation", REFERENCE)
@pytest.mark.parametrize("mult_bias", [True, False])
def test_geglu_keeps_its_input_only_and_has_all_derivatives(mult_bias, activation, monkeypatch):
    monkeypatch.setattr("st_moe_pytorch.layers.SMALL", 0)
    geglu = GEGLU(3, mult_bias, activation=activation).double()
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True) if mult_bias else 1.0
    z = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    inputs = (z, bias) if mult_bias else (z,)

    def function(z, bias=1.0):
        return gated_unit(z, bias, activation)

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        geglu(z)
    assert sum(t.numel() for t in kept) == z.numel() + (3 if mult_bias else 0)


class Viewing(nn.Module):
    """As Conv1D of transformers, which GPT-2 has."""

    def forward(self, x):
        return x.view(-1, x.shape[-1]).sin().view(x.shape)


def test_experts_on_slots_get_tokens_in_one_piece():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(Experts([Viewing() for _ in range(3)])(x), x.sin())


def test_rows_without_tokens_of_the_others_are_by_name_too():
    experts = Experts([nn.Identity(), nn.Identity()])
    x, offsets = rows_to(2, 1)
    assert torch.equal(experts(x, offsets=offsets, is_distributed=False)[:3], x[:3])
