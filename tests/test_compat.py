"""What the package needs of torch beyond its public names. These tests fail when torch changes one of them."""

import io
import warnings
from datetime import timedelta
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._common_utils import FSDP_WRAPPED_MODULE
from torch.nn.parallel import DistributedDataParallel
from torch.utils._triton import has_triton
from torch.utils.checkpoint import checkpoint

import st_moe_pytorch.tools.compat  # noqa: F401 - reached as tools.compat
from st_moe_pytorch import RMSNorm, compat, distributed, layers, layouts, tools
from st_moe_pytorch.grouped import linear


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_is_told_from_a_forward(use_reentrant):
    seen = []

    def forward(x):
        seen.append(tools.compat.is_recomputing())
        return x.sin()

    checkpoint(forward, torch.ones(1, requires_grad=True), use_reentrant=use_reentrant).sum().backward()
    assert seen == [False, True]


def test_reentrant_checkpointing_is_seen_in_the_forward():
    seen = []

    def forward(x):
        seen.append(tools.compat.is_in_reentrant_checkpoint())
        return x.sin()

    x = torch.ones(1, requires_grad=True)
    with torch.no_grad():
        forward(x)
    checkpoint(forward, x, use_reentrant=False)
    checkpoint(forward, x, use_reentrant=True).sum().backward()
    assert seen == [False, False, True, False]


def test_the_end_of_a_recomputation_is_told_from_other_errors():
    seen = []

    def forward(x):
        try:
            return x.sin().cos()
        except Exception as error:
            seen.append(compat.ends_recomputation(error))
            raise

    checkpoint(forward, torch.ones(1, requires_grad=True), use_reentrant=False).sum().backward()
    assert seen == [True]
    assert not compat.ends_recomputation(ValueError())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_reentrant_checkpointing_is_seen_in_a_graph(use_reentrant):
    y = checkpoint(torch.sin, torch.ones(1, requires_grad=True), use_reentrant=use_reentrant)
    assert distributed.compat.is_reentrant_checkpoint(y.grad_fn) == use_reentrant


def test_transforms_are_noticed():
    seen = []
    torch.func.vmap(lambda x: seen.append(compat.is_transformed()) or x)(torch.ones(2))
    assert seen == [True]
    assert not compat.is_transformed()
    torch.func.vmap(lambda x: seen.append(compat.is_lifted()) or x)(torch.ones(2))
    with torch.autograd.forward_ad.dual_level():
        seen += [compat.is_lifted(), compat.is_forward_mode()]
    torch.func.jvp(lambda x: seen.append(compat.is_forward_mode()) or x, (torch.ones(2),), (torch.ones(2),))
    assert seen == [True] * 5
    assert not compat.is_lifted()
    assert not compat.is_forward_mode()


def test_hooks_of_all_modules_modes_of_operators_and_forward_mode_are_noticed():
    assert not compat.is_watched()
    handle = nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
    assert compat.is_watched()
    handle.remove()
    assert not compat.is_watched()
    with FakeTensorMode():
        assert compat.is_watched()
    with torch.autograd.forward_ad.dual_level():
        assert compat.is_watched()


def test_batches_are_told_from_other_transforms():
    seen = []

    def function(x):
        seen.append(compat.is_batched())
        return x.sum()

    torch.func.vmap(torch.func.grad(function))(torch.ones(2, 3))
    torch.func.grad(function)(torch.ones(3))
    assert seen == [True, False]
    assert not compat.is_batched()


def test_tensors_without_values_are_noticed():
    with FakeTensorMode():
        assert compat.is_fake(torch.ones(2))
    assert not compat.is_fake(torch.ones(2, device="meta"))


def test_models_of_transformers_initialise_our_modules_too():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=8, n_positions=4, n_embd=4, n_layer=1, n_head=1)
    model = transformers.GPT2LMHeadModel(config)
    model.transformer.extra = RMSNorm(4)
    tools.compat.initialize_with(model.transformer, (RMSNorm,))
    tools.compat.initialize_with(nn.Linear(2, 2), (RMSNorm,))
    nn.init.zeros_(model.transformer.extra.gamma)
    nn.init.zeros_(model.transformer.wte.weight)
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()
    assert (model.transformer.extra.gamma == 1).all()
    assert model.transformer.wte.weight.std() > 0


def test_tensors_are_found_in_what_libraries_return():
    transformers = pytest.importorskip("transformers")
    x, y = torch.ones(1), torch.ones(2)
    output = transformers.modeling_outputs.CausalLMOutput(logits=x, hidden_states=(y, None))
    found = tools.compat.tensors_in(({"outputs": output}, [y, "text"], 3))
    assert [id(t) for t in found] == [id(x), id(y), id(y)]


