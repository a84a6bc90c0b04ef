"""The one product for all experts: definition, accelerators' kernel on CPU with poisoned memory, what may not grow."""

from collections import Counter
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch
from oracles import assert_close, gradients
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import st_moe_pytorch.grouped as grouped
from st_moe_pytorch import Expert, Experts, MoE, SparseMoEBlock
from st_moe_pytorch.experts import are_alike, run_shared
from st_moe_pytorch.grouped import grouped_linear, grouped_outer, grouped_product, stacked
from st_moe_pytorch.looped import looped_linear, looped_linear_backward

INTO, OUT = 5, 3


def problem(sizes=(2, 0, 3, 1), rest=3, scaled=True, dtype=torch.float64):
    """Rows of experts of these sizes and some that are nobody's, NaN but for the last one."""
    offsets = torch.tensor(sizes).cumsum(0).to(torch.int32)
    rows = torch.randn(sum(sizes) + rest, INTO, dtype=dtype)
    rows[sum(sizes) : len(rows) - 1] = torch.nan
    rows[sum(sizes) :][-1:] = 0

    def parameters(*shape):
        return [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in sizes]

    return rows.requires_grad_(), parameters(OUT, INTO), parameters(OUT), parameters(INTO) if scaled else [], offsets


def by_definition(rows, weights, biases, scales, offsets):
    starts, ends = [0, *offsets.tolist()], offsets.tolist()
    blocks = [rows[start:stop] for start, stop in zip(starts, ends, strict=False)]
    if scales:
        blocks = [block * scale for block, scale in zip(blocks, scales, strict=True)]
    parts = [torch.einsum("ti,oi->to", *pair) + bias for *pair, bias in zip(blocks, weights, biases, strict=True)]
    return torch.cat(parts)


