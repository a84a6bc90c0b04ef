"""Hugging Face models swapped, loaded and saved in any order: right weights or an error, never uninitialised memory."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from st_moe_pytorch import Expert, MoE, SparseMoEBlock
from st_moe_pytorch.tools.swap import collect_aux_losses, sparsify, swapped

DIM = 16
IDS = torch.randint(1, 40, (2, 8), generator=torch.Generator().manual_seed(0))
IMAGES = {
    "pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    "labels": torch.tensor([0, 1]),
}
TEXT = {"input_ids": IDS, "labels": IDS}

# class, settings, where its feed-forwards are, a batch
FAMILIES = {
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(vocab_size=40, n_positions=8, n_embd=DIM, n_layer=2, n_head=2),
        "transformer.h.*.mlp",
        TEXT,
    ),
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=40,
            hidden_size=DIM,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=8,
        ),
        "model.layers.*.mlp",
        TEXT,
    ),
    "bert": (
        BertForSequenceClassification,
        BertConfig(vocab_size=40, hidden_size=DIM, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2),
        ("bert.encoder.layer.*.intermediate", "bert.encoder.layer.*.output.dense"),
        {"input_ids": IDS, "labels": torch.tensor([0, 1])},
    ),
    "t5": (
        T5ForConditionalGeneration,
        T5Config(
            vocab_size=40,
            d_model=DIM,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            pad_token_id=0,
        ),
        "**.DenseReluDense",
        TEXT,
    ),
    "vit": (
        ViTForImageClassification,
        ViTConfig(
            hidden_size=DIM,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        ),
        "vit.layers.*.mlp",
        IMAGES,
    ),
    "opt": (
        OPTForCausalLM,
        OPTConfig(
            vocab_size=40,
            hidden_size=DIM,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
            word_embed_proj_dim=DIM,
        ),
        ("model.decoder.layers.*.fc1", "model.decoder.layers.*.activation_fn", "model.decoder.layers.*.fc2"),
        TEXT,
    ),
}
LAYERS = {"t5": 4}


def swap(model, where):
    return sparsify(model, where, lambda ffn: MoE.from_dense(ffn, DIM, 4))


def sparse_class(family):
    """The family's model with sparse layers from the start, as one writes it to load and save."""
    cls, _, where, _ = FAMILIES[family]

    class Sparse(cls):
        def __init__(self, config):
            super().__init__(config)
            swap(self, where)

    Sparse.__name__ = f"Sparse{cls.__name__}"  # by which transformers knows the loss
    return Sparse


@pytest.fixture(autouse=True)
def garbage():
    """Memory that nobody has written is NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def check_values(model):
    """Everything is initialised: finite, thresholds as built, scales one, experts and routers of a usual size."""
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), name
        if "threshold" in name:
            torch.testing.assert_close(tensor.float(), torch.tensor([0.0, 0.2]), atol=1e-3, rtol=0)
        elif ".moe." in name and name.endswith("weight"):
            assert 1e-3 < tensor.float().std() < 2, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_model_that_is_loaded_and_then_swapped_says_the_same(family, tmp_path):
    cls, config, where, batch = FAMILIES[family]
    torch.manual_seed(0)
    dense = cls(config)
    expected = logits(dense, batch)
    dense.save_pretrained(tmp_path)
    model = swap(cls.from_pretrained(tmp_path), where)
    assert len(swapped(model)) == LAYERS.get(family, 2)
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-5)
    check_values(model)
    with collect_aux_losses() as aux:
        loss = model.train()(**batch).loss
    (loss + aux.total).backward()
    for layer in swapped(model).values():
        assert layer.gate.to_gates.weight.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device_map", [None, "cpu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sparse_model_that_is_saved_loads_equal(family, tmp_path, dtype, device_map):
    _, config, _, batch = FAMILIES[family]
    torch.manual_seed(0)
    model = sparse_class(family)(copy.deepcopy(config)).to(dtype)
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded, report = sparse_class(family).from_pretrained(
        tmp_path, dtype=dtype, device_map=device_map, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    if family == "vit":
        batch = batch | {"pixel_values": batch["pixel_values"].to(dtype)}
    assert torch.equal(logits(loaded, batch), logits(model, batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_checkpoint_in_a_sparse_model_leaves_nothing_without_values(family, tmp_path, dtype):
    """What it has is loaded, what it lacks is initialised."""
    cls, config, _, batch = FAMILIES[family]
    torch.manual_seed(0)
    dense = cls(config)
    dense.save_pretrained(tmp_path)
    loaded, report = sparse_class(family).from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert any("threshold_train" in key for key in report["missing_keys"])
    check_values(loaded)
    state = loaded.state_dict()
    own = [name for name in dense.state_dict() if name in state]
    assert len(own) > 10
    assert all(torch.equal(dense.state_dict()[name].to(dtype), state[name]) for name in own)
    if family == "vit":
        batch = batch | {"pixel_values": batch["pixel_values"].to(dtype)}
    assert logits(loaded, batch).isfinite().all()


def test_routers_and_scales_that_a_checkpoint_lacks_start_as_they_do_elsewhere(tmp_path):
    """By their own rules, not by the model's, to which a router is a linear layer like others."""
    cls, config, where, _ = FAMILIES["gpt2"]

    class SparseGPT2LMHeadModel(cls):
        def __init__(self, config):
            super().__init__(config)
            sparsify(self, where, lambda ffn: SparseMoEBlock(MoE(DIM, 4)))

    cls(config).save_pretrained(tmp_path)
    for block in swapped(SparseGPT2LMHeadModel.from_pretrained(tmp_path)).values():
        parameters = dict(block.named_parameters())
        scales = [parameter for name, parameter in parameters.items() if name.endswith(("gamma", "mult_bias"))]
        assert len(scales) == 7
        assert all((scale == 1).all() for scale in scales)
        assert 0.7 < parameters["moe.gate.to_gates.weight"].abs().max() * DIM**0.5 <= 1


def test_copies_and_pickles_initialise_themselves(tmp_path):
    """What makes transformers initialise sparse layers belongs to the model that it is called for."""
    model = sparse_class("gpt2")(copy.deepcopy(FAMILIES["gpt2"][1]))
    plain = swap(FAMILIES["gpt2"][0](FAMILIES["gpt2"][1]), "transformer.h.*.mlp")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(plain))):
        gate = other.transformer.h[0].mlp.moe.gate
        gate.threshold_train.fill_(torch.nan)
        other._init_weights(gate)
        torch.testing.assert_close(gate.threshold_train, torch.tensor([1e-20, 0.2]))
        expert = Expert(DIM)
        nn.init.zeros_(expert.net[0].bias)
        other._init_weights(expert)
        assert expert.net[0].bias.any()
        norm = nn.LayerNorm(DIM)
        norm.weight.data.fill_(7.0)
        other._init_weights(norm)
        assert (norm.weight == 1).all()


def test_memory_that_a_loader_left_without_values_is_an_error():
    moe = MoE(DIM, 4)
    moe.gate.threshold_eval.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"threshold_eval must lie in \[0, 1\]"):
        moe.eval()(torch.randn(1, 3, DIM))
