"""Bad input ends in an error that names the argument, its value and the fix, and leaves the layer as it was."""

import copy

import pytest
import torch
from torch import nn

from st_moe_pytorch import GEGLU, Expert, Experts, MoE, RMSNorm, SparseMoEBlock, TopNGating

X = torch.randn(2, 5, 8)
MASK = torch.ones(2, 5, dtype=torch.bool)

BAD_CALLS = {
    "width": (lambda m: m(torch.randn(2, 5, 7)), r"x must have shape \(batch, tokens, 8\).*\(2, 5, 7\)"),
    "rank": (lambda m: m(torch.randn(8)), r"x must have shape .*\(8,\)"),
    "integers": (lambda m: m(torch.ones(2, 5, 8, dtype=torch.long)), r"x must be .*torch.int64.*x.float\(\)"),
    "complex": (lambda m: m(X + 0j), r"x must be a real .*torch.complex64"),
    "mask shape": (lambda m: m(X, mask=MASK[:, :4]), r"mask must be .*\(2, 5\).*\(2, 4\)"),
    "mask of tokens": (lambda m: m(X, mask=MASK[..., None]), r"mask must be .*\(2, 5, 1\)"),
    "mask dtype": (lambda m: m(X, mask=MASK.float()), r"mask must be a bool tensor.*torch.float32"),
    "route_by shape": (lambda m: m(X, route_by=X[:1]), r"route_by must be .*\(2, 5, 8\).*\(1, 5, 8\)"),
    "route_by dtype": (lambda m: m(X, route_by=X.long()), r"route_by must be .*torch.int64"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.parametrize("kind", [MoE, SparseMoEBlock])
def test_bad_tokens(kind, name):
    call, message = BAD_CALLS[name]
    moe = MoE(8, 4)
    with pytest.raises(ValueError, match=message):
        call(moe if kind is MoE else SparseMoEBlock(moe))


def test_bad_calls_of_the_gate():
    gate = TopNGating(8, 4)
    with pytest.raises(ValueError, match=r"x must have shape \(batch, tokens, 8\) here, got \(5, 8\)"):
        gate.route(X[0])
    with pytest.raises(ValueError, match=r"draws must have .*\(2, 5, 2\).*\(2, 5, 3\)"):
        gate.route(X, draws=torch.rand(2, 5, 3))
    with pytest.raises(ValueError, match=r"draws must have .*\(2, 5, 2\).*\(5, 2, 2\)"):
        gate.route(X, draws=torch.rand(5, 2, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_gates=4, top_n=5), r"top_n must be at most the number of experts.*5 of 4"),
        (dict(top_n=0), "top_n must be a positive number, got 0"),
        (dict(dim=0), "dim must be a positive number, got 0"),
        (dict(dim=-3), "dim must be a positive number, got -3"),
        (dict(num_gates=0), "num_gates must be a positive number, got 0"),
        (dict(eps=0.0), "eps must be"),
        (dict(group_size=0), "group_size must be a positive number, got 0"),
        (dict(min_expert_capacity=0), "min_expert_capacity must be a positive number, got 0"),
        (dict(capacity_factor_train=0), "capacity_factor_train must be a positive number, got 0"),
        (dict(capacity_factor_train=-1.0), "capacity_factor_train must be a positive number, got -1.0"),
        (dict(capacity_factor_eval=float("nan")), "capacity_factor_eval must be a positive number, got nan"),
        (dict(capacity_factor_eval=float("inf")), "capacity_factor_eval must be a positive number, got inf"),
        (dict(threshold_train=-0.1), r"threshold_train must lie in \[0, 1\], got -0.1"),
        (dict(threshold_eval=1.5), r"threshold_eval must lie in \[0, 1\], got 1.5"),
        (dict(threshold_eval=float("nan")), r"threshold_eval must lie in \[0, 1\], got nan"),
        (dict(threshold_train=(0.1, 0.2)), r"threshold_train must be a number or 1 numbers.*\(0.1, 0.2\)"),
        (dict(top_n=3, threshold_eval=[0.1]), r"threshold_eval must be a number or 2 numbers.*\[0.1\]"),
        (dict(policy_train="argmax"), "policy_train must be one of 'all', 'none', 'threshold', 'random', got 'argmax'"),
        (dict(policy_eval="Random"), "policy_eval must be one of .* got 'Random'"),
        (dict(priority="probability"), "priority must be one of 'position', 'token', 'gate', got 'probability'"),
        (dict(jitter=1.0), r"jitter must lie in \[0, 1\), got 1.0"),
        (dict(jitter=float("nan")), r"jitter must lie in \[0, 1\), got nan"),
        (dict(top_n=3, threshold_train=torch.tensor([0.1, 1.2])), r"threshold_train must lie in \[0, 1\], got tensor"),
        (dict(top_n=1, second_place_loss=True), "second_place_loss needs a second choice.*top_n to at least 2, got 1"),
    ],
    ids=str,
)
def test_bad_gates(arguments, message):
    with pytest.raises(ValueError, match=message):
        TopNGating(**{"dim": 8, "num_gates": 4, **arguments})


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: TopNGating("8", 4), "dim"),
        (lambda: TopNGating(8, 4, threshold_train="0.2"), "threshold_train"),
        (lambda: MoE(8, num_experts=4.0), "num_experts"),
        (lambda: MoE(8, 4, experts=Expert(8)), "experts"),
        (lambda: SparseMoEBlock(nn.Linear(8, 8)), "moe"),
    ],
)
def test_wrong_types(build, name):
    with pytest.raises(TypeError, match=name):
        build()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MoE(8, 0), "num_experts must be a positive number, got 0"),
        (lambda: MoE(8, 4, gating_top_n=6), "top_n .*6 of 4"),
        (lambda: MoE(8, 4, 0), "hidden_mult must be a positive number, got 0"),
        (lambda: MoE(8, 4, experts=[Expert(8)] * 3), "experts must hold num_experts=4 modules, got 3"),
        (lambda: MoE(8, 4, experts=[]), "experts must hold at least one module"),
        (lambda: MoE(8, 4, gate=TopNGating(6, 4)), r"gate.dim must be 8 .* got 6"),
        (lambda: MoE(8, 4, gate=TopNGating(8, 5)), r"gate.num_gates must be 4 .* got 5"),
        (lambda: Expert(1, 1), "hidden_units must be a positive number, got 0"),
        (lambda: Expert(8, dropout=1.5), "dropout"),
        (lambda: RMSNorm(0), "dim must be a positive number, got 0"),
        (lambda: GEGLU(-1), "dim must be a positive number, got -1"),
        (lambda: Expert(8, activation="relu"), "activation must be one of 'gelu', 'gelu_tanh', 'silu', got 'relu'"),
        (lambda: Experts([]), "experts must hold at least one module"),
        (lambda: MoE.from_dense(nn.Linear(8, 8), 8, 4, top_n=2, gating_top_n=1), "must not both be given"),
        (lambda: MoE.from_dense(nn.Linear(8, 8), 8, 4, noise=float("nan")), "noise must be 0 or more, got nan"),
    ],
)
def test_bad_layers(build, message):
    with pytest.raises(ValueError, match=message):
        build()


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Summing(nn.Module):
    def forward(self, x):
        return x.sum(1)