@contextmanager
def kernel_on_cpu():
    """The branch for CUDA, by torch's product for CPU with CUDA's strides and NaN wherever CUDA writes nothing."""
    real = F.grouped_mm

    def grouped_mm(a, b, *, offs):
        assert offs.dtype == torch.int32
        assert len(offs) < 1024
        for t in (a, b):
            strides = sorted(t.stride())
            assert strides[0] == 1
            assert all(stride > 0 and stride * 2 % 16 == 0 for stride in strides[1:]), t.stride()
        y = real(a, b, offs=offs)
        y[slice(offs[-1], None) if b.ndim == 3 else offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        return y

    with patch.object(F, "grouped_mm", grouped_mm), patch.object(grouped, "_has_kernel", lambda *_: True):
        yield


@contextmanager
def nan_in_fresh_memory():
    torch.use_deterministic_algorithms(True)
    before, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("rest", [0, 1, 3])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(
    ("kernel", "dtype", "rtol"),
    [(False, torch.float64, 1e-12), (True, torch.float32, 1e-5), (True, torch.bfloat16, 3e-2)],
)
def test_product_is_its_definition(kernel, dtype, rtol, scaled, rest):
    rows, weights, biases, scales, offsets = problem(scaled=scaled, rest=rest, dtype=dtype)
    used = int(offsets[-1])
    with nan_in_fresh_memory(), kernel_on_cpu() if kernel else nullcontext():
        actual = grouped_linear(rows, weights, biases, scales, offsets)
        assert not rest or not actual[-1].any()
        cotangent = torch.randn_like(actual)
        cotangent[used:] = torch.nan
        if rest:
            cotangent[-1] = 0
        inputs = [rows, *weights, *biases, *scales]
        found = torch.autograd.grad(actual, inputs, cotangent)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    e = len(weights)
    expected = by_definition(wide[0], wide[1 : e + 1], wide[e + 1 : 2 * e + 1], wide[2 * e + 1 :], offsets)
    assert_close(actual[:used].double(), expected, rtol)
    wanted = gradients(expected, cotangent[:used].double(), wide)
    assert_close(found[0][:used].double(), wanted[0][:used], rtol)
    assert not rest or not found[0][-1].any()
    for got, theirs in zip(found[1:], wanted[1:], strict=True):
        assert_close(got.double(), theirs, rtol, may_vanish=True)
    assert all((got[1] == 0).all() for got in (found[1:][i : i + e] for i in range(0, len(found) - 1, e)))


@pytest.mark.parametrize("scaled", [True, False])
def test_derivatives_of_first_and_second_order(scaled):
    rows, weights, biases, scales, offsets = problem(scaled=scaled)
    rows = rows.detach().nan_to_num().requires_grad_()
    e = len(weights)

    def product(rows, *parameters):
        y = grouped_linear(rows, parameters[:e], parameters[e : 2 * e], parameters[2 * e :], offsets)
        return y[: offsets[-1]]

    inputs = (rows, *weights, *biases, *scales)
    assert torch.autograd.gradcheck(product, inputs)
    assert torch.autograd.gradgradcheck(product, inputs)


def test_gradients_of_rows_alone_cost_no_product_of_parameters():
    rows, weights, biases, scales, offsets = problem()
    frozen = [[t.detach() for t in tensors] for tensors in (weights, biases, scales)]
    y, frozen_y = grouped_linear(rows, weights, biases, scales, offsets), grouped_linear(rows, *frozen, offsets)
    cotangent = torch.randn_like(y).index_fill(0, torch.arange(offsets[-1], len(y)), 0)
    counted = {}
    for name, result in (("all", y), ("rows", frozen_y)):
        with FlopCounterMode(display=False) as counter:
            counted[name] = torch.autograd.grad(result, rows, cotangent)[0], counter.get_total_flops()
    assert torch.equal(counted["all"][0][: offsets[-1]], counted["rows"][0][: offsets[-1]])
    assert counted["all"][1] == 2 * counted["rows"][1] == 2 * 2 * len(rows) * INTO * OUT
    assert torch.autograd.gradgradcheck(
        lambda x: grouped_linear(x, *frozen, offsets)[:6], rows.detach().nan_to_num().requires_grad_()
    )


@pytest.mark.parametrize("scaled", [True, False])
def test_operators_are_what_torch_expects_of_them(scaled):
    rows, weights, biases, scales, offsets = problem(scaled=scaled)
    rows = rows.detach().nan_to_num().requires_grad_()
    with torch.no_grad():
        grad = torch.randn(len(rows), OUT, dtype=torch.float64)
    for tensors in (lambda t: t, lambda t: [p.detach() for p in t]):
        torch.library.opcheck(looped_linear, (rows, tensors(weights), tensors(biases), tensors(scales), offsets))
        for of_parameters in (True, False):
            arguments = (grad, rows.detach(), tensors(weights), tensors(scales), offsets, of_parameters)
            torch.library.opcheck(looped_linear_backward, arguments, test_utils=("test_schema", "test_faketensor"))


def test_operators_of_the_kernel_are_what_torch_expects_of_them():
    rows, weights, _, _, offsets = problem(sizes=(2, 0, 4), rest=2, dtype=torch.float32)
    rows, grad = (torch.randn(8, width, requires_grad=True) for width in (16, 8))
    matrices = torch.randn(3, 8, 16, requires_grad=True)
    for function, *arguments in (
        (stacked, weights, torch.float32),
        (grouped_product, rows, matrices, offsets),
        (grouped_outer, grad, rows, offsets),
    ):
        # what memory behind the last expert's rows holds differs from run to run, so that values are compared elsewhere
        torch.library.opcheck(
            function, tuple(arguments), test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
        )


@pytest.mark.parametrize("scaled", [True, False])
def test_second_derivatives_through_the_kernel_are_those_of_the_loop(scaled):
    problems = problem(scaled=scaled, dtype=torch.float32)
    offsets, used = problems[-1], int(problems[-1][-1])
    rows = problems[0].detach().nan_to_num()
    parameters = [[t.detach() for t in tensors] for tensors in problems[1:-1]]
    cotangents = [torch.randn(used, OUT), *(torch.randn_like(t) for tensors in ([rows], *parameters) for t in tensors)]
    cotangents[1][used:] = 0

    def run(kernel):
        leaves = [
            rows.clone().requires_grad_(),
            *(t.clone().requires_grad_() for tensors in parameters for t in tensors),
        ]
        e = len(offsets)
        given = leaves[1 : e + 1], leaves[e + 1 : 2 * e + 1], leaves[2 * e + 1 :]
        with kernel_on_cpu() if kernel else nullcontext():
            y = grouped_linear(leaves[0], *given, offsets)[:used].square()
            first = torch.autograd.grad(y, leaves, cotangents[0], create_graph=True)
            return torch.autograd.grad(first, leaves, cotangents[1:])

    for actual, expected in zip(run(kernel=True), run(kernel=False), strict=True):
        of_rows = actual.shape == rows.shape
        # an expert without rows has none, in one as in the other
        assert_close(*(t[:used] if of_rows else t for t in (actual, expected)), 1e-4, may_vanish=True)
        assert expected.any() or not of_rows


def alike(number=3, **options) -> Experts:
    experts = Experts([Expert(6, 2, **options) for _ in range(number)])
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    return experts


@contextmanager
def shared_products():
    with patch("st_moe_pytorch.experts.may_share_products", lambda t: True):
        yield


@pytest.mark.parametrize("options", [{}, {"prenorm": True}, {"mult_bias": False}], ids=str)
@pytest.mark.parametrize(
    ("kernel", "dtype", "rtol"),
    [(False, torch.float64, 1e-12), (True, torch.float32, 2e-5), (True, torch.bfloat16, 6e-2)],
)
def test_layer_with_shared_products_is_the_layer_of_modules(kernel, dtype, rtol, options):
    moe = MoE(6, 3, experts=alike(**options), capacity_factor_train=1.0)
    moe.gate.policy_train = "threshold"
    moe.to(dtype)
    x, mask = torch.randn(2, 9, 6, dtype=dtype, requires_grad=True), torch.rand(2, 9) < 0.8
    inputs, cotangent = [x, *moe.parameters()], torch.randn(2, 9, 6, dtype=dtype)

    def run():
        result = moe(x, mask=mask)
        return [
            result.outputs,
            *gradients((result.outputs * cotangent).sum() + result.total_aux_loss, torch.tensor(1.0), inputs),
        ]

    expected = run()
    with shared_products(), nan_in_fresh_memory(), kernel_on_cpu() if kernel else nullcontext():
        actual = run()
    for got, wanted in zip(actual, expected, strict=True):
        assert_close(got.double(), wanted.double(), rtol)


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 3, 1, 6), (0, 3, 4, 6)])
def test_slots_through_shared_products_too(shape):
    experts = alike().double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = experts(x)
    with shared_products():
        actual = experts(x)
    inputs, cotangent = [x, *experts.parameters()], torch.randn_like(x)
    pairs = zip(
        [actual, *gradients(actual, cotangent, inputs)],
        [expected, *gradients(expected, cotangent, inputs)],
        strict=True,
    )
    for got, wanted in pairs:
        assert_close(got, wanted, may_vanish=shape[0] == 0)