def test_what_may_be_derived():
    x, leaf = torch.ones(2), torch.ones(2, requires_grad=True)
    assert compat.may_be_derived(x, leaf)
    assert not compat.may_be_derived(x, 1.0)
    with torch.no_grad():
        assert not compat.may_be_derived(leaf)
        assert torch.func.jvp(lambda x: x * compat.may_be_derived(x), (x,), (x,))[1].any()
        with torch.autograd.forward_ad.dual_level():
            assert compat.may_be_derived(x)
        assert not compat.may_be_derived(x)
    seen = []
    y = leaf.sin()
    y.register_hook(lambda grad: seen.append(compat.may_be_derived(grad)))
    torch.autograd.grad(y, leaf, torch.eye(2), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, leaf, torch.ones(2))
    assert seen == [True, False]
    assert torch.func.grad(lambda x: (x * compat.may_be_derived(x)).sum())(x).any()


def test_a_known_signature_is_the_one_that_torch_finds():
    @compat.with_known_signature
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(x, factor=3.0):
            return x * factor

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.factor = inputs[1]

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.factor, None

    x = torch.ones(2, requires_grad=True)
    assert torch.autograd.grad(Scaled.apply(x).sum(), x)[0].tolist() == [3, 3]
    with pytest.raises(TypeError):
        Scaled.apply(x, 1.0, 2.0)


def test_hooks_of_every_kind_are_seen():
    kinds = ("forward", "forward_pre", "full_backward", "full_backward_pre")
    for kind in kinds:
        module = nn.Linear(2, 2)
        assert not compat.has_hooks(module)
        handle = getattr(module, f"register_{kind}_hook")(lambda *_: None)
        assert compat.has_hooks(module)
        handle.remove()
        assert not compat.has_hooks(module)


class Result(NamedTuple):
    value: torch.Tensor


def test_exported_tuples_are_saved():
    compat.name_exported_tuple(Result, "tests.Result")

    class Model(nn.Module):
        def forward(self, x):
            return Result(x + 1)

    file = io.BytesIO()
    torch.export.save(torch.export.export(Model(), (torch.zeros(2),)), file)
    file.seek(0)
    assert torch.export.load(file).module()(torch.zeros(2)).value.tolist() == [1, 1]


@pytest.mark.compile
def test_code_that_is_compiled_runs_a_function_in_eager_mode():
    seen = []

    def inner(x):
        seen.append(torch.compiler.is_compiling())
        return x + 1

    def outer(x):
        return compat.eager(inner)(x * 2) * 3

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.compile(outer, backend="eager")(torch.ones(1)).item() == 9
    torch._dynamo.reset()
    assert seen == [False]
    assert compat.eager(inner) is inner


def test_functions_are_fused_for_large_tensors_on_a_gpu_alone():
    calls = []

    @compat.fused
    def double(x):
        calls.append(torch.compiler.is_compiling())
        return 2 * x

    large = torch.ones(compat.WORTH_FUSING)
    with torch.no_grad():
        assert torch.equal(double(large), 2 * large)
        assert not compat.is_fused(large)
    assert calls == [False]
    assert isinstance(has_triton(), bool)
    seen = []
    with torch.no_grad():
        torch.compile(lambda x: seen.append(compat.is_fused(x)) or x + 1, backend="eager")(large)
    torch._dynamo.reset()
    assert seen == [False]


def test_moving_a_module_is_applying_to_its_tensors():
    module = nn.Sequential(nn.Linear(2, 2))
    compat.apply_to_tensors(module, torch.Tensor.double, True)
    assert all(p.dtype == torch.float64 for p in module.parameters())
    calls = []

    class Watched(nn.Linear):
        def _apply(self, fn, recurse=True):
            calls.append(recurse)
            return super()._apply(fn, recurse)

    nn.Sequential(Watched(2, 2)).to(torch.float64)
    assert calls == [True], "torch calls it of every module inside, too"


