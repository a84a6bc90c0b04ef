"""Initial values, the parameters that are tuned, and dropout in experts."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from st_moe_pytorch import Expert, Experts, MoE, SparseMoEBlock
from st_moe_pytorch.tools.finetune import parameter_subset, set_expert_dropout, switch_init
from st_moe_pytorch.tools.swap import SparseFeedForward, sparsify

DIM = 16


class CausalSelfAttention(nn.Linear):
    """Attention by its name, as models of others have it."""


class MLP(nn.Sequential):
    pass


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.attention = CausalSelfAttention(DIM, DIM)
        self.block = SparseMoEBlock(MoE(DIM, 3, shared_expert=nn.Linear(DIM, DIM)), add_ff_before=True)
        self.mlp = MLP(nn.Linear(DIM, 8), nn.GELU(), nn.Linear(8, DIM))

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        x, loss, *_ = self.block(x)
        return x + self.mlp(x), loss


PARTS = {
    "attention": ("attention.",),
    "feed_forward": ("block.ff_before.", "block.ff_after.", "mlp."),
    "moe": ("block.moe.gate.", "block.moe.experts."),
    "all": ("",),
    "non_moe": ("norm.", "attention.", "block.moe_prenorm.", "block.moe.shared_expert.", "block.ff_", "mlp."),
}


def draw():
    return torch.randn(2, 12, DIM)


@pytest.mark.parametrize("subset", PARTS)
def test_a_subset_is_trained_and_the_rest_stays_with_an_optimizer_that_has_a_state(subset):
    model = Layer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)

    def step():
        outputs, loss = model(draw())
        (outputs.square().sum() + loss).backward()
        optimizer.step()

    step()
    trained = parameter_subset(model, subset)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step()
    names = [name for name in before if name.startswith(PARTS[subset])]
    assert [id(parameter) for parameter in trained] == [id(model.get_parameter(name)) for name in names]
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert changed == names
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == names


def test_subsets_follow_each_other():
    model = Layer()
    parameter_subset(model, "attention")
    assert len(parameter_subset(model, "all")) == len(list(model.parameters()))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_torchs_own_layers_have_attention_and_feed_forwards():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, 2, 24), 4, enable_nested_tensor=False)
    sparsify(model, nn.TransformerEncoderLayer, lambda ffn: SparseMoEBlock(MoE(DIM, 2)), every=2)

    def trained(subset):
        parameter_subset(model, subset)
        return {name.removeprefix("layers.") for name, parameter in model.named_parameters() if parameter.requires_grad}

    linear = {f"{i}.linear{j}.{name}" for i in (0, 2) for j in (1, 2) for name in ("weight", "bias")}
    after = {name for name in trained("all") if ".ff_after." in name}
    assert trained("feed_forward") == linear | after
    assert len(after) == 12
    attention = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    assert trained("attention") == {f"{i}.self_attn.{name}" for i in range(4) for name in attention}


def test_tied_parameters_and_those_of_integers():
    model = Layer()
    model.head = nn.Linear(DIM, DIM, bias=False)
    model.head.weight = model.attention.weight
    model.register_parameter("table", nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False))
    assert [parameter.shape for parameter in parameter_subset(model, "attention")] == [(DIM, DIM), (DIM,)]
    assert model.head.weight.requires_grad
    parameter_subset(model, "all")
    assert not model.table.requires_grad


@pytest.mark.parametrize("subset", ["moe", "non_moe", "attention", "feed_forward"])
def test_what_a_model_does_not_have_is_said(subset):
    model = nn.Sequential(nn.Linear(DIM, DIM))
    with pytest.raises(
        ValueError, match=f"subset='{subset}' must find modules by their class, found none in a Sequential"
    ):
        parameter_subset(model, subset)
    assert model[0].weight.requires_grad
    with pytest.raises(ValueError, match=r"subset must be one of 'all', 'non_moe', .*, got 'experts'"):
        parameter_subset(model, "experts")


class Feed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(DIM, 8), nn.GELU(), nn.Linear(8, DIM))


class Deep(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": Feed()}) for _ in range(layers))


@pytest.mark.parametrize(("layers", "every", "expected"), [(9, 4, [3, 7]), (4, 4, [3]), (3, 1, [0, 1, 2])])
@pytest.mark.parametrize("where", [Feed, "layers.*.mlp", tuple(f"layers.*.mlp.{i}" for i in range(3))], ids=str)
def test_the_last_of_so_many_feed_forwards_is_swapped(layers, every, expected, where):
    model = sparsify(Deep(layers), where, lambda ffn: MoE(DIM, 2), every=every)
    is_sparse = [any(isinstance(module, SparseFeedForward) for module in layer.modules()) for layer in model.layers]
    assert [number for number, sparse in enumerate(is_sparse) if sparse] == expected


def test_too_few_feed_forwards_are_refused():
    with pytest.raises(ValueError, match="where must match every=4 feed-forwards or more to swap any, found 3"):
        sparsify(Deep(3), Feed, lambda ffn: MoE(DIM, 2), every=4)
    with pytest.raises(ValueError, match="every must be a positive number, got 0"):
        sparsify(Deep(3), Feed, lambda ffn: MoE(DIM, 2), every=0)


@pytest.mark.parametrize("prenorm", [False, True])
def test_dropout_is_that_which_experts_could_have_been_built_with(prenorm):
    def layer(p):
        torch.manual_seed(0)
        return MoE(DIM, 3, experts=[Expert(DIM, prenorm=prenorm, dropout=p) for _ in range(3)])

    model = layer(0.0)
    plain, keys, x = copy.deepcopy(model), list(model.state_dict()), draw()

    def outputs(moe):
        torch.manual_seed(1)
        return moe(x).outputs

    for p in (0.4, 0.7):
        set_expert_dropout(model, p)
        assert torch.equal(outputs(model), outputs(layer(p)))
        assert not torch.equal(outputs(model), outputs(plain))
        assert list(model.state_dict()) == keys
        model.load_state_dict(plain.state_dict(), strict=True)
        assert torch.equal(outputs(model.eval()), outputs(plain.eval()))
        model.train(), plain.train()
    set_expert_dropout(model.eval(), 0.4)
    assert not any(module.training for module in model.modules())
    set_expert_dropout(model.train(), 0)
    assert str(model) == str(plain)


def test_only_experts_get_dropout():
    model = Layer()
    dense = str(model.block.ff_after), str(model.block.ff_before), str(model.mlp)
    set_expert_dropout(model, 0.3)
    assert dense == (str(model.block.ff_after), str(model.block.ff_before), str(model.mlp))
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.3] * 3


def test_experts_of_another_make_are_set_by_what_they_have():
    ffn = nn.Sequential(nn.Linear(DIM, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, DIM))
    model = nn.ModuleList([MoE.from_dense(ffn, DIM, 2), MoE(DIM, 2)])
    set_expert_dropout(model, 0.3)
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.3] * 4
    assert ffn[2].p == 0.1
    model.append(MoE(DIM, 2, experts=Experts([nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)])))
    with pytest.raises(ValueError, match="experts must be of class Expert or have a Dropout, got a Linear"):
        set_expert_dropout(model, 0.5)
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.3] * 4
    model[2].experts = ffn  # any module, in place of built experts
    set_expert_dropout(model, 0.2)
    assert ffn[2].p == 0.2


def test_wrong_dropout_is_refused():
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\), got 1"):
        set_expert_dropout(MoE(DIM, 2), 1)
    with pytest.raises(ValueError, match="model must contain MoE layers, got a Linear without any"):
        set_expert_dropout(nn.Linear(DIM, DIM), 0.1)


@pytest.mark.parametrize("scale", [0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_initial_values_are_those_of_switch(scale, dtype):
    moe = MoE(200, 100, experts=[nn.Linear(200, 300) for _ in range(100)]).to(dtype)
    others = {name: p.clone() for name, p in moe.state_dict().items() if "threshold" in name}
    moe.apply(switch_init if scale == 0.1 else partial(switch_init, scale=scale))
    bound = 2 * (scale / 200) ** 0.5
    # a normal distribution within two standard deviations has a variance of 0.7737 times its own
    for weight in (moe.gate.to_gates.weight.double(), moe.experts.experts[7].weight.double()):
        assert weight.abs().max().item() <= bound * 1.005
        assert weight.abs().max().item() > 0.97 * bound
        assert abs(weight.mean().item()) < 0.02 * bound
        assert weight.var().item() == pytest.approx(0.7737 * scale / 200, rel=0.04)
    assert all(not expert.bias.any() for expert in moe.experts.experts)
    assert all(torch.equal(moe.state_dict()[name], other) for name, other in others.items())
    with pytest.raises(ValueError, match="scale must be a positive number, got 0"):
        switch_init(nn.Linear(2, 2), scale=0)
