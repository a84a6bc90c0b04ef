"""Linear layers as they are fastest on CPU, against the same layers called as modules."""

import warnings
from functools import partial

import pytest
import torch
from oracles import assert_close
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from st_moe_pytorch import Expert, MoE, layers
from st_moe_pytorch.grouped import cpu, grouped_linear
from st_moe_pytorch.grouped.cpu import (
    FEW,
    FEWEST,
    MANY,
    WIDE,
    WIDE_TO_TRAIN,
    WORTH_PARTS,
    cpu_linear,
    is_worthwhile,
    with_spare_rows,
)

DIM = 96
ROWS = MANY // DIM + 1


@pytest.fixture(autouse=True)
def _processor(monkeypatch):
    """One of AMD, and two threads, for each of which products of few rows have a part."""
    monkeypatch.setattr(cpu, "IS_AMD", True)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def expert_and_rows(requires_grad=True, shape=(3, ROWS // 3 + 1, DIM), **settings):
    """Few rows are float64. Many are float32, whose products oneDNN computes."""
    torch.manual_seed(0)
    dtype = torch.float64 if len(torch.empty(shape).flatten(0, -2)) <= FEW else torch.float32
    expert = Expert(shape[-1], **settings).to(dtype)
    for parameter in expert.parameters():
        nn.init.normal_(parameter, std=0.3)
    return expert, torch.randn(shape, dtype=dtype, requires_grad=requires_grad)


def assert_near(actual, expected):
    """To the last digits but some of the dtype."""
    assert_close(actual, expected, 1e-12 if actual.dtype == torch.float64 else 3e-6)


SHAPES = [
    (3, ROWS // 3 + 1, DIM),
    (1, 352, DIM),
    *((1, rows, WIDE_TO_TRAIN) for rows in (1, FEWEST, FEWEST + 1)),
    (4, 16, WIDE_TO_TRAIN),
]


@pytest.fixture
def is_computed(monkeypatch):
    """Whether an expert computes its linear layers of x by `cpu_linear`."""
    calls = []
    monkeypatch.setattr(layers, "cpu_linear", lambda *inputs: calls.append(inputs) or cpu_linear(*inputs))

    def asked(expert, x):
        calls.clear()
        expert(x)
        return len(calls) == 2

    return asked


@pytest.fixture
def onednn(monkeypatch):
    """The shapes of inputs and matrices of the products that oneDNN computed since the last question."""
    calls, usual = [], cpu.onednn_linear

    def noted(x, weight, bias):
        calls.append((tuple(x.shape), tuple(weight.shape)))
        return usual(x, weight, bias)

    monkeypatch.setattr(cpu, "onednn_linear", noted)

    def asked(run):
        calls.clear()
        run()
        return list(calls)

    return asked


@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"prenorm": True, "mult_bias": False}], ids=str)
@pytest.mark.parametrize("frozen", [None, "0", "2"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_and_gradients_are_those_of_the_called_modules(settings, frozen, shape, is_computed):
    expert, x = expert_and_rows(shape=shape, hidden_mult=1.1, **settings)
    assert 2 * expert.net[-1].in_features % 8 != 0
    assert is_computed(expert, x)
    if frozen is not None and hasattr(expert.net, frozen):
        expert.net.get_submodule(frozen).requires_grad_(False)
    cotangent, wanted = torch.randn_like(x), [x, *(p for p in expert.parameters() if p.requires_grad)]
    got, expected = expert(x), expert.net(x)
    assert_near(got, expected)
    assert got.is_contiguous()
    for mine, theirs in zip(
        torch.autograd.grad(got, wanted, cotangent), torch.autograd.grad(expected, wanted, cotangent), strict=True
    ):
        assert_near(mine, theirs)
    with torch.no_grad():
        assert_near(expert(x), expected)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[-1]], ids=str)
