"""The one product for all experts: definition, accelerators' kernel on CPU with poisoned memory, what may not grow."""

from collections import Counter
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from oracles import assert_close, gradients
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from st_moe_pytorch import Expert, Experts, MoE, SparseMoEBlock
from st_moe_pytorch.experts import are_alike, run_shared
from st_moe_pytorch.grouped import linear as grouped
from st_moe_pytorch.grouped.linear import grouped_linear, grouped_linear_backward
from st_moe_pytorch.grouped.side_by_side import STACKS, put_side_by_side, side_by_side, together

INTO, OUT = 5, 3
LEAVES = "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"  # in opcheck, from PyTorch 2.14 on


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

    with (
        patch.object(F, "grouped_mm", grouped_mm),
        patch.object(grouped, "has_kernel", lambda *_: True),
        patch("st_moe_pytorch.experts.has_kernel", lambda *_: True),
    ):
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


@pytest.mark.filterwarnings(LEAVES)
@pytest.mark.parametrize("scaled", [True, False])
def test_operators_are_what_torch_expects_of_them(scaled):
    rows, weights, biases, scales, offsets = problem(scaled=scaled)
    rows = rows.detach().nan_to_num().requires_grad_()
    with torch.no_grad():
        grad = torch.randn(len(rows), OUT, dtype=torch.float64)
    for tensors in (lambda t: t, lambda t: [p.detach() for p in t]):
        torch.library.opcheck(grouped_linear, (rows, tensors(weights), tensors(biases), tensors(scales), offsets))
        for asked in ((True, True), (True, False), (False, True), (False, False)):
            arguments = (grad, rows.detach(), tensors(weights), tensors(scales), offsets, asked)
            torch.library.opcheck(grouped_linear_backward, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("scaled", [True, False])
def test_the_kernel_gives_what_is_told_of_it_without_data(scaled):
    rows, weights, biases, scales, offsets = problem(scaled=scaled, dtype=torch.float32)
    grad = torch.randn(len(rows), OUT)
    inputs = (rows.detach(), *([t.detach() for t in tensors] for tensors in (weights, biases, scales)), offsets)
    with kernel_on_cpu():
        # what memory behind the last expert's rows holds differs from run to run, so that values are compared elsewhere
        torch.library.opcheck(grouped_linear, inputs, test_utils=("test_schema", "test_faketensor"))
        for asked in ((True, True), (True, False), (False, True), (False, False)):
            arguments = (grad, inputs[0], inputs[1], inputs[3], offsets, asked)
            torch.library.opcheck(grouped_linear_backward, arguments, test_utils=("test_schema", "test_faketensor"))


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


@pytest.mark.filterwarnings(LEAVES)
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("kernel", "dtype"), [(False, torch.float64), (True, torch.float32)])
def test_one_tensor_stands_for_those_of_all_experts(kernel, dtype, scaled):
    rows, *lists, offsets = problem(scaled=scaled, dtype=dtype)
    rows, used = rows.detach().nan_to_num().requires_grad_(), int(offsets[-1])
    stacks = [[torch.stack(tensors).detach().requires_grad_()] if tensors else [] for tensors in lists]
    cotangent = torch.randn(len(rows), OUT, dtype=dtype).index_fill(0, torch.arange(used, len(rows)), 0)
    with kernel_on_cpu() if kernel else nullcontext():
        y, expected = grouped_linear(rows, *stacks, offsets), grouped_linear(rows, *lists, offsets)
        found = torch.autograd.grad(y, [rows, *(t for each in stacks for t in each)], cotangent)
        wanted = torch.autograd.grad(expected, [rows, *(t for tensors in lists for t in tensors)], cotangent)
    assert torch.equal(y[:used], expected[:used])
    assert torch.equal(found[0][:used], wanted[0][:used])
    e = len(offsets)
    for i, stack in enumerate(found[1:]):
        assert torch.equal(stack, torch.stack(wanted[1 + i * e : 1 + (i + 1) * e]))
    if not kernel:
        inputs = rows, *(t for each in stacks for t in each)

        def product(rows, *parameters):
            return grouped_linear(rows, *([t] for t in parameters), *([] if scaled else [[]]), offsets)[:used]

        assert torch.autograd.gradcheck(product, inputs)
        assert torch.autograd.gradgradcheck(product, inputs)
        torch.library.opcheck(grouped_linear, (rows, *stacks, offsets))


