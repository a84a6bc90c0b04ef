"""Swapping feed-forwards of any model, and collecting the auxiliary losses, against the same layers called by hand."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from st_moe_pytorch import MoE, SparseMoEBlock
from st_moe_pytorch.tools.swap import (
    AuxLossTrainer,
    SparseFeedForward,
    collect_aux_losses,
    padded,
    sparsify,
    swapped,
)

DIM = 16


class Feed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(DIM, 32), nn.GELU(), nn.Linear(32, DIM))


class Layer(nn.Module):
    def __init__(self, mlp=None):
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.mlp = Feed() if mlp is None else mlp

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    """Someone else's model, which knows nothing of auxiliary losses."""

    def __init__(self, layers=3, checkpointed=None, shared=False):
        super().__init__()
        mlp = Feed() if shared else None
        self.layers = nn.ModuleList(Layer(mlp) for _ in range(layers))
        self.checkpointed = checkpointed

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if self.checkpointed is None else checkpoint(layer, x, use_reentrant=self.checkpointed)
        return x


def make(ffn=None):
    moe = MoE(DIM, 4, balance_loss_coef=0.3, router_z_loss_coef=0.2)
    moe.gate.policy_train = "threshold"
    return moe


def sparse(**arguments):
    torch.manual_seed(0)
    return sparsify(Model(**arguments), "layers.*.mlp", make).double()


def by_hand(model, x, mask=None):
    """Outputs and summed auxiliary losses, layer by layer."""
    total = 0.0
    for layer in model.layers:
        y, aux_loss, _, _ = layer.mlp.moe(layer.norm(x), mask=mask)
        x, total = x + y, total + aux_loss
    return x, total


def gradients(model):
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def assert_equal_gradients(model, mine, theirs):
    mine.backward()
    got = gradients(model)
    theirs.backward()
    expected = gradients(model)
    assert min(gradient.abs().max() for name, gradient in expected.items() if "to_gates" in name) > 1e-4
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


X = torch.randn(2, 10, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
COTANGENT = torch.randn(2, 10, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


WHERE = {
    "pattern": "layers.*.mlp",
    "shorter pattern": "**.mlp",
    "parts": ("**.mlp",),
    "type": Feed,
    "types": (Feed, nn.Conv1d),
}


@pytest.mark.parametrize("where", WHERE.values(), ids=WHERE)
def test_chosen_modules_become_sparse_layers_of_their_own(where):
    model = Model()
    assert sparsify(model, where, make) is model
    layers = [layer.mlp for layer in model.layers]
    assert all(type(layer) is SparseFeedForward for layer in layers)
    assert len({id(layer.moe) for layer in layers}) == 3
    assert swapped(model) == {f"layers.{number}.mlp": layer.moe for number, layer in enumerate(layers)}
    outputs, _ = by_hand(model.eval(), X.float())
    assert torch.equal(model(X.float()), outputs)


def test_some_layers_only_and_the_outermost_of_nested_ones():
    model = sparsify(Model(), "layers.[02].*", make)
    assert [type(layer.norm) for layer in model.layers] == [SparseFeedForward, nn.LayerNorm, SparseFeedForward]
    model = sparsify(Model(), "layers.*.mlp.**", make)
    assert all(type(layer.mlp) is SparseFeedForward for layer in model.layers)


def test_layers_keep_device_dtype_and_mode():
    model = sparsify(Model().to(torch.bfloat16).eval(), Feed, make)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in model.modules())
    meta = sparsify(Model().to("meta"), Feed, make)
    assert all(parameter.is_meta for parameter in meta.parameters())


def test_the_dtype_is_that_of_floating_point_parameters():
    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(DIM, DIM, dtype=torch.int8), requires_grad=False)
            self.scale = nn.Parameter(torch.ones(DIM, dtype=torch.float64))

    model = sparsify(nn.ModuleDict({"mlp": Quantised()}), Quantised, make)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_make_gets_what_it_replaces():
    model = Model().double().eval()
    expected = model(X)
    sparsify(model, Feed, lambda ffn: MoE.from_dense(ffn, DIM, 4))
    torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)


