"""Which feed-forwards a pattern or a type means, and what is refused since a sparse layer could not take its place."""

import pytest
import torch
from torch import nn

from st_moe_pytorch import MoE
from st_moe_pytorch.tools.find import feed_forwards
from st_moe_pytorch.tools.swap import collect_aux_losses, sparsify, swapped

DIM = 16


def moe(ffn=None):
    return MoE(DIM, 4)


def from_dense(ffn):
    return MoE.from_dense(ffn, DIM, 4)


class Split(nn.Module):
    """A layer that runs its feed-forward's parts itself, as BERT's do, beside another module of the last one's name."""

    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleDict({"output": nn.ModuleDict({"dense": nn.Linear(DIM, DIM)})})
        self.intermediate = nn.Sequential(nn.Linear(DIM, 32), nn.GELU())
        self.output = nn.ModuleDict({"dense": nn.Linear(32, DIM)})

    def forward(self, x):
        x = x + self.attention["output"]["dense"](x)
        return x + self.output["dense"](self.intermediate(x))


def names(model, where):
    return [name for found in feed_forwards(model, where) for name in found.names]


def test_a_star_is_one_name_between_dots_and_two_are_any_number():
    model = nn.ModuleDict({"layer": nn.ModuleList([Split(), Split()])})
    assert names(model, "layer.*.output.dense") == ["layer.0.output.dense", "layer.1.output.dense"]
    assert names(model, "layer.1.**.dense") == ["layer.1.attention.output.dense", "layer.1.output.dense"]
    assert names(model, "**.inter*") == ["layer.0.intermediate", "layer.1.intermediate"]
    assert names(model, "layer.[1-9].intermediate") == ["layer.1.intermediate"]
    assert names(model, "*") == ["layer"]
    assert names(model, "*.intermediate") == []


def test_names_that_begin_alike_are_not_inside_each_other():
    model = nn.ModuleDict({"h": nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(12))})
    assert names(model, "h.*") == [f"h.{number}" for number in range(12)]


def test_a_type_means_what_is_derived_from_it_too():
    assert names(model_of(Wide(DIM, DIM)), nn.Linear) == ["layer.mlp"]


def test_parts_that_the_model_runs_itself_are_swapped_together():
    torch.manual_seed(0)
    model = nn.Sequential(Split(), Split()).double().eval()
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    expected = model(x)
    sparsify(model, ("*.intermediate", "*.output.dense"), from_dense)
    assert set(swapped(model)) == {"0.intermediate", "1.intermediate"}
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert isinstance(model[0].output["dense"], nn.Identity)
    assert isinstance(model[0].attention["output"]["dense"], nn.Linear)


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
@pytest.mark.parametrize("activation", [nn.functional.relu, nn.GELU()])
def test_feed_forwards_of_torchs_own_layers(kind, activation):
    """Also in evaluation without gradients, where torch has a way of its own for layers that it knows."""
    torch.manual_seed(0)
    layers = [kind(DIM, 4, 32, dropout=0.1, activation=activation, batch_first=True) for _ in range(2)]
    model = nn.ModuleList(layers).double().eval()
    x = torch.randn(2, 5, DIM, dtype=torch.float64)

    def run():
        y = x
        for layer in model:
            y = layer(y) if kind is nn.TransformerEncoderLayer else layer(y, x)
        return y

    expected = run()
    sparsify(model, kind, from_dense)
    assert list(swapped(model)) == ["0.linear1", "1.linear1"]
    with torch.no_grad():
        torch.testing.assert_close(run(), expected, rtol=1e-10, atol=1e-10)
        before = run()
        for expert in model[1].linear1.moe.experts.experts:
            expert[3].weight.mul_(2.0)
        assert not torch.allclose(run(), before)
    model.train()
    with collect_aux_losses() as aux:
        run().sum().backward()
    assert aux.total.item() > 0
    assert model[0].linear1.moe.gate.to_gates.weight.grad.any()


def test_a_stack_of_torchs_layers_computes_with_its_sparse_layers_in_evaluation():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, 4, 32, dropout=0.0, batch_first=True), 2)
    padding = torch.arange(5) >= torch.tensor([[5], [3]])
    sparsify(model, "layers.*", moe).double()
    for layer in model.layers:
        layer.linear1.moe.gate.policy_train = layer.linear1.moe.gate.policy_eval = "all"
        layer.linear1.moe.gate.capacity_factor_train = layer.linear1.moe.gate.capacity_factor_eval = None
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    with collect_aux_losses():
        expected = model.train()(x, src_key_padding_mask=padding)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x, src_key_padding_mask=padding)[~padding], expected[~padding])