def alike(number=3, **options) -> Experts:
    experts = Experts([Expert(6, 2, **options) for _ in range(number)])
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    return experts


@contextmanager
def shared_products():
    with patch("st_moe_pytorch.experts.may_share_products", lambda t: True):
        yield


@pytest.mark.parametrize(
    "options",
    [{}, {"prenorm": True}, {"mult_bias": False}, {"activation": "silu"}, {"activation": "gelu_tanh"}],
    ids=str,
)
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


def is_flat(experts: Experts) -> bool:
    present = [expert for expert in experts.experts if expert is not None]
    columns = zip(*(expert.parameters() for expert in present), strict=True)
    return all(side_by_side(parameters) is not None for parameters in columns)


def flat(number=4) -> Experts:
    """Experts of aligned widths, as they are on a GPU."""
    experts = Experts([Expert(8, 3) for _ in range(number)]).float()
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    with kernel_on_cpu():
        experts.flatten_parameters()
    return experts


def test_parameters_side_by_side_are_what_they_were():
    experts = Experts([Expert(8, 3) for _ in range(4)])
    assert not is_flat(experts)
    values = {name: t.clone() for name, t in experts.state_dict().items()}
    parameters = list(experts.parameters())
    experts.flatten_parameters()
    assert not is_flat(experts), "without the kernel there is nothing to gain"
    with kernel_on_cpu():
        experts.float()
    assert is_flat(experts)
    assert all(mine is theirs for mine, theirs in zip(experts.parameters(), parameters, strict=True))
    assert all(torch.equal(t, values[name]) for name, t in experts.state_dict().items())
    assert experts.experts[1].net[0].weight.is_contiguous()
    addresses = [p.data_ptr() for p in parameters]
    with kernel_on_cpu():
        experts.flatten_parameters()
    assert [p.data_ptr() for p in parameters] == addresses


def test_parameters_side_by_side_are_read_and_trained_in_place(monkeypatch):
    experts, others = flat(), Experts([Expert(8, 3) for _ in range(4)])
    others.load_state_dict(experts.state_dict())
    ends = torch.tensor([3, 3, 7, 9], dtype=torch.int32)
    copied = []
    real = grouped.copy_each
    monkeypatch.setattr(grouped, "copy_each", lambda stack, tensors: copied.append(stack) or real(stack, tensors))
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (experts, others)]
    for _ in range(2):
        rows, cotangent = torch.randn(10, 8), torch.randn(9, 8)
        rows[-1] = 0
        for each, optimizer in zip((experts, others), optimizers, strict=True):
            optimizer.zero_grad()
            copied.clear()
            with kernel_on_cpu():
                (run_shared(each.experts, rows, ends)[:9] * cotangent).sum().backward()
            assert bool(copied) == (each is others)
            optimizer.step()
        for mine, theirs in zip(experts.parameters(), others.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad)
            assert torch.equal(mine, theirs)
    assert is_flat(experts)
    wide = torch.randn(10, 8, dtype=torch.bfloat16)
    with kernel_on_cpu(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run_shared(experts.experts, wide, ends)[:9], run_shared(others.experts, wide, ends)[:9])


def test_a_parameter_that_is_changed_between_forward_and_backward_is_told():
    experts = flat()
    rows, ends = torch.randn(10, 8, requires_grad=True), torch.tensor([3, 3, 7, 9], dtype=torch.int32)
    with kernel_on_cpu():
        y = run_shared(experts.experts, rows, ends)
        with torch.no_grad():
            for parameter in experts.parameters():
                parameter.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y[:9].sum().backward()