@pytest.mark.parametrize("layout", ["rows", "slots"])
@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([nn.Identity(), Pair()], "expert 1 must map tokens .* to one tensor .* got tuple"),
        ([Summing(), nn.Identity()], r"expert 0 must map tokens .* got \(. ?,? ?8\)"),
        ([nn.Linear(8, 8), nn.Linear(8, 6)], r"experts must have outputs of equal width, got widths \[8, 6\]"),
    ],
)
def test_bad_experts(modules, message, layout):
    experts = Experts(modules)
    with pytest.raises(ValueError, match=message):
        experts(torch.randn(6, 8), torch.tensor([3, 6], dtype=torch.int32)) if layout == "rows" else experts(
            torch.randn(2, 2, 3, 8)
        )


def test_all_widths_of_experts_are_compared():
    experts = Experts([nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(8, 8)])
    with pytest.raises(ValueError, match=r"experts must have outputs of equal width, got widths \[8, 6, 8\]"):
        experts(torch.randn(6, 8), torch.tensor([3, 3, 6], dtype=torch.int32))


def test_a_block_needs_experts_that_keep_the_width():
    block = SparseMoEBlock(MoE(8, 2, experts=[nn.Linear(8, 6), nn.Linear(8, 6)]))
    with pytest.raises(ValueError, match=r"experts must keep the width of 8 in a block.* got 6"):
        block(X)