def test_second_derivatives_are_those_of_the_called_modules(shape):
    expert, x = expert_and_rows(shape=shape, hidden_mult=1.1)
    *wanted, last_bias = x, *expert.parameters()
    cotangent = torch.randn_like(x)

    def derive(forward):
        first = torch.autograd.grad(forward(x), [*wanted, last_bias], cotangent, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), wanted)

    for mine, theirs in zip(derive(expert), derive(expert.net), strict=True):
        assert_near(mine, theirs)


def test_many_gradients_at_a_time():
    expert, x = expert_and_rows(hidden_mult=1.1)
    cotangents = torch.randn(2, *x.shape, dtype=x.dtype)
    (got,) = torch.autograd.grad(expert(x), x, cotangents, is_grads_batched=True)
    assert_near(got, torch.stack([torch.autograd.grad(expert.net(x), x, each)[0] for each in cotangents]))


def test_products_of_many_rows_are_those_of_onednn(onednn):
    expert, x = expert_and_rows(shape=(1, 347, DIM), hidden_mult=1.1)
    hidden, results = expert.net[-1].in_features, []
    up, down = (2 * hidden, DIM), (DIM, hidden)
    assert hidden < DIM
    assert onednn(lambda: results.append(expert(x))) == [((352, DIM), up), ((352, hidden), down)]
    found = onednn(results[0].sum().backward)
    # the gradients of hidden units, of the first matrix only if it were wider than high, and of the tokens
    assert found == [((352, DIM), (hidden, DIM)), ((352, 2 * hidden), (DIM, 2 * hidden))]
    wide, _ = expert_and_rows(shape=(1, 347, DIM))
    units = wide.net[-1].in_features
    results = [wide(x)]
    assert ((DIM, 352), (units, 352)) in onednn(results[0].sum().backward)
    with torch.no_grad():
        assert len(onednn(lambda: expert(x))) == 2
        assert onednn(lambda: expert(x[:, :FEW])) == []
        for linear in (expert.net[0], expert.net[-1]):  # memory in another order
            wider = torch.zeros(linear.out_features, linear.in_features + 1)
            linear.weight.data = wider[:, :-1].copy_(linear.weight)
        expected = expert.net(x)
        assert onednn(lambda: results.append(expert(x))) == []
        assert_near(results[-1], expected)
        assert len(onednn(lambda: wide(x))) == 2
        with warnings.catch_warnings(action="ignore"), torch.backends.mkldnn.flags(enabled=False):
            assert onednn(lambda: wide(x)) == []


def test_inputs_of_another_width_are_told_as_by_the_called_modules():
    expert, _ = expert_and_rows()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        expert(torch.ones(1, 347, DIM + 1))


def test_few_numbers_of_rows_occur():
    numbers = {len(with_spare_rows(torch.ones(rows, 1))) for rows in range(FEW + 1, 2**14 + 1)}
    assert len(numbers) == 4 + 8 + 16 * 6
    for rows in (FEW + 1, 80, 347, 1000, 5000):
        padded = with_spare_rows(torch.ones(rows, 2))
        assert rows <= len(padded) <= max(rows + 15, rows * 17 // 16)
        assert torch.equal(padded.sum(0), torch.full((2,), float(rows)))
    for rows in (torch.ones(FEW, 1), torch.ones(347, 1, dtype=torch.float64), torch.ones(347, 1, device="meta")):
        assert with_spare_rows(rows) is rows


def test_half_types_get_spare_rows_too(monkeypatch):
    monkeypatch.setattr(cpu, "IS_AMD", False)
    expert, x = expert_and_rows(shape=(1, 347, DIM))
    seen, usual = [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, *others: seen.append(len(x)) or usual(x, *others))
    assert torch.equal(expert(x), expert.net(x))
    with torch.autocast("cpu", torch.bfloat16):
        seen.clear()
        got = expert(x)
        assert seen == [352, 352]
        got, expected = (torch.autograd.grad(y.float().square().sum(), x)[0] for y in (got, expert.net(x)))
    assert_close(got, expected, 0.02)
    seen.clear()
    y = expert.bfloat16()(x.bfloat16())
    assert seen == [352, 352]
    assert_close(y.float(), expert.net(x.bfloat16()).float(), 0.02)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 3e-6), (torch.bfloat16, 0.02)], ids=str)
