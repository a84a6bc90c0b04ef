"""Layers as Mixtral's of transformers and back, against what transformers computes."""

import pytest
import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from st_moe_pytorch import Expert, MoE, SparseMoEBlock, TopNGating
from st_moe_pytorch.layers import GEGLU
from st_moe_pytorch.tools.export import export_mixtral, import_mixtral
from st_moe_pytorch.tools.swap import SparseFeedForward, sparsify
from st_moe_pytorch.tools.upcycle import as_expert

DIM, EXPERTS = 16, 5


def config(**changes):
    experts = {"num_local_experts": EXPERTS, "intermediate_size": int(DIM * 8 / 3), "hidden_act": "gelu"}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    settings = {"hidden_size": DIM, "vocab_size": 40, "num_hidden_layers": 2, "pad_token_id": 0}
    return MixtralConfig(**settings | experts | heads | {"experts_implementation": "eager"} | changes)


def experts(**changes):
    return [Expert(DIM, **{"bias": False} | changes) for _ in range(EXPERTS)]


def layer(top_n=2, made=None, **gating):
    settings = {"policy_eval": "all", "capacity_factor_eval": None} | gating
    moe = MoE(DIM, EXPERTS, gate=TopNGating(DIM, EXPERTS, top_n=top_n, **settings), experts=made or experts()).eval()
    for geglu in (module for module in moe.modules() if isinstance(module, GEGLU)):
        nn.init.uniform_(geglu.mult_bias, 0.5, 2.0)
    return moe


def block_of(state, **changes):
    block = MixtralSparseMoeBlock(config(**changes)).eval()
    block.load_state_dict(state, strict=True)
    return block