def test_dropout_is_drawn_for_every_row():
    experts = alike(dropout=0.5)
    for expert in experts.experts:
        expert.load_state_dict(experts.experts[0].state_dict())
    ends = torch.tensor([5, 10, 15], dtype=torch.int32)
    outputs = run_shared(experts.experts, torch.ones(15, 6), ends)
    assert len(outputs.unique(dim=0)) > 10
    assert len(run_shared(experts.eval().experts, torch.ones(15, 6), ends).unique(dim=0)) == 1


def test_autocast_reaches_shared_products_by_hand():
    experts = alike(prenorm=True)
    rows, ends = torch.randn(7, 6, requires_grad=True), torch.tensor([2, 2, 7], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = run_shared(experts.experts, rows, ends), experts(rows, ends)
    assert actual.dtype == torch.bfloat16
    assert_close(actual.float(), expected.float(), 0.02)
    actual.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in [rows, *experts.parameters()])
    with pytest.raises(
        ValueError,
        match=r"x must have the dtype of the experts, torch.float32, or run under autocast, got torch.bfloat16",
    ):
        run_shared(experts.experts, rows.bfloat16(), ends)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Own(torch.Tensor):
    """As the weights of a DTensor are: parameters, but no plain ones."""


def replaced(expert):
    expert.net[0] = nn.Sequential(expert.net[0], nn.Identity())