def test_nothing_is_changed_when_the_call_is_wrong():
    model = Model()
    with pytest.raises(
        ValueError,
        match=r"where must match modules of the model, got '\*.ffn'; there are layers.\*.norm, "
        r"layers.\*.mlp, .*, layers",
    ):
        sparsify(model, "*.ffn", make)
    made = iter([make(), nn.Linear(DIM, DIM)])
    with pytest.raises(ValueError, match="make must return an MoE or a SparseMoEBlock, got Linear"):
        sparsify(model, Feed, lambda ffn: next(made))
    assert all(type(layer.mlp) is Feed for layer in model.layers)


@pytest.mark.parametrize(
    "where", ["layers.*.mlp", Feed, "layers.*"], ids=["the layers", "their experts", "what holds them"]
)
def test_sparse_layers_are_not_swapped_again(where):
    model = sparsify(Model(), "layers.1.mlp", lambda ffn: MoE.from_dense(ffn, DIM, 4))
    before = dict(model.named_modules())
    with pytest.raises(
        ValueError, match=r"where must match dense feed-forwards, got .*, but layers\.1.* is sparse already"
    ):
        sparsify(model, where, lambda ffn: MoE.from_dense(ffn, DIM, 4))
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("arguments", [{}, {"checkpointed": False}], ids=["plain", "checkpointed"])
def test_losses_are_those_of_the_layers(arguments):
    model = sparse(**arguments)
    with collect_aux_losses() as aux:
        outputs = model(X)
    expected, total = by_hand(model, X)
    assert total.item() > 0.5
    torch.testing.assert_close(aux.total.double(), total, rtol=1e-12, atol=0)
    assert_equal_gradients(model, (outputs * COTANGENT).sum() + aux.total, (expected * COTANGENT).sum() + total)


def test_backward_inside_the_block_counts_recomputed_layers_once():
    model = sparse(checkpointed=False)
    with set_checkpoint_early_stop(False), collect_aux_losses() as aux:  # so that layers run again to their end
        loss = (model(X) * COTANGENT).sum() + aux.total
        before = aux.total.item()
        loss.backward()
        assert aux.total.item() == before


def test_layers_that_run_again_after_the_block_warn_of_nothing():
    model = sparse(checkpointed=False)
    with set_checkpoint_early_stop(False):
        with collect_aux_losses() as aux:
            outputs = model(X)
        ((outputs * COTANGENT).sum() + aux.total).backward()


def test_checkpointing_that_loses_the_gradient_is_refused():
    model, x = sparse(checkpointed=True), X.clone().requires_grad_()
    with collect_aux_losses(), pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(x)
    model.checkpointed = None
    with torch.no_grad(), collect_aux_losses() as aux:  # a loss that is only looked at
        model(x)
    assert aux.total.item() > 0.5