def test_shared_products_of_many_rows_are_those_of_onednn(dtype, rtol, onednn):
    torch.manual_seed(0)
    counts = [70, 0, 347]
    rows = torch.randn(sum(counts) + 1, 24, dtype=dtype)
    weights, biases = (torch.randn(3, *shape, dtype=dtype) for shape in ((20, 24), (20,)))
    scales, cotangent = torch.randn(3, 24, dtype=dtype), torch.randn(len(rows), 20, dtype=dtype)
    inputs = [t.requires_grad_() for t in (rows, *weights.unbind(), *biases.unbind(), *scales.unbind())]
    offsets, results = torch.tensor(counts).cumsum(0, dtype=torch.int32), []
    found = onednn(lambda: results.append(grouped_linear(rows, inputs[1:4], inputs[4:7], inputs[7:], offsets)))
    assert found == ([((80, 24), (20, 24)), ((352, 24), (20, 24))] if dtype == torch.float32 else [])
    wide = [t.detach().double().requires_grad_() for t in inputs]
    parts = wide[0][:-1].split(counts)
    blocks = [(part * wide[7 + j]) @ wide[1 + j].t() + wide[4 + j] for j, part in enumerate(parts)]
    expected = torch.cat([*blocks, wide[0].new_zeros(1, 20)])
    assert_close(results[0].double(), expected, rtol)
    found = torch.autograd.grad(results[0], inputs, cotangent)
    for mine, theirs in zip(found, torch.autograd.grad(expected, wide, cotangent.double()), strict=True):
        assert_close(mine.double(), theirs, 2 * rtol, may_vanish=True)


@pytest.fixture
def parts(monkeypatch):
    """Of each product since the last question that was computed in parts, how many, and which way round."""
    calls, usual = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: calls.append((a.shape, b.shape)) or usual(a, b))

    def asked(run):
        calls.clear()
        run()
        return [tuple(map(tuple, shapes)) for shapes in calls]

    return asked


def test_products_of_few_rows_are_computed_in_parts(parts, monkeypatch):
    up, odd, small = nn.Linear(WIDE, 302), nn.Linear(302, 111), nn.Linear(WIDE, 200)
    assert small.weight.numel() < WORTH_PARTS < odd.weight.numel()
    with torch.no_grad():
        for layer, rows, expected in [
            (up, FEWEST, [((2, 151, WIDE), (2, WIDE, FEWEST))]),
            (up, FEWEST + 1, [((2, FEWEST + 1, WIDE), (2, WIDE, 151))]),
            (up, FEW, [((2, FEW, WIDE), (2, WIDE, 151))]),
            (up, FEW + 1, []),
            (up, 0, []),
            (odd, 5, []),
            (small, 5, []),
        ]:
            x = torch.randn(rows, layer.in_features)
            assert parts(lambda x=x, layer=layer: cpu_linear(x, layer)) == expected
        shared = partial(grouped_linear, biases=[], scales=[], offsets=torch.tensor([5], dtype=torch.int32))
        for dtype, number in ((torch.float32, 1), (torch.bfloat16, 0)):
            rows, matrix = torch.randn(5, WIDE, dtype=dtype), up.weight.to(dtype)
            assert len(parts(lambda rows=rows, matrix=matrix: shared(rows, [matrix]))) == number
        torch.set_num_threads(1)
        assert parts(lambda: cpu_linear(torch.randn(5, WIDE), up)) == []
        assert len(parts(lambda: cpu_linear(torch.randn(FEWEST, WIDE), up))) == 1
        torch.set_num_threads(2)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
        assert parts(lambda: cpu_linear(torch.randn(5, WIDE), up)) == []