@pytest.mark.parametrize("top_n", [2, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_exported_layer_computes_the_same_in_transformers(top_n, dropout):
    moe = layer(top_n, experts(dropout=dropout))
    block, x = block_of(export_mixtral(moe), num_experts_per_tok=top_n), torch.randn(3, 50, DIM)
    expected = moe(x).outputs
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_n", [2, 3])
@pytest.mark.parametrize(("hidden", "dtype"), [(1, torch.float32), (23, torch.float32), (24, torch.bfloat16)])
def test_a_round_trip_is_exact(top_n, hidden, dtype):
    block = MixtralSparseMoeBlock(config(intermediate_size=hidden, num_experts_per_tok=top_n)).to(dtype)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    moe = import_mixtral(block.eval())
    assert moe.gate.top_n == top_n
    assert not moe.training
    torch.testing.assert_close(export_mixtral(moe), dict(block.state_dict()), rtol=0, atol=0)
    if dtype == torch.float32:
        x = torch.randn(3, 50, DIM)
        torch.testing.assert_close(moe(x).outputs, block(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moe.train()(x).outputs, block(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    assert all(parameter.any() for parameter in moe.parameters())


def test_any_number_of_hidden_units_can_be_imported():
    for hidden in range(1, 60):
        block = MixtralSparseMoeBlock(config(hidden_size=22, intermediate_size=hidden, num_local_experts=2))
        assert import_mixtral(block).experts.experts[1].net[2].in_features == hidden


def test_a_layer_comes_back_with_its_outputs():
    moe = layer()
    again = import_mixtral(block_of(export_mixtral(moe)))
    x = torch.randn(2, 20, DIM)
    torch.testing.assert_close(again(x).outputs, moe(x).outputs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "silu"])
def test_a_block_is_imported_with_its_activation_and_its_gradients(activation):
    block = MixtralSparseMoeBlock(config(hidden_act=activation)).double().train()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    moe = import_mixtral(block)
    x, y = (torch.randn(2, 9, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    x.requires_grad_(), y.requires_grad_()
    cotangent = torch.randn_like(x)
    (block(x) * cotangent).sum().backward()
    outputs = moe(y).outputs
    (outputs * cotangent).sum().backward()
    torch.testing.assert_close(outputs, block(x), rtol=1e-5, atol=1e-5)  # its router computes in float32
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moe.gate.to_gates.weight.grad, block.gate.weight.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_n", [2, 3])
def test_a_dense_mistral_becomes_a_mixtral(top_n):
    sizes = {"hidden_size": DIM, "intermediate_size": 24, "vocab_size": 40, "num_hidden_layers": 2, "pad_token_id": 0}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
    sizes |= {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "rms_norm_eps": 1e-6, "sliding_window": 8}
    torch.manual_seed(0)
    model, ids = MistralForCausalLM(MistralConfig(**sizes)).eval(), torch.randint(1, 40, (2, 12))
    dense = model(ids).logits
    sparsify(
        model,
        "model.layers.*.mlp",
        lambda ffn: MoE.from_dense(as_expert(ffn), DIM, 4, gating_top_n=top_n, noise=0.2),
    )
    expected = model(ids).logits
    assert (expected - dense).abs().max() > 0.01  # the noise, so that experts differ
    settings = {"num_local_experts": 4, "num_experts_per_tok": top_n, "experts_implementation": "eager"}
    mixtral = MixtralForCausalLM(MixtralConfig(**sizes, **settings)).eval()
    mixtral.load_state_dict(export_mixtral(model), strict=True)
    torch.testing.assert_close(mixtral(ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize(("hidden", "products"), [(42, "eager"), (40, "grouped_mm")])
def test_a_whole_model_there_and_back(hidden, products, activation, tmp_path):
    sizes = config(
        intermediate_size=hidden, experts_implementation=products, initializer_range=0.3, hidden_act=activation
    )
    torch.manual_seed(0)
    ids = torch.randint(1, 40, (2, 12))
    original = MixtralForCausalLM(sizes).eval()
    expected = original(ids).logits
    state = {name: t.clone() for name, t in original.state_dict().items()}
    words = original.generate(ids, max_new_tokens=8, do_sample=False)

    for number, decoder in enumerate(original.model.layers):
        decoder.mlp = SparseFeedForward(import_mixtral(decoder.mlp), f"layers.{number}.mlp")
    original.eval()
    torch.testing.assert_close(original(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(original.generate(ids, max_new_tokens=8, do_sample=False), words)

    exported = export_mixtral(original)
    torch.testing.assert_close(exported, state, rtol=0, atol=0)
    model = MixtralForCausalLM(sizes).eval()
    model.load_state_dict(exported, strict=True)
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), words)
    model.save_pretrained(tmp_path)
    loaded = MixtralForCausalLM.from_pretrained(tmp_path, experts_implementation=products).eval()
    assert torch.equal(loaded(ids).logits, expected)


def test_names_are_those_of_the_model():
    model = nn.ModuleDict({"norm": nn.LayerNorm(DIM), "a": layer(), "b": SparseFeedForward(layer(), "b")})
    weights = ["gate.weight", "experts.gate_up_proj", "experts.down_proj"]
    exported = {f"{name}.{weight}" for name in "ab" for weight in weights}
    assert set(export_mixtral(model)) == exported | {"norm.weight", "norm.bias"}
    assert list(export_mixtral(model["b"])) == weights
    shared = nn.ModuleDict({"a": model["a"], "twice": model["a"]})
    assert set(export_mixtral(shared)) == {f"{name}.{weight}" for name in ("a", "twice") for weight in weights}


class Other(TopNGating):
    pass


REFUSED = {
    "biases": (
        lambda: layer(made=experts(bias=True)),
        r"bias=False, got experts.experts.0.net.0.bias, .*, experts.experts.4.net.2.bias",
    ),
    "norm": (lambda: layer(made=experts(prenorm=True)), "experts must have prenorm=False"),
    "sizes": (lambda: layer(made=[*experts()[1:], *experts(hidden_mult=2)[1:2]]), "must be Experts of one shape"),
    "make": (lambda: layer(made=[nn.Linear(DIM, DIM) for _ in range(EXPERTS)]), "must be Experts of one shape"),
    "policy": (lambda: layer(policy_eval="threshold"), "gate.policy_eval must be 'all', got 'threshold'$"),
    "capacity": (lambda: layer(capacity_factor_eval=2.0), "gate.capacity_factor_eval must be None, got 2.0"),
    "score": (lambda: layer(score="sigmoid"), "gate.score must be 'softmax', got 'sigmoid'"),
    "gates": (lambda: layer(normalize_gates=False), "gate.normalize_gates must be True, got False"),
    "bias": (lambda: layer(balance_bias=True), "gate.balance_bias must be False, got True"),
    "topk": (lambda: layer(differentiable_topk=True), "gate.differentiable_topk must be False, got True"),
    "one choice": (lambda: layer(1), "gate.top_n must be 2 or more"),
    "two things": (lambda: layer(score="sigmoid", policy_eval="none"), "gate.policy_eval must .*; gate.score must"),
    "defaults": (lambda: MoE(DIM, EXPERTS), "gate.policy_eval .*; gate.capacity_factor_eval .*; .* bias=False"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_mixtral_does_not_know_is_refused_by_name(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"^mlp cannot be one of Mixtral's: .*{message}"):
        export_mixtral(nn.ModuleDict({"mlp": make()}))


def test_layers_that_were_changed_are_refused():
    def assert_refused(message, moe):
        with pytest.raises(ValueError, match=message):
            export_mixtral(moe)

    moe = layer()
    moe.experts.experts[1].net[0].register_forward_hook(print)
    assert_refused("^the layer cannot .* Experts of one shape and activation, without hooks and adapters", moe)
    moe = layer()
    moe.shared_expert = nn.Linear(DIM, DIM)
    assert_refused("must have no shared_expert", moe)
    moe = layer()
    moe.experts = nn.Identity()
    assert_refused("must be in an Experts, got a Identity", moe)
    moe = layer()
    moe.gate = Other(DIM, EXPERTS, policy_eval="all", capacity_factor_eval=None)
    assert_refused("gate must be a plain TopNGating, got a Other", moe)
    moe = layer()
    moe.gate.to_gates = nn.Linear(DIM, EXPERTS)
    assert_refused("gate.to_gates must be as TopNGating makes it, got a Linear with changes", moe)
    moe = layer()
    moe.gate.to_gates.register_forward_hook(lambda module, inputs, logits: -logits)
    assert_refused("gate.to_gates must be as TopNGating makes it, got a RouterLinear with changes", moe)
    for name in ("route", "decide", "topk", "scores"):
        moe = layer()
        setattr(moe.gate, name, getattr(moe.gate, name))
        assert_refused("gate must be a plain TopNGating, got a TopNGating with changes", moe)
    moe = layer()
    moe.gate.eps = 1e-3
    assert_refused("gate.eps must be 1e-6 or less, since Mixtral divides gates by their sum alone, got 0.001", moe)
    assert_refused("must not be in a SparseMoEBlock", SparseMoEBlock(layer()))
    two = nn.ModuleList([layer(), layer(made=experts(activation="silu"))])
    assert_refused("model must have one activation in all layers, got gelu, silu", two)
    assert_refused("model must contain MoE layers, got a Linear without any", nn.Linear(2, 2))


def test_blocks_that_are_none_of_ours_are_refused():
    for activation in ("relu", "quick_gelu"):
        with pytest.raises(ValueError, match=r"block must have an activation that Experts have, gelu, .*, got "):
            import_mixtral(MixtralSparseMoeBlock(config(hidden_act=activation)))
    with pytest.raises(ValueError, match="block must have num_experts_per_tok of 2 or more, got 1"):
        import_mixtral(MixtralSparseMoeBlock(config(num_experts_per_tok=1)))
    with pytest.raises(ValueError, match=r"block must be a MixtralSparseMoeBlock of transformers 5, got a Linear: .*"):
        import_mixtral(nn.Linear(2, 2))