class Two(nn.Module):
    def forward(self, x, residual):
        return x + residual


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Pooled(nn.Linear):
    def forward(self, x):
        return super().forward(x).mean(dim=1)


class Wide(nn.Linear):
    def forward(self, x, residual=None, *, scale=1.0):
        return super().forward(x) * scale if residual is None else super().forward(x) * scale + residual


class Shifted(nn.Linear):
    def __init__(self, dim, out):
        super().__init__(dim, out)
        self.shift = nn.Buffer(torch.zeros(out))

    def forward(self, x):
        return super().forward(x) + self.shift


class Strict(nn.Linear):
    """A linear layer that, unlike torch's on the meta device, minds the dtype of its input."""

    def forward(self, x):
        return torch.einsum("bnd,hd->bnh", x, self.weight)


class ExpertsOfItsOwn(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(DIM, DIM)])

    def forward(self, x):
        return self.experts[0](x)


class SparseMoeMlp(nn.Linear):
    pass


def model_of(module):
    return nn.ModuleDict({"layer": nn.ModuleDict({"mlp": module})})


REFUSED = {
    "half": (
        nn.Linear(DIM, 32),
        r"layer.mlp maps a width of 16 to 32. If .* name all, the activation too: where=\(first, ..., last\)",
    ),
    "two inputs": (
        Two(),
        "where must match modules of one input, but layer.mlp takes x, residual. If the model runs its parts",
    ),
    "two results": (Pair(DIM, DIM), "where must match modules that return one tensor, but layer.mlp returns a tuple"),
    "experts": (ExpertsOfItsOwn(), "layer.mlp looks like a mixture of experts of the model's own, a ExpertsOfItsOwn"),
    "experts inside": (
        nn.ModuleDict({"block": nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(DIM, DIM)])})}),
        "layer.mlp looks like a mixture of experts of the model's own, a ModuleDict",
    ),
    "name": (SparseMoeMlp(DIM, DIM), "layer.mlp looks like a mixture of experts of the model's own, a SparseMoeMlp"),
    "name inside": (
        nn.Sequential(SparseMoeMlp(DIM, DIM)),
        "layer.mlp looks like a mixture of experts of the model's own, a Sequential",
    ),
    "half with a buffer": (Shifted(DIM, 32), "layer.mlp maps a width of 16 to 32"),
    "half in bfloat16": (Strict(DIM, 32).to(torch.bfloat16), "layer.mlp maps a width of 16 to 32"),
    "one of all tokens": (Pooled(DIM, DIM), "where must match whole feed-forwards, but layer.mlp"),
}