def test_a_frozen_parameter_that_is_changed_is_told_too():
    experts = flat().requires_grad_(False)
    rows, ends = torch.randn(10, 8, requires_grad=True), torch.tensor([3, 3, 7, 9], dtype=torch.int32)
    with kernel_on_cpu():
        y = run_shared(experts.experts, rows, ends)
        torch.autograd.grad(y[:9].sum(), rows, retain_graph=True)
        experts.experts[2].net[1].mult_bias.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y[:9].sum(), rows)


def test_frozen_parameters_side_by_side_cost_no_gradients():
    experts = flat()
    weights, biases = ([getattr(expert.net[0], name) for expert in experts.experts] for name in ("weight", "bias"))
    for parameter in (*weights, biases[0]):
        parameter.requires_grad_(False)
    rows, (stack,), (bias,), scales = together(torch.randn(10, 8, requires_grad=True), weights, biases, [])
    assert rows.requires_grad
    assert bias.requires_grad
    assert not stack.requires_grad
    assert scales == []


@pytest.mark.parametrize("frozen", ["", "0.net.0.weight", "net.1", "net.2"])
def test_parameters_side_by_side_are_few_tensors_to_the_graph(frozen):
    experts = flat()
    others = Experts([Expert(8, 3) for _ in range(4)])
    others.load_state_dict(experts.state_dict())
    ends, found = torch.tensor([3, 3, 7, 9], dtype=torch.int32), []
    values, cotangent = torch.randn(10, 8), torch.randn(9, 8)
    for each in (experts, others):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(not frozen or frozen not in name)
        rows = values.clone().requires_grad_()
        with kernel_on_cpu():
            y = run_shared(each.experts, rows, ends)[:9]
        wanted = [rows, *(p for p in each.parameters() if p.requires_grad)]
        first = torch.autograd.grad(y, wanted, cotangent, create_graph=True)
        with kernel_on_cpu():
            second = torch.autograd.grad(sum(g[:9].square().sum() for g in first), wanted, materialize_grads=True)
        nodes, seen = [y.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                nodes += [parent for parent, _ in node.next_functions]
        kinds = Counter(type(node).__name__ for node in seen)
        found.append((first, second, kinds["_TogetherBackward"]))
    (first, second, ours), (their_first, their_second, theirs) = found
    assert (ours, theirs) == (2, 0)
    for mine, other in zip((*first, *second), (*their_first, *their_second), strict=True):
        assert_close(mine[:9], other[:9], 1e-6, may_vanish=True)


def moved(experts):
    experts.experts[2].net[0].weight.data = experts.experts[2].net[0].weight.data.clone()


def swapped(experts):
    experts.experts[0], experts.experts[1] = experts.experts[1], experts.experts[0]


def cut(experts):
    experts.experts.add_module("3", None)


@pytest.mark.parametrize("change", [moved, swapped, cut])
def test_parameters_that_moved_are_copied_until_they_are_flattened_again(change):
    experts = flat()
    change(experts)
    assert not is_flat(experts)
    with kernel_on_cpu():
        experts.flatten_parameters()
    assert is_flat(experts)


def test_experts_that_are_cut_take_no_memory():
    experts, before = flat(), len(STACKS)
    with kernel_on_cpu():
        experts.shard(SimpleNamespace(experts=range(1, 3)))
    assert is_flat(experts)
    weights = [expert.net[0].weight for expert in experts.experts if expert is not None]
    assert len(side_by_side(weights)) == 2
    assert len(STACKS) == before


def test_a_parameter_that_experts_have_in_common_stays():
    experts = Experts([Expert(8, 3) for _ in range(3)])
    shared = experts.experts[0].net[0].weight
    experts.experts[2].net[0].weight = shared
    address = shared.data_ptr()
    with kernel_on_cpu():
        experts.flatten_parameters()
    assert shared.data_ptr() == address
    assert experts.experts[2].net[0].weight is shared


def test_a_copy_and_a_checkpoint_of_flat_parameters(tmp_path):
    experts = flat()
    copy = deepcopy(experts)
    torch.save(experts.state_dict(), tmp_path / "experts.pt")
    other = Experts([Expert(8, 3) for _ in range(4)])
    other.load_state_dict(torch.load(tmp_path / "experts.pt", weights_only=True))
    for each in (copy, other):
        assert all(map(torch.equal, each.parameters(), experts.parameters()))
    storages = [parameter.untyped_storage() for parameter in experts.parameters()]
    assert len({storage.data_ptr() for storage in storages}) == len(storages), "nobody takes them for tied"
    assert all(storage.nbytes() == p.nbytes for storage, p in zip(storages, experts.parameters(), strict=True))
    with torch.no_grad():
        next(copy.parameters()).zero_()
    assert next(experts.parameters()).any()


def test_what_memory_does_not_hold_in_a_row_is_not_side_by_side():
    values = torch.randn(3, 8, 8)
    parameters = [nn.Parameter(value.clone()) for value in values]
    assert side_by_side(parameters) is None
    put_side_by_side(parameters)
    stack = side_by_side(parameters)
    assert torch.equal(stack, values)
    assert stack.data_ptr() == parameters[0].data_ptr()
    first, *others = parameters
    for tensors in (
        parameters[:2],
        [first, *others[::-1]],
        [first, others[0], others[1].detach().clone()],
        [t.t() for t in parameters],
        [t.view(torch.int32) for t in parameters],
        values.clone().unbind(),
    ):
        assert side_by_side(tensors) is None
    odd = [nn.Parameter(torch.randn(8, 7)) for _ in range(2)]
    put_side_by_side(odd)
    assert side_by_side(odd) is None


def test_memory_that_nobody_has_any_more_is_free():
    parameters = [nn.Parameter(torch.randn(8, 8)) for _ in range(3)]
    before = len(STACKS)
    put_side_by_side(parameters)
    for parameter in parameters:
        assert len(STACKS) == before + 1
        parameter.data = parameter.data.clone()
    assert len(STACKS) == before


def test_parameters_that_are_moved_in_inference_mode_can_be_trained():
    experts = deepcopy(flat())
    rows, ends = torch.randn(10, 8), torch.tensor([3, 3, 7, 9], dtype=torch.int32)
    with kernel_on_cpu():
        with torch.inference_mode():
            experts.float()
        assert is_flat(experts)
        run_shared(experts.experts, rows, ends)[:9].sum().backward()
    assert all(parameter.grad is not None for parameter in experts.parameters())


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


def test_a_product_without_the_kernel_looks_at_offsets_once_each_way(monkeypatch):
    rows, weights, biases, scales, offsets = problem()
    looks = []
    for name in ("tolist", "__index__", "__int__", "item", "__bool__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, name=name, real=real: looks.append(name) or real(t))
    y = grouped_linear(rows, weights, biases, scales, offsets)
    assert looks == ["tolist"]
    torch.autograd.grad(y, [rows, *weights], torch.zeros_like(y))
    assert looks == ["tolist"] * 2


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
    "further layer": lambda expert: expert.net.append(nn.Dropout()),
    "no bias": lambda expert: expert.net[0].register_parameter("bias", None),
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
    assert not are_alike(Experts([Expert(6, 2, activation="silu"), Expert(6, 2)]).experts)
    assert not are_alike(Experts([nn.Linear(6, 6), nn.Linear(6, 6)]).experts)
    assert not are_alike(Experts([Expert(6, 2), Expert(6, 2, mult_bias=False)]).experts)
    assert not are_alike(Experts([Expert(6, 2, mult_bias=False), Expert(6, 2)]).experts)


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
    with Operations() as forward, patch.object(grouped, "has_kernel", lambda *_: kernel):
        outputs, auxiliary, *_ = block(x, mask=mask)
    assert outputs.shape == x.shape
    with Operations() as backward, patch.object(grouped, "has_kernel", lambda *_: kernel):
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
    with FlopCounterMode(display=False) as counter, patch.object(grouped, "has_kernel", lambda *_: kernel):
        moe.to("meta")(x).outputs.sum().backward()
    products = 3 * 2 * (16 * 2 + 1) * (8 * 2 * hidden + hidden * 8)
    router = 3 * 2 * 16 * 8 * 4
    assert counter.get_total_flops() == products + router