def test_gradients_of_few_inputs_are_computed_in_parts(parts):
    layer, x = nn.Linear(WIDE, 302), torch.randn(2, WIDE, requires_grad=True)
    y = cpu_linear(x, layer).sum()
    assert parts(y.backward) == [((2, 2, 302), (2, 302, WIDE // 2))]


def test_shared_products_of_few_rows_are_computed_in_parts(parts):
    counts, ends = [0, FEWEST, 5], [0, FEWEST, FEWEST + 5]
    rows = torch.randn(ends[-1] + 1, WIDE, dtype=torch.float64, requires_grad=True)
    weights, biases = (torch.randn(3, *shape, dtype=torch.float64) for shape in ((302, WIDE), (302,)))
    scales, cotangent = torch.randn(3, WIDE, dtype=torch.float64), torch.randn(len(rows), 302, dtype=torch.float64)
    inputs = [t.requires_grad_() for each in (weights, biases, scales) for t in each.detach().unbind()]
    offsets = torch.tensor(ends, dtype=torch.int32)
    outputs = []
    shapes = parts(lambda: outputs.append(grouped_linear(rows, inputs[:3], inputs[3:6], inputs[6:], offsets)))
    assert shapes == [((2, 151, WIDE), (2, WIDE, FEWEST)), ((2, 5, WIDE), (2, WIDE, 151))]
    blocks = [(part * inputs[6 + j]) @ inputs[j].t() + inputs[3 + j] for j, part in enumerate(rows[:-1].split(counts))]
    expected = torch.cat([*blocks, rows.new_zeros(1, 302)])
    assert_close(outputs[0], expected)
    found = []
    shapes = parts(lambda: found.extend(torch.autograd.grad(outputs[0], [rows, *inputs], cotangent)))
    assert shapes == [((2, FEWEST, 302), (2, 302, WIDE // 2)), ((2, 5, 302), (2, 302, WIDE // 2))]
    for mine, theirs in zip(found, torch.autograd.grad(expected, [rows, *inputs], cotangent), strict=True):
        assert_close(mine, theirs, may_vanish=True)


class LikeLinear(nn.Linear):
    pass


def own_class(expert):
    expert.net[0] = LikeLinear(DIM, expert.net[0].out_features)


def assigned_forward(expert):
    expert.net[2].forward = expert.net[2].forward


CHANGES = {
    "a hook on a layer": lambda expert: expert.net[0].register_forward_hook(lambda *_: None),
    "a hook on the net": lambda expert: expert.net.register_forward_pre_hook(lambda *_: None),
    "a parametrization": lambda expert: parametrizations.weight_norm(expert.net[2]),
    "a class of its own": own_class,
    "an assigned forward": assigned_forward,
}


@pytest.mark.parametrize("change", CHANGES)
def test_layers_that_are_more_than_linear_are_called(change, is_computed):
    expert, x = expert_and_rows(requires_grad=False)
    assert is_computed(expert, x)
    CHANGES[change](expert)
    assert not is_computed(expert, x)


def test_inputs_that_are_not_plain_are_given_to_modules():
    _, x = expert_and_rows(requires_grad=False)
    assert is_worthwhile(x)
    assert not is_worthwhile(x[:, :2])  # narrow, since few rows are worthwhile where they are wide
    assert not is_worthwhile(x.new_zeros(1, 3, WIDE_TO_TRAIN - 1))
    assert is_worthwhile(x.new_zeros(1, FEW, WIDE_TO_TRAIN))
    assert is_worthwhile(x.new_zeros(1, FEW + 1, MANY // FEW))
    assert not is_worthwhile(x.new_zeros(1, FEW + 1, MANY // FEW - 10))
    assert not is_worthwhile(x.new_zeros(1, FEW + 1, MANY // FEW).double())
    assert not is_worthwhile(x.new_zeros(1, 0, WIDE_TO_TRAIN))
    with torch.no_grad():
        assert is_worthwhile(x.new_zeros(1, 3, WIDE))
        assert not is_worthwhile(x.new_zeros(1, 3, WIDE - 1))
    assert not is_worthwhile(x.to("meta"))
    assert not is_worthwhile(x.double())
    for few, many in ((x[:1, :FEW], x), (x[:1, :FEW].bfloat16(), x.bfloat16())):
        with torch.autocast("cpu", torch.bfloat16):
            assert not is_worthwhile(few.repeat(1, 1, WIDE_TO_TRAIN))
            assert is_worthwhile(many)
    with torch.autograd.forward_ad.dual_level():
        assert not is_worthwhile(x)
    seen = []
    torch.func.vmap(lambda each: seen.append(is_worthwhile(x)) or each)(x)
    assert seen == [False]
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not is_worthwhile(x)
    finally:
        handle.remove()
    assert is_worthwhile(x)


def test_other_tensors_may_stand_in_for_parameters():
    expert, x = expert_and_rows(requires_grad=False)
    others = {name: torch.randn_like(p, requires_grad=True) for name, p in expert.named_parameters()}
    got, expected = (functional_call(module, others, (x,)) for module in (expert, Called(expert.net)))
    assert_near(got, expected)
    got.sum().backward()
    assert all(t.grad is not None for t in others.values())


class Called(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


def test_a_layer_of_many_tokens_equals_its_compiled_form():
    torch._dynamo.reset()
    torch.manual_seed(0)
    moe = MoE(DIM, num_experts=2, capacity_factor_train=None)
    x = torch.randn(1, 3 * ROWS, DIM)
    assert is_worthwhile(x)
    draws = torch.rand(1, 3 * ROWS, 2)
    assert_near(moe(x, draws=draws).outputs, torch.compile(moe, backend="eager")(x, draws=draws).outputs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_may_be_changed_in_place(shape, bias):
    expert, x = expert_and_rows(shape=shape, hidden_mult=1.1, bias=bias)
    y = expert(x)
    y += x
    got = torch.autograd.grad(y.sum(), x)[0]
    assert_near(got, torch.autograd.grad((expert.net(x) + x).sum(), x)[0])
    frozen = expert.requires_grad_(False)
    residual = x * 1.0
    residual += frozen(residual)
    assert_near(torch.autograd.grad(residual.sum(), x)[0], got)


def test_no_more_is_kept_than_by_the_called_modules():
    for freeze in (False, True):
        expert, x = expert_and_rows(hidden_mult=1.1, requires_grad=freeze, shape=(1, 352, DIM))
        expert.requires_grad_(not freeze)
        kept = []
        for module in (expert, expert.net):
            shapes = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, to=shapes: to.append(t.numel()) or t, lambda t: t):
                y = module(x)
            kept.append(sum(shapes))
            y.sum().backward()
        assert kept[0] <= kept[1]


def test_exported_experts_take_any_number_of_tokens():
    expert, x = expert_and_rows(requires_grad=False)
    program = torch.export.export(expert, (x[:, :9].contiguous(),), dynamic_shapes=({1: torch.export.Dim.DYNAMIC},))
    assert_near(program.module()(x), expert(x))


def test_selective_checkpoints_compute_no_product_again_that_they_keep():
    def policy(context, operator, *inputs, **named):
        is_product = operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE

    expert, x = expert_and_rows(hidden_mult=1.1)
    contexts = partial(create_selective_checkpoint_contexts, policy)
    expected = torch.autograd.grad(expert.net(x).sum(), x)[0]
    y = checkpoint(expert, x, use_reentrant=False, context_fn=contexts)
    assert_near(torch.autograd.grad(y.sum(), x)[0], expected)


def test_a_module_behind_the_last_linear_layer_gets_and_gives_plain_rows():
    expert = Expert(100).eval()
    expert.net.append(nn.Dropout(0.1))
    assert expert(torch.randn(ROWS, 100)).is_contiguous()
    assert Expert(DIM)(torch.randn(ROWS, DIM)).is_contiguous()