class Again(torch.autograd.Function):
    """Reentrant checkpointing as others write it."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            y = ctx.function(x)
        torch.autograd.backward(y, grad)
        return None, x.grad


def test_checkpointing_of_another_make_is_refused_in_the_backward():
    model, x = sparse(), X.clone().requires_grad_()
    with collect_aux_losses() as aux:
        for layer in model.layers:
            x = Again.apply(layer, x)
    with pytest.raises(RuntimeError, match=r"loss of layers.2.mlp has no gradient, .* use_reentrant=False; run a ref"):
        (x.sum() + aux.total).backward()


@pytest.mark.compile
def test_checkpointing_that_loses_the_gradient_of_compiled_layers_is_refused():
    torch._dynamo.reset()
    model, x = sparse(checkpointed=True), X.clone().requires_grad_()
    for layer in model.layers:
        layer.compile(backend="aot_eager")
    with collect_aux_losses(), pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(x)


@pytest.mark.parametrize("order", [(True, False), (False, True), (False,)], ids=["first", "last", "before"])
def test_a_model_that_is_its_own_reference_may_be_checkpointed(order):
    model = sparse(checkpointed=False)
    with collect_aux_losses(), torch.no_grad():  # of another step
        model(X)
    with set_checkpoint_early_stop(False), collect_aux_losses() as aux:
        found = {}
        for is_reference in order:
            with torch.set_grad_enabled(not is_reference):
                found[is_reference] = model(X)
    outputs = found[False]
    expected, total = by_hand(model, X)
    with set_checkpoint_early_stop(False):  # so that layers run again to their end
        assert_equal_gradients(model, (outputs * COTANGENT).sum() + aux.total, (expected * COTANGENT).sum() + total)


def test_a_model_that_is_only_looked_at_counts_nothing():
    model, reference = sparse(), sparse()
    with collect_aux_losses() as aux:
        with torch.no_grad():
            reference(X)
        outputs = model(X)
    expected, total = by_hand(model, X)
    assert_equal_gradients(model, (outputs * COTANGENT).sum() + aux.total, (expected * COTANGENT).sum() + total)


def test_gradients_accumulate_over_micro_batches():
    model = sparse()
    losses, expected = [], []
    for x, cotangent in zip(X.split(1), COTANGENT.split(1), strict=True):
        with collect_aux_losses() as aux:
            losses.append(((model(x) * cotangent).sum() + aux.total) / 2)
        outputs, total = by_hand(model, x)
        expected.append(((outputs * cotangent).sum() + total) / 2)
    assert_equal_gradients(model, sum(losses), sum(expected))


def test_a_shared_layer_counts_once_for_each_call():
    model = sparse(shared=True)
    assert len({id(layer.mlp) for layer in model.layers}) == 1
    assert list(swapped(model)) == ["layers.0.mlp"]
    with collect_aux_losses() as aux:
        model(X)
    torch.testing.assert_close(aux.total.double(), by_hand(model, X)[1], rtol=1e-12, atol=0)


def test_a_shared_feed_forward_is_made_once():
    made = []
    sparsify(Model(shared=True), Feed, lambda ffn: made.append(ffn) or make())
    assert len(made) == 1


def test_evaluation_adds_nothing_and_nothing_stays_behind():
    model = sparse()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with collect_aux_losses() as aux:
        model.eval()(X)
    assert aux.total == 0
    with collect_aux_losses():
        model.train()(X)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert aux.total == 0


def test_blocks_can_be_nested_and_end_with_errors():
    model = sparse()
    with collect_aux_losses() as outer:
        model(X)
        with collect_aux_losses() as inner:
            model(X)
        assert outer.total.item() == inner.total.item() > 0.5
        with pytest.raises(ValueError, match="x must have shape"):
            model.layers[0].mlp(X[..., 1:])
        model(X)
    assert outer.total.item() == pytest.approx(2 * inner.total.item(), rel=1e-12)
    try:
        with collect_aux_losses() as broken:
            raise KeyError
    except KeyError:
        with pytest.warns(UserWarning, match="trained without its balance loss and router z-loss"):
            model(X)
    assert broken.total == 0


def test_a_block_without_swapped_layers_warns():
    built_in = MoE(8, 4)
    message = "no auxiliary losses were collected: no swapped-in layer ran in this block"
    with pytest.warns(UserWarning, match=message), collect_aux_losses() as aux:
        built_in(torch.randn(2, 5, 8))
    assert aux.total == 0
    with torch.no_grad(), collect_aux_losses():
        built_in(torch.randn(2, 5, 8))


def run_threads(work, number=8):
    errors = []

    def run(place):
        try:
            work(place)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_collect_their_own_losses():
    models = [sparse(layers=1) for _ in range(8)]
    xs = [X * (1 + place) for place in range(8)]
    totals = [by_hand(model, x)[1].item() for model, x in zip(models, xs, strict=True)]
    assert len(set(totals)) == 8

    def work(place):
        for _ in range(20):
            with collect_aux_losses() as aux:
                models[place](xs[place])
            assert aux.total.item() == pytest.approx(totals[place], rel=1e-6)

    run_threads(work)
    with pytest.warns(UserWarning, match="add aux.total to the loss"):  # nobody collects any more
        models[0](X)


def test_training_without_the_losses_warns_and_nothing_else_does():
    model = sparse()
    with pytest.warns(UserWarning, match="trained without its balance loss and router z-loss: run the model inside"):
        model(X)
    with torch.no_grad():
        model(X)
    model.eval()(X)
    for layer in swapped(model.train()).values():
        layer.balance_loss_coef = layer.router_z_loss_coef = 0.0
    model(X)


def test_mask_reaches_the_layer_of_models_that_pass_one():
    layer = sparse().layers[0].mlp
    mask = torch.arange(10) < torch.tensor([[10], [4]])
    with collect_aux_losses() as aux:
        outputs = layer(X, mask=mask)
    expected = layer.moe(X, mask=mask)
    assert torch.equal(outputs, expected.outputs)
    assert aux.total.item() == expected.total_aux_loss.item()


MASK = torch.arange(10) < torch.tensor([[10], [4]])


@pytest.mark.parametrize("mask", [MASK, MASK.long()], ids=["bool", "int"])
@pytest.mark.parametrize("checkpointed", [None, False], ids=["plain", "checkpointed"])
def test_layers_are_told_of_padding_in_a_block(mask, checkpointed):
    model, expected = sparse(checkpointed=checkpointed), None
    with padded(model, mask), collect_aux_losses() as aux:
        outputs = model(X)
        expected, total = by_hand(model, X, MASK)
        torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(aux.total.double(), total, rtol=1e-12, atol=0)
        assert_equal_gradients(model, (outputs * COTANGENT).sum() + aux.total, (expected * COTANGENT).sum() + total)
    with collect_aux_losses():
        assert not torch.allclose(model(X), expected)  # routed as tokens are, and taking their places


def test_blocks_of_padding_are_for_parts_of_a_model_and_end_with_errors():
    encoder, decoder = sparse(), sparse()
    model = nn.ModuleList([encoder, decoder])
    masks = [layer.mlp.mask for part in model for layer in part.layers]
    with collect_aux_losses(), padded(encoder, MASK), padded(decoder, MASK[:, :6]):
        torch.testing.assert_close(encoder(X), by_hand(encoder, X, MASK)[0], rtol=1e-12, atol=1e-12)
        with padded(decoder, MASK[:, 1:7]):  # the innermost counts
            some = X[:, :6]
            torch.testing.assert_close(decoder(some), by_hand(decoder, some, MASK[:, 1:7])[0], rtol=1e-12, atol=1e-12)
        with pytest.raises(ValueError, match=r"mask must be a bool tensor of shape \(2, 10\), .* of shape \(2, 6\)"):
            decoder(X)
        masks.append(decoder.layers[0].mlp.mask)
    with pytest.raises(KeyError), padded(model, MASK):
        raise KeyError
    assert masks[:-1] == [layer.mlp.mask for part in model for layer in part.layers] == [None] * 6
    assert torch.equal(masks[-1], MASK[:, :6])


def test_a_mask_that_a_model_passes_itself_is_taken():
    layer = sparse().layers[0].mlp
    with padded(layer, ~MASK), collect_aux_losses():
        assert torch.equal(layer(X, mask=MASK), layer.moe(X, mask=MASK).outputs)


def test_a_mask_goes_where_the_layers_are():
    model = sparse().to("meta")
    with padded(model, MASK), collect_aux_losses():
        assert model(X.to("meta")).shape == X.shape
        assert {layer.mlp.mask.device.type for layer in model.layers} == {"meta"}


def test_layers_that_run_again_without_their_mask_are_refused():
    model = sparse(checkpointed=False)
    with padded(model, MASK), collect_aux_losses() as aux:
        outputs = model(X)
    with pytest.raises(RuntimeError, match=r"layers.2.mlp runs again in the backward without its mask: run both in"):
        ((outputs * COTANGENT).sum() + aux.total).backward()
    with collect_aux_losses() as aux:  # a step that has none
        outputs = model(X)
    ((outputs * COTANGENT).sum() + aux.total).backward()


def test_what_is_no_mask_or_has_no_layers_is_refused():
    with pytest.raises(ValueError, match="model must have layers that sparsify has swapped in, got a Model without"):
        padded(Model(), MASK).__enter__()
    with pytest.raises(ValueError, match=r"mask must be bool or integer, 1 for real, got torch\.float32"):
        padded(sparse(), MASK.float()).__enter__()
    for mask, got in ((None, "NoneType"), (MASK.tolist(), "list"), (MASK.to(torch.complex64), r"torch\.complex64")):
        with pytest.raises(ValueError, match=f"mask must be bool or integer, .*, got {got}"):
            padded(sparse(), mask).__enter__()


@pytest.mark.compile
def test_compiled_models_are_told_of_padding():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = sparse()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for mask in (MASK, MASK.flip(0), MASK):
        with collect_aux_losses() as aux, padded(model, mask):
            outputs = compiled(X)
        expected, total = by_hand(model, X, mask)
        torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
        assert_equal_gradients(model, (outputs * COTANGENT).sum() + aux.total, (expected * COTANGENT).sum() + total)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_blocks_of_st_moe_can_be_swapped_in():
    model = sparsify(Model(), Feed, lambda ffn: SparseMoEBlock(make()))
    with collect_aux_losses() as aux:
        model(X.float())
    assert aux.total.item() > 0.5


@pytest.mark.compile
def test_compiled_models_give_the_same_losses_without_recompiling():
    torch._dynamo.reset()
    model = sparse()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x in (X, X.flip(0)):
            with collect_aux_losses() as aux:
                outputs = compiled(x)
            expected, total = by_hand(model, x)
            torch.testing.assert_close(aux.total.double(), total, rtol=1e-12, atol=0)
            assert_equal_gradients(model, (outputs * COTANGENT).sum() + aux.total, (expected * COTANGENT).sum() + total)


class Trainer:
    """What `AuxLossTrainer` asks of transformers' Trainer.

    The Trainer divides a loss by the accumulated batches unless the model did.
    """

    current_gradient_accumulation_steps = 4

    def __init__(self, model_accepts_loss_kwargs, compute_loss_func=None, loss_is_scaled_for_ga=None):
        self.model_accepts_loss_kwargs, self.compute_loss_func = model_accepts_loss_kwargs, compute_loss_func
        self.loss_is_scaled_for_ga = loss_is_scaled_for_ga

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(inputs)
        return (outputs.sum(), outputs) if return_outputs else outputs.sum()


class SparseTrainer(AuxLossTrainer, Trainer):
    pass


@pytest.mark.parametrize(
    ("settings", "items", "parts"),
    [
        ({"model_accepts_loss_kwargs": True}, 10, 4),
        ({"model_accepts_loss_kwargs": True}, None, 1),
        ({"model_accepts_loss_kwargs": False}, 10, 1),
        ({"model_accepts_loss_kwargs": False, "compute_loss_func": print}, 10, 4),
        ({"model_accepts_loss_kwargs": True, "loss_is_scaled_for_ga": False}, 10, 1),
        ({"model_accepts_loss_kwargs": False, "loss_is_scaled_for_ga": True}, None, 4),
    ],
)
def test_the_trainers_loss_is_divided_once(settings, items, parts):
    model = sparse()
    outputs, total = by_hand(model, X)
    loss = SparseTrainer(**settings).compute_loss(model, X, num_items_in_batch=items)
    torch.testing.assert_close(loss, outputs.sum() + total / parts, rtol=1e-10, atol=0)