SPECIAL = {
    "hook": lambda expert: expert.net[0].register_forward_hook(lambda *_: None),
    "parametrization": lambda expert: parametrize.register_parametrization(expert.net[0], "weight", Doubled()),
    "wrapper": replaced,
    "assigned forward": lambda expert: setattr(expert, "forward", lambda x: x),
    "other dtype": lambda expert: expert.double(),
    "evaluation of one": lambda expert: expert.eval(),
    "tensor subclass": lambda expert: setattr(
        expert.net[0], "weight", nn.Parameter(expert.net[0].weight.detach().as_subclass(Own))
    ),
}


@pytest.mark.parametrize("change", SPECIAL.values(), ids=SPECIAL)
def test_experts_that_differ_in_anything_are_called_one_by_one(change):
    experts = alike()
    assert are_alike(experts.experts)
    change(experts.experts[1])
    assert not are_alike(experts.experts)


def test_experts_of_other_shapes_and_classes_are_not_alike():
    assert not are_alike(Experts([Expert(6, 2), Expert(6, 3)]).experts)
    assert not are_alike(Experts([Expert(6, 2, dropout=0.1), Expert(6, 2, dropout=0.2)]).experts)
    assert not are_alike(Experts([nn.Linear(6, 6), nn.Linear(6, 6)]).experts)


class Operations(TorchDispatchMode):
    """Counts the operations that reach the device."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations(num_experts, training, kernel):
    """Of a block on the meta device, where whatever depends on data raises: in forward, and in backward."""
    block = SparseMoEBlock(MoE(8, num_experts), add_ff_before=True).to("meta").train(training)
    x = torch.empty(2, 32, 8, device="meta", requires_grad=training)
    mask = torch.ones(2, 32, dtype=torch.bool, device="meta")
    with Operations() as forward, patch.object(grouped, "_has_kernel", lambda *_: kernel):
        outputs, auxiliary, *_ = block(x, mask=mask)
    assert outputs.shape == x.shape
    with Operations() as backward, patch.object(grouped, "_has_kernel", lambda *_: kernel):
        if training:
            (outputs.sum() + auxiliary).backward()
            assert all(parameter.grad is not None for parameter in block.parameters())
    return forward.counts, backward.counts


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_operations_do_not_grow_with_the_number_of_experts_but_for_views(training, kernel):
    few, many = operations(4, training, kernel), operations(32, training, kernel)
    assert few[0].total() > 50
    assert few[0] == many[0]
    grown = {name for name in many[1] if many[1][name] != few[1][name]}
    assert grown <= {"detach"}, grown


def test_experts_that_differ_take_slots_where_nothing_may_depend_on_data():
    moe = MoE(6, 2, experts=[Expert(6, 2), Expert(6, 3)]).to("meta")
    outputs, auxiliary, *_ = moe(torch.empty(2, 9, 6, device="meta", requires_grad=True))
    (outputs.sum() + auxiliary).backward()
    assert all(parameter.grad is not None for parameter in moe.parameters())


def test_eager_experts_on_cpu_are_called_and_others_share_products():
    with patch("st_moe_pytorch.experts.run_shared", wraps=run_shared) as shared:
        MoE(6, 3)(torch.randn(1, 9, 6))
        assert shared.call_count == 0
        MoE(6, 3).to("meta")(torch.empty(1, 9, 6, device="meta"))
        assert shared.call_count == 1


@pytest.mark.parametrize("kernel", [False, True])
def test_flops_of_the_layer_are_counted(kernel):
    moe = MoE(8, 4, expert_hidden_mult=6, capacity_factor_train=None, balance_loss_coef=0.0)
    hidden = int(8 * 6 * 2 / 3)  # aligned, since padding is computed with, and counted
    x = torch.empty(1, 16, 8, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter, patch.object(grouped, "_has_kernel", lambda *_: kernel):
        moe.to("meta")(x).outputs.sum().backward()
    products = 3 * 2 * (16 * 2 + 1) * (8 * 2 * hidden + hidden * 8)
    router = 3 * 2 * 16 * 8 * 4
    of_biases = 2 * (16 * 2 + 1) * (2 * hidden + 8) * grouped.ALIGNMENT if kernel else 0
    assert counter.get_total_flops() == products + router + of_biases