NAN = float("nan")
ASSIGNED = [
    ("policy_train", "always", "policy_train must be one of .*'always'"),
    ("policy_eval", None, "policy_eval must be one of .*None"),
    ("priority", "x", "priority must be one of 'position', 'token', 'gate', got 'x'"),
    ("capacity_factor_train", -1, "capacity_factor_train must be a positive number, got -1"),
    ("capacity_factor_eval", NAN, "capacity_factor_eval must be a positive number, got nan"),
    ("min_expert_capacity", -3, "min_expert_capacity must be a positive number, got -3"),
    ("min_expert_capacity", 2.5, "min_expert_capacity must be a whole number, got 2.5"),
    ("group_size", -4, "group_size must be a positive number, got -4"),
    ("group_size", 0, "group_size must be a positive number, got 0"),
    ("group_size", 2.5, "group_size must be a whole number, got 2.5"),
    ("top_n", 5, "top_n must be at most the number of experts: a token cannot choose 5 of 4"),
    ("top_n", 3, r"threshold_train must hold a number for each of top_n=3 choices, got shape \(2,\)"),
    (
        "threshold_train",
        torch.tensor([1e-9, NAN]),
        r"threshold_train must lie in \[0, 1\], got .*nan.*reset_parameters\(\)",
    ),
    ("threshold_train", torch.tensor([1e-9, -1.0]), r"threshold_train must lie in \[0, 1\], got .*-1.0"),
    ("threshold_train", torch.tensor([1e-9, 2.0]), r"threshold_train must lie in \[0, 1\], got .*2.0"),
    ("threshold_train", torch.tensor([1e-9]), r"threshold_train must hold .* shape \(1,\)"),
]


@pytest.mark.parametrize(("name", "value", "message"), ASSIGNED, ids=lambda value: str(value)[:30])
def test_settings_assigned_later_are_checked_when_they_are_read(name, value, message):
    moe = MoE(8, 4)
    setattr(moe.gate, name, value)
    with pytest.raises(ValueError, match=message):
        moe(X)


@pytest.mark.parametrize("name", ["balance_loss_coef", "router_z_loss_coef"])
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_weights_of_losses_are_finite(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a finite number, got {value}"):
        MoE(8, 4, **{name: value})
    moe = MoE(8, 4)
    setattr(moe, name, value)
    with pytest.raises(ValueError, match=f"{name} must be a finite number, got {value}"):
        moe(X)


def test_weights_that_are_tensors_are_not_looked_at():
    """That would wait for their device, and on the meta device there is nothing to see."""
    moe = MoE(8, 4, balance_loss_coef=torch.tensor(0.5, device="meta")).to("meta")
    assert moe(X.to("meta")).total_aux_loss.is_meta


def test_noise_has_a_finite_strength():
    for run in (MoE(8, 4), MoE(8, 4).gate.route, SparseMoEBlock(MoE(8, 4))):
        with pytest.raises(ValueError, match="noise_mult must be a finite number, got nan"):
            run(X, True, NAN)


@pytest.mark.parametrize(
    ("draws", "message"),
    [
        (torch.full((2, 3, 2), 7.0), r"draws must lie in \[0, 1\], got numbers from 7.0 to 7.0"),
        (torch.full((2, 3, 2), NAN), r"draws must lie in \[0, 1\], got numbers from nan"),
        (torch.full((2, 3, 2), -0.1), r"draws must lie in \[0, 1\]"),
        (torch.zeros(2, 3, 2, dtype=torch.int64), r"draws must be floating-point numbers in \[0, 1\], got torch.int64"),
        (torch.zeros(2, 3, 3), r"draws must have shape \(2, 3, 2\)"),
        (torch.zeros(2, 3, 2, device="meta"), "draws must be on x's device, cpu, got meta"),
    ],
)
def test_draws_are_uniform_numbers(draws, message):
    with pytest.raises(ValueError, match=message):
        MoE(8, 4)(torch.randn(2, 3, 8), draws=draws)
    if not draws.is_meta:
        with pytest.raises(ValueError, match=message):
            MoE(8, 4).gate.decide(torch.randn(2, 3, 4), draws=draws)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", [MoE, SparseMoEBlock])
def test_a_state_dict_for_another_top_n_is_refused_before_anything_is_loaded(kind, strict):
    def build(top_n):
        moe = MoE(8, 4, gating_top_n=top_n)
        return moe if kind is MoE else SparseMoEBlock(moe)

    layer, other = build(2), build(3)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"threshold_train .*\(3,\).*top_n=2: build it with top_n=3"):
        layer.load_state_dict(other.state_dict(), strict=strict)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())

    name = next(name for name in before if name.endswith("threshold_eval"))
    state = build(2).state_dict() | {name: torch.zeros(4)}
    with pytest.raises(RuntimeError, match=r"threshold_eval .*\(4,\).*top_n=2: build it with top_n=4"):
        layer.load_state_dict(state, strict=strict)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_weights_of_losses_that_are_tensors_are_not_looked_at():
    with torch.device("meta"):
        moe = MoE(8, 4, balance_loss_coef=torch.tensor(0.5))
        assert moe(torch.randn(1, 3, 8)).total_aux_loss.is_meta
