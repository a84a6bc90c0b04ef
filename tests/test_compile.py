"""torch.compile in one graph and torch.export: the numbers of eager mode."""

import io
import warnings

import pytest
import torch
from oracles import assert_close, gradients
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from st_moe_pytorch import Expert, ExpertChoiceGating, MoE, SparseMoEBlock, TopNGating

pytestmark = pytest.mark.compile


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(**kwargs) -> MoE:
    gate = TopNGating(8, 2, **{"policy_train": "threshold", **kwargs})
    return MoE(8, 2, gate=gate, experts=[nn.Linear(8, 8), Expert(8, 1)]).double()


def test_training_with_all_settings():
    settings = {
        "policy_train": "all",
        "capacity_factor_train": None,
        "group_size": 6,
        "priority": "gate",
        "second_place_loss": True,
    }
    check_compiled(build(**settings), "aot_eager")


def alike(capacity_factor, dtype) -> MoE:
    """A layer whose experts share their products in compiled code."""
    moe = MoE(8, 4, gate=TopNGating(8, 4, policy_train="threshold", capacity_factor_train=capacity_factor))
    for parameter in moe.experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return moe.to(dtype)


def check_lengths(moe: MoE, backend: str, dtype: torch.dtype, rtol: float) -> None:
    """Outputs and all gradients of eager mode, in one graph for all data, and one more for all lengths."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(moe, fullgraph=True, backend=counter)
    for length, graphs in ((20, 1), (20, 1), (33, 2), (47, 2), (24, 2), (20, 2)):
        x = torch.randn(2, length, 8, dtype=dtype, requires_grad=True)
        inputs, cotangent = [x, *moe.parameters()], torch.randn_like(x)
        found = []
        for run in (compiled, moe):
            outputs, total, *_ = run(x)
            found.append([outputs, *torch.autograd.grad((outputs * cotangent).sum() + total, inputs)])
        for actual, expected in zip(*found, strict=True):
            assert_close(actual.double(), expected.double(), rtol)
        assert counter.frame_count == graphs


@pytest.mark.parametrize("capacity_factor", [1.0, None])
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.06)], ids=str
)
def test_rows_compile_in_every_dtype(dtype, rtol, capacity_factor):
    check_lengths(alike(capacity_factor, dtype), "aot_eager", dtype, rtol)


@pytest.mark.slow
def test_rows_by_inductor():
    check_lengths(alike(1.0, torch.float32), "inductor", torch.float32, 1e-5)


def test_empty_slots_of_compiled_experts_hold_tokens():
    """Experts that differ run on slots, of which empty ones hold neither zeros nor padding.

    A logarithm has no value at the zeros of an empty slot, and padding is no token to fill it with.
    """

    class Logarithm(nn.Module):
        def forward(self, x):
            return x.square().log()

    moe = MoE(
        8,
        2,
        gate=TopNGating(8, 2, policy_train="all"),
        experts=[Logarithm(), nn.Sequential(Logarithm(), nn.Linear(8, 8))],
    ).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    mask = torch.tensor([[False] + [True] * 8, [False] * 9])
    x = x.masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
    inputs, cotangent = [x, *moe.parameters()], torch.randn_like(x)
    expected, actual = (
        run(x, mask=mask).outputs for run in (moe, torch.compile(moe, fullgraph=True, backend="aot_eager"))
    )
    assert_close(actual, expected)
    for pair in zip(*(torch.autograd.grad((y * cotangent).sum(), inputs) for y in (actual, expected)), strict=True):
        assert_close(*pair, may_vanish=True)


def test_groups_that_divide_badly_compile_without_their_warning():
    moe = build(group_size=8).eval()
    x = torch.randn(1, 17, 8, dtype=torch.float64)
    with pytest.warns(UserWarning, match="groups have 1 tokens"):
        expected = moe(x).outputs
    assert_close(torch.compile(moe, fullgraph=True, backend="eager")(x).outputs, expected)


@pytest.mark.slow
def test_evaluation_by_inductor():
    moe = build(top_n=1).eval()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        assert_close(torch.compile(moe, fullgraph=True)(x).outputs, moe(x).outputs)


def test_block_with_coordinate_descent():
    block = SparseMoEBlock(build(differentiable_topk=True, straight_through_dispatch_tensor=False)).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    assert_close(torch.compile(block, fullgraph=True, backend="eager")(x).outputs, block(x).outputs)


def check_compiled(block: MoE | SparseMoEBlock, backend: str) -> None:
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 9) < 0.8
    expected = block(x, mask=mask)
    actual = torch.compile(block, fullgraph=True, backend=backend)(x, mask=mask)
    inputs, cotangent = [x, *block.parameters()], torch.randn_like(x)
    for value, wanted in zip(actual, expected, strict=True):
        assert_close(value, wanted, may_vanish=not block.training)

    def all_gradients(result):
        loss = (result.outputs * cotangent).sum() + result.total_aux_loss
        return gradients(loss, torch.tensor(1.0), inputs)

    for (name, _), gradient, wanted in zip(
        [("x", x), *block.named_parameters()], all_gradients(actual), all_gradients(expected), strict=True
    ):
        assert_close(gradient, wanted, may_vanish="experts" in name or "to_gates" in name)


def test_random_policy_follows_the_seed_and_all_new_lengths_share_a_graph():
    moe, graphs = build(policy_train="random", threshold_train=1), []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(moe, fullgraph=True, backend=counting)
    for length, expected_graphs in ((9, 1), (9, 1), (12, 2), (7, 2), (30, 2), (2, 2), (1, 3), (1, 3), (12, 3)):
        x = torch.randn(2, length, 8, dtype=torch.float64)
        torch.manual_seed(length)
        expected = moe(x).outputs
        torch.manual_seed(length)
        assert_close(compiled(x).outputs, expected)
        assert len(graphs) == expected_graphs


@pytest.mark.parametrize("make", [lambda: alike(1.0, torch.float64), build])
def test_compiled_gradients_of_functions_are_those_of_autograd(make):
    moe, x = make(), torch.randn(2, 12, 8, dtype=torch.float64)
    cotangent, parameters = torch.randn_like(x), dict(moe.named_parameters())

    def loss(parameters, x):
        outputs, total, *_ = torch.func.functional_call(moe, parameters, (x,))
        return (outputs * cotangent).sum() + total

    compiled = torch.compile(torch.func.grad(loss, argnums=(0, 1)), fullgraph=True, backend="aot_eager")
    of_parameters, of_x = compiled({name: p.detach() for name, p in parameters.items()}, x)
    x.requires_grad_()
    expected = torch.autograd.grad(loss(parameters, x), [*parameters.values(), x])
    for actual, wanted in zip([*of_parameters.values(), of_x], expected, strict=True):
        assert wanted.norm() > 1e-9
        assert_close(actual, wanted, 1e-9)


def assert_compiled_as_eager(compiled, moe, *arguments):
    found = []
    for run in (compiled, moe):
        torch.manual_seed(0)
        found.append(run(*arguments))
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("make", [build, lambda **_: MoE(8, 4, gate=ExpertChoiceGating(8, 4)).double()])
@pytest.mark.parametrize("dynamic", [None, True])
def test_numbers_that_change_are_compiled_again(make, dynamic):
    moe, x = make(), torch.randn(2, 32, 8, dtype=torch.float64)
    compiled = torch.compile(moe, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    dropped = set()
    for factor in (1.0, 1.5, None, 0.3, 1.0):
        moe.gate.capacity_factor_train = factor
        assert_compiled_as_eager(compiled, moe, x)
        dropped.add(int(moe.gate.route(x).kept.sum()))
    assert len(dropped) > 2
    for coefficient in (0.1, 0.2, 0.3):
        moe.balance_loss_coef = moe.router_z_loss_coef = coefficient
        assert_compiled_as_eager(compiled, moe, x)
    for noise_mult in (1.0, 0.9, 0.8):
        assert_compiled_as_eager(compiled, moe, x, True, noise_mult)


def test_layers_of_other_capacities_are_compiled_by_themselves():
    x = torch.randn(2, 32, 8, dtype=torch.float64)
    for factor in (1.0, 1.5, 0.3):
        layer = build(capacity_factor_train=factor)
        assert_compiled_as_eager(torch.compile(layer, fullgraph=True, backend="aot_eager"), layer, x)


def test_overridden_gates_compile():
    class Gate(TopNGating):
        def forward(self, x, noise_gates=False, noise_mult=1.0):
            return super().forward(x, noise_gates, noise_mult)

    moe = MoE(8, 2, gate=Gate(8, 2), experts=[nn.Linear(8, 8) for _ in range(2)]).double().eval()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    with pytest.warns(UserWarning, match="quadratic"):
        expected = moe(x).outputs
    assert_close(torch.compile(moe, fullgraph=True, backend="eager")(x).outputs, expected)


@pytest.mark.parametrize("capacity_factor", [2.0, None])
@pytest.mark.parametrize("experts", ["alike", "different"])
def test_exported_evaluation_is_saved_and_loaded_for_any_length(experts, capacity_factor):
    layer = build() if experts == "different" else alike(None, torch.float64)
    layer.gate.capacity_factor_eval = capacity_factor
    block = SparseMoEBlock(layer).double().eval()
    x, mask = torch.randn(2, 9, 8, dtype=torch.float64), torch.rand(2, 9) < 0.8
    shapes = {"x": {1: torch.export.Dim.DYNAMIC}, "mask": {1: torch.export.Dim.DYNAMIC}}
    file = io.BytesIO()
    torch.export.save(torch.export.export(block, (x,), {"mask": mask}, dynamic_shapes=shapes), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for length in (9, 4, 30):
        x, mask = torch.randn(2, length, 8, dtype=torch.float64), torch.rand(2, length) < 0.8
        actual = loaded(x, mask=mask)
        assert_close(actual.outputs, block(x, mask=mask).outputs)
        assert actual.total_aux_loss.item() == 0.0


@pytest.mark.parametrize("experts", ["alike", "different"])
def test_traced_layers_do_not_depend_on_the_data_they_were_traced_with(experts):
    moe = (build() if experts == "different" else alike(None, torch.float64)).eval().requires_grad_(False)
    x, other = torch.randn(2, 2, 9, 8, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated, and warns of shapes
        traced = torch.jit.trace(lambda x: moe(x).outputs, x, check_trace=False)
    assert_close(traced(other), moe(other).outputs)
