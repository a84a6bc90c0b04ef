"""What the package needs of torch beyond its public names. These tests fail when torch changes one of them."""

import io
import warnings
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from st_moe_pytorch import RMSNorm, compat


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_is_told_from_a_forward(use_reentrant):
    seen = []

    def forward(x):
        seen.append(compat.is_recomputing())
        return x.sin()

    checkpoint(forward, torch.ones(1, requires_grad=True), use_reentrant=use_reentrant).sum().backward()
    assert seen == [False, True]


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
    assert compat.is_reentrant_checkpoint(y.grad_fn) == use_reentrant


def test_transforms_are_noticed():
    seen = []
    torch.func.vmap(lambda x: seen.append(compat.is_transformed()) or x)(torch.ones(2))
    assert seen == [True]
    assert not compat.is_transformed()


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
    compat.initialize_with(model.transformer, (RMSNorm,))
    compat.initialize_with(nn.Linear(2, 2), (RMSNorm,))
    nn.init.zeros_(model.transformer.extra.gamma)
    nn.init.zeros_(model.transformer.wte.weight)
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()
    assert (model.transformer.extra.gamma == 1).all()
    assert model.transformer.wte.weight.std() > 0


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


def test_groups_and_ddp(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        assert compat.group_named(group.group_name) is group
        with pytest.raises(RuntimeError):
            compat.group_named("no such group")

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.averaged, self.own = nn.Linear(2, 2), nn.Linear(2, 2)

            def forward(self, x):
                seen = [compat.is_managed_by_ddp(module.weight) for module in (self.averaged, self.own)]
                return self.own(self.averaged(x)) * (seen == [True, False])

        model = Model()
        compat.leave_out_of_ddp(model, ["own.weight", "own.bias"])
        assert DistributedDataParallel(model)(torch.ones(1, 2)).any()
        assert not compat.is_managed_by_ddp(model.averaged.weight)
    finally:
        dist.destroy_process_group()