@pytest.mark.compile
def test_fused_functions_give_their_numbers_compiled_too():
    tokens, k, d = 32, 3, 8
    rows = tokens * k
    y, gates, places = torch.randn(rows + 1, d), torch.rand(tokens, k), torch.randperm(rows).view(tokens, k)
    choices, z, offsets = (
        torch.randperm(rows + 1),
        torch.randn(rows, 2 * d),
        torch.tensor([10, 10, rows - 2], dtype=torch.int32),
    )
    of_tokens = (choices // k).clamp(max=tokens - 1)
    for function, *inputs in (
        (layouts._sum_each, y, gates, places, torch.float32),
        (layouts._gradients_of_sum, torch.randn(tokens, d), y, torch.rand(rows + 1, 1), of_tokens),
        (layouts._gradients_of_gather, y, torch.randn(rows + 1, d), (torch.rand(tokens, k) < 0.8).float(), places),
        *((layers._gated_unit, z, torch.rand(d), name) for name in layers.ACTIVATIONS),
        (linear._add_bias, z, torch.randn(3, 2 * d), offsets),
    ):
        with torch.no_grad():
            copies = [[t.clone() if isinstance(t, torch.Tensor) else t for t in inputs] for _ in range(2)]
            expected, found = function(*copies[0]), torch.compile(function)(*copies[1])
        pairs = zip(expected, found, strict=True) if isinstance(expected, tuple) else [(expected, found)]
        for wanted, actual in pairs:
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.compile
@pytest.mark.parametrize("activation", layers.ACTIVATIONS)
def test_compiled_code_writes_both_halves_of_a_tensor(activation):
    """They share memory, which torch.compile has to notice and to know that they do not overlap."""
    z, grad = torch.randn(20, 16, requires_grad=True), torch.randn(20, 8)
    (wanted,) = torch.autograd.grad(layers._gated_unit(z, 1.0, activation), z, grad)
    for function in (layers._write_gradients, torch.compile(layers._write_gradients)):
        dz = torch.full_like(z, torch.nan)
        with torch.no_grad():
            function(grad, z, *dz.chunk(2, dim=-1), activation)
        torch.testing.assert_close(dz, wanted, rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


def test_compiled_functions_take_any_number_of_rows_but_know_their_widths():
    assert compat._with_fixed_widths(torch.ones(3)).shape == (3,)
    graphs = []

    def backend(graph, inputs):
        graphs.append([s for s in inputs if not isinstance(s, torch.Tensor)])
        return graph.forward

    function = torch.compile(lambda x: x * 2, backend=backend)
    for shape in ((4, 8), (5, 8), (6, 8), (4, 16), (9, 16)):
        x = torch.ones(shape, requires_grad=True)
        with torch.no_grad():
            assert torch.equal(function(compat._with_fixed_widths(x)), 2 * x)
        assert not vars(x), "the caller's tensor carries no mark"
    assert len(graphs) <= 4
    assert all(len(symbols) <= 1 for symbols in graphs), "a width became variable"
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_are_copied_into_a_stack_of_either_dtype(dtype):
    tensors, stack = [torch.randn(2, 3) for _ in range(4)], torch.zeros(4, 2, 5, dtype=dtype)
    compat.copy_each(stack[:, :, :3], tensors)
    assert torch.equal(stack[:, :, :3], torch.stack(tensors).to(dtype))
    assert not stack[:, :, 3:].any()


@pytest.mark.parametrize("bias", [True, False])
def test_onednn_computes_linear_layers(bias):
    x, weight = torch.randn(70, 9), torch.randn(5, 9)
    bias = torch.randn(5) if bias else None
    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(compat.onednn_linear(x, weight, bias), expected)
    torch.testing.assert_close(compat.onednn_linear(x, weight.t().contiguous().t(), bias), expected)
    torch.testing.assert_close(compat.onednn_linear(x.t().contiguous().t(), weight, bias), expected)


def test_contents_of_a_module_are_its_own():
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    assert compat.contents(module) == ({"0": module[0], "1": module[1]}, {})
    assert compat.contents(module[0])[1] == {"weight": module[0].weight, "bias": None}


def test_names_without_wrappers():
    inner = nn.ModuleDict({FSDP_WRAPPED_MODULE: nn.ModuleDict({"own_orig_mod": nn.Linear(2, 2)})})
    names = [name for name, _ in nn.ModuleDict({"a": torch.compile(checkpoint_wrapper(inner))}).named_parameters()]
    plain = [distributed.compat.without_wrappers(name) for name in names]
    assert plain == ["a.own_orig_mod.weight", "a.own_orig_mod.bias"]


def test_groups_and_ddp(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        assert distributed.compat.group_named(group.group_name) is group
        with pytest.raises(RuntimeError):
            distributed.compat.group_named("no such group")
        patient = dist.new_group([0], timeout=timedelta(seconds=77))
        assert distributed.compat.timeout_of(patient) == timedelta(seconds=77)
        silent = SimpleNamespace(_device_types=["cpu"], _get_backend=lambda device: SimpleNamespace(options=None))
        assert distributed.compat.timeout_of(silent) is None

        inner, outer, seen = nn.Linear(2, 2), nn.Linear(2, 2), []
        fully_shard(inner)
        for module in (inner, outer):
            module.register_forward_pre_hook(
                lambda module, _: seen.append(
                    (type(module.bias), distributed.compat.ranks_of_fsdp({module.weight, module.bias}))
                )
            )
        before = distributed.compat.ranks_of_fsdp({inner.weight, outer.weight})
        outer(inner(torch.ones(1, 2)))
        assert before == {0}
        assert seen == [(nn.Parameter, {0}), (nn.Parameter, set())]

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.averaged, self.own = nn.Linear(2, 2), nn.Linear(2, 2)

            def forward(self, x):
                seen = [distributed.compat.is_managed_by_ddp(module.weight) for module in (self.averaged, self.own)]
                return self.own(self.averaged(x)) * (seen == [True, False])

        model = Model()
        distributed.compat.leave_out_of_ddp(model, ["own.weight", "own.bias"])
        assert DistributedDataParallel(model)(torch.ones(1, 2)).any()
        assert not distributed.compat.is_managed_by_ddp(model.averaged.weight)
    finally:
        dist.destroy_process_group()


@pytest.mark.compile
def test_compiled_code_is_made_for_fixed_numbers():
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    zeros = torch.compile(lambda x, number: x.new_zeros(int(compat.fixed(number) * 4)), backend=counter, fullgraph=True)
    for number in (1.0, 1.5, 2.0, 1.5):
        assert zeros(torch.ones(1), number).shape == (int(number * 4),)
    assert counter.frame_count == 3
    assert compat.fixed(None) is None