@pytest.mark.parametrize(("module", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_sparse_layer_cannot_replace_is_refused_by_name(module, message):
    model = model_of(module)
    with pytest.raises(ValueError, match=message):
        sparsify(model, "layer.mlp", moe)
    assert model["layer"]["mlp"] is module


def test_parts_of_torchs_layers_and_unequal_numbers_of_parts_are_refused():
    model = nn.Sequential(nn.TransformerEncoderLayer(DIM, 4, 32))
    with pytest.raises(
        ValueError,
        match=r"a whole nn.TransformerEncoderLayer, '0' or its type, to swap its feed-forward, got its linear1",
    ):
        sparsify(model, "*.linear1", moe)
    with pytest.raises(
        ValueError,
        match=r"equally many first, second and further parts .* 2 by '\*.intermediate', 1 by '0.output.dense'",
    ):
        sparsify(nn.Sequential(Split(), Split()), ("*.intermediate", "0.output.dense"), moe)


def test_parts_without_an_activation_are_refused():
    """The model would run it on the results of the sparse layer, and experts would be linear."""
    model = nn.ModuleDict({"h": nn.ModuleList([Split() for _ in range(2)])})
    with pytest.raises(ValueError, match=r"name the activation too, got linear layers only, h.0.\S+, h.0.\S+: name it"):
        sparsify(model, ("h.*.intermediate.0", "h.*.output.dense"), moe)
    assert not swapped(model)
    with pytest.raises(ValueError, match="name the activation too"):
        feed_forwards(nn.ModuleDict({"a": nn.Sequential(nn.Linear(DIM, 32), nn.Dropout()), "b": Conv1D()}), ("a", "b"))


class Conv1D(nn.Module):
    """What transformers call a linear layer."""


class Activated(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


def test_linear_layers_that_do_more_are_parts_with_an_activation():
    hooked = nn.Linear(DIM, 32)
    hooked.register_forward_hook(lambda module, inputs, y: y.relu())
    for first in (Activated(DIM, 32), hooked):
        assert feed_forwards(nn.ModuleDict({"a": first, "b": nn.Linear(32, DIM)}), ("a", "b"))
    layer = nn.TransformerEncoderLayer(DIM, 4, 32, activation=nn.Identity())
    assert feed_forwards(nn.Sequential(layer), nn.TransformerEncoderLayer)


def test_a_layer_in_place_of_a_function_that_builds_it_is_refused():
    for make in (MoE(DIM, 4), MoE):
        with pytest.raises(ValueError, match="make must be a function that builds a layer for each feed-forward"):
            sparsify(model_of(nn.Linear(DIM, DIM)), "layer.mlp", make)


def test_a_miss_names_what_is_near_with_stars_for_numbers():
    model = nn.ModuleDict({"h": nn.ModuleList([Split() for _ in range(30)])})
    with pytest.raises(ValueError, match="where must match") as caught:
        sparsify(model, "h.*.intermediat", moe)
    assert "there are h.*.intermediate, h.*.intermediate.*, " in str(caught.value)
    assert len(str(caught.value)) < 400
    with pytest.raises(ValueError, match=r"got <class .*Conv1d'>; there are "):
        sparsify(model, nn.Conv1d, moe)


def test_what_has_a_default_is_no_second_input():
    sparsify(model_of(Wide(DIM, DIM)), "layer.mlp", moe)


def test_hooks_see_no_tensors_without_data():
    ffn, seen = nn.Sequential(nn.Linear(DIM, DIM)), []
    for hooked in (ffn, ffn[0]):
        handle = hooked.register_forward_hook(lambda module, inputs, y: seen.append(y))
        sparsify(model_of(ffn), "layer.mlp", moe)
        handle.remove()
    assert not seen


def test_a_layer_says_its_name_where_its_model_gives_it_something_else():
    layer = sparsify(model_of(nn.Identity()), "layer.mlp", moe)["layer"]["mlp"].eval()
    x = torch.randn(2, 3, DIM)
    assert torch.equal(layer(x, None, deep_embed=None), layer(x))
    with pytest.raises(
        ValueError,
        match=r"layer.mlp: a sparse layer takes tokens and mask=, but its model gives it argument 2, scale too",
    ):
        layer(x, x, scale=2.0)
    with pytest.raises(ValueError, match=r"layer.mlp: x must have shape \(..., 16\), got \(2, 3, 15\)"):
        layer(x[..., 1:])
    narrow = sparsify(
        model_of(nn.Identity()), "layer.mlp", lambda ffn: MoE(DIM, 1, gating_top_n=1, experts=[nn.Linear(DIM, 8)])
    )
    with pytest.raises(ValueError, match=r"layer.mlp: experts must keep the width of a feed-forward, 16, got 8"):
        narrow["layer"]["mlp"].eval()(x)
    assert "in place of layer.mlp" in str(layer)


def test_some_parts_of_torchs_layers_are_not_enough():
    """What stands between them would act on the results of the sparse layer."""
    model = nn.Sequential(nn.TransformerEncoderLayer(DIM, 4, 32))
    with pytest.raises(
        ValueError,
        match=r"a whole nn.TransformerEncoderLayer, '0' or its type, to swap its feed-forward, got its linear1",
    ):
        sparsify(model, ("*.linear1", "*.linear2"), moe)


class Committee(ExpertsOfItsOwn):
    """Experts that only their name tells of."""


def test_experts_are_known_by_their_name_too():
    with pytest.raises(ValueError, match=r"layer.mlp looks like a mixture of experts of the model's own, a Committee"):
        sparsify(model_of(Committee()), "layer.mlp", moe)


@pytest.mark.parametrize("where", [("layer.mlp", nn.Linear), ["layer.mlp"], 3, ()])
def test_what_is_neither_patterns_nor_types_is_refused(where):
    with pytest.raises(ValueError, match="where must be a pattern, a type, or a tuple of either, got"):
        sparsify(model_of(nn.Linear(DIM, DIM)), where, moe)
