"""Sparse layers in Hugging Face models: loss and gradients against losses added by hand; Trainer; saving, loading."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration, TrainingArguments

from st_moe_pytorch import MoE
from st_moe_pytorch.tools.swap import SparseFeedForward, collect_aux_losses, padded, sparsify, swapped

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from finetune_gpt2 import SparseGPT2, SparseTrainer, swap_in, windows

DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT2 = GPT2Config(
    vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, **DROPOUT
)
GPT2.num_experts = 4
T5 = T5Config(
    vocab_size=40,
    d_model=16,
    d_kv=8,
    d_ff=32,
    num_layers=2,
    num_heads=2,
    dropout_rate=0.0,
    decoder_start_token_id=0,
    pad_token_id=0,
)
IDS = torch.randint(1, 40, (4, 16), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS.flip(1)}


def deterministic(ffn=None):
    moe = MoE(16, 4, balance_loss_coef=0.3)
    moe.gate.policy_train = "threshold"
    return moe


def gpt2():
    torch.manual_seed(0)
    return sparsify(GPT2LMHeadModel(GPT2), "transformer.h.*.mlp", deterministic).train()


def t5():
    torch.manual_seed(0)
    return sparsify(T5ForConditionalGeneration(T5), "**.DenseReluDense", deterministic).train()


def losses_by_hand(model, batch):
    """The model's loss, and those of its layers, by forward hooks."""
    found = []
    layers = [module for module in model.modules() if isinstance(module, SparseFeedForward)]
    hooks = [
        layer.moe.register_forward_hook(lambda module, args, result: found.append(result.total_aux_loss))
        for layer in layers
    ]
    with collect_aux_losses():  # which is tested against this
        loss = model(**batch).loss
    for hook in hooks:
        hook.remove()
    assert len(found) == len(layers) >= 2
    return loss, sum(found)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("build", [gpt2, t5])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_losses_and_gradients_are_those_of_the_layers(build, checkpointed):
    model = build().double()
    loss, aux_loss = losses_by_hand(model, BATCH)
    expected = gradients(model, loss + aux_loss)
    assert aux_loss.item() > 0.5
    if checkpointed:
        model.activation_checkpointing_enable()
    with collect_aux_losses() as aux:
        loss = model(**BATCH).loss
    torch.testing.assert_close(aux.total.double(), aux_loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradients(model, loss + aux.total), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("build", [gpt2, t5])
def test_a_training_loop_learns_a_batch(build):
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        with collect_aux_losses() as aux:
            loss = model(**BATCH).loss
        optimizer.zero_grad()
        (loss + aux.total).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def arguments(path, **more):
    return TrainingArguments(
        output_dir=str(path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=0.0,
        optim="sgd",
        **more,
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_takes_the_steps_of_a_plain_loop(tmp_path, accumulate):
    examples = windows(torch.randint(1, 40, (16 * 12,), generator=torch.Generator().manual_seed(1)), 16)
    model = gpt2()
    settings = arguments(tmp_path, gradient_accumulation_steps=accumulate, train_sampling_strategy="sequential")
    SparseTrainer(model=model, args=settings, train_dataset=examples).train()
    theirs = gpt2()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=1e-2)
    for step in range(3):
        for number in range(accumulate):
            place = 2 * (step * accumulate + number)
            ids = torch.stack([example["input_ids"] for example in examples[place : place + 2]])
            loss, aux_loss = losses_by_hand(
                theirs, {"input_ids": ids, "labels": ids, "num_items_in_batch": ids.numel() * accumulate}
            )
            (loss + aux_loss / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
    state, start = theirs.state_dict(), gpt2().state_dict()
    router = "transformer.h.0.mlp.moe.gate.to_gates.weight"
    assert (state[router] - start[router]).abs().max() > 1e-4
    torch.testing.assert_close(model.state_dict(), state, rtol=1e-4, atol=1e-6)


def test_trainer_evaluates_without_auxiliary_losses(tmp_path):
    model = gpt2()
    trainer = SparseTrainer(model=model, args=arguments(tmp_path))
    loss, outputs = trainer.compute_loss(model, BATCH, return_outputs=True)
    assert loss > outputs["loss"] + 0.1
    loss, outputs = trainer.compute_loss(model.eval(), BATCH, return_outputs=True)
    assert loss == outputs["loss"]


def test_saved_models_load_equal(tmp_path):
    torch.manual_seed(0)
    model = SparseGPT2(GPT2).eval()
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded, report = SparseGPT2.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(loaded.eval()(IDS).logits, model(IDS).logits)


def test_a_dense_model_swapped_from_dense_says_the_same():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2).double().eval()
    expected = model(IDS).logits
    torch.testing.assert_close(swap_in(model)(IDS).logits, expected, rtol=1e-12, atol=1e-12)


def test_generation_goes_on_with_a_cache():
    model = gpt2().eval()
    model.double()
    for layer in model.transformer.h:
        layer.mlp.moe.gate.capacity_factor_eval = None
    cached, whole = (
        model.generate(IDS[:, :4], max_new_tokens=8, do_sample=False, use_cache=use, pad_token_id=0)
        for use in (True, False)
    )
    assert torch.equal(cached, whole)


def test_a_padded_batch_of_t5_trains_as_its_sequences_alone():
    model = sparsify(T5ForConditionalGeneration(T5), "**.DenseReluDense", lambda ffn: MoE.from_dense(ffn, 16, 4))
    model.double().train()
    for layer in swapped(model).values():
        layer.router_z_loss_coef = 0.0  # a mean over tokens, where the balance loss is one over sequences
    lengths = ((8, 16), (5, 11))  # read and written
    mask, decoder_mask = (torch.arange(16) < torch.tensor(each)[:, None] for each in zip(*lengths, strict=True))
    ids, labels = IDS[:2].where(mask, 0), BATCH["labels"][:2].where(decoder_mask, -100)
    with padded(model.encoder, mask), padded(model.decoder, decoder_mask), collect_aux_losses() as aux:
        outputs = model(input_ids=ids, attention_mask=mask.long(), labels=labels)
        got = gradients(model, outputs.logits[decoder_mask].square().sum() + aux.total)
    logits, alone = [], 0.0
    for row, (read, written) in enumerate(lengths):
        with collect_aux_losses() as one:
            part = model(input_ids=ids[row : row + 1, :read], labels=labels[row : row + 1, :written])
        logits.append(part.logits[0])
        alone = alone + one.total / 2
    expected = gradients(model, torch.cat(logits).square().sum() + alone)
    torch.testing.assert_close(outputs.logits[decoder_mask], torch.cat(logits), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(aux.total, alone, rtol=1e-10, atol=0)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


class PaddedTrainer(SparseTrainer):
    def training_step(self, model, inputs, *others):
        with padded(model, inputs["attention_mask"]):
            return super().training_step(model, inputs, *others)

    def prediction_step(self, model, inputs, *others, **named):
        with padded(model, inputs["attention_mask"]):
            return super().prediction_step(model, inputs, *others, **named)


def test_a_trainer_runs_its_steps_in_a_block(tmp_path):
    model, seen = gpt2(), []
    model.transformer.h[1].mlp.moe.register_forward_pre_hook(
        lambda layer, args, named: seen.append((layer.training, named["mask"].sum().item())), with_kwargs=True
    )
    ids, mask = IDS[0], torch.arange(16) < 11
    rows = [{"input_ids": ids, "labels": ids.where(mask, -100), "attention_mask": mask.long()}] * 2
    trainer = PaddedTrainer(model, arguments(tmp_path), train_dataset=rows, eval_dataset=rows[:1])
    trainer.train()
    trainer.evaluate()
    assert seen == [(True, 22)] * 3 + [(False, 11)]
