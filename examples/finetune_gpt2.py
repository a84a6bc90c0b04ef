"""Fine-tune a GPT-2 whose feed-forwards are swapped for sparse layers, with transformers.Trainer.

    pip install -e '.[integrations]'
    python examples/finetune_gpt2.py                             # a small model of random weights: half a minute
    python examples/finetune_gpt2.py --model gpt2 --text FILE    # a trained one, from the hub or a directory

Experts start as copies of the dense feed-forwards, so that training starts from what the model could do before.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from st_moe_pytorch import MoE
from st_moe_pytorch.tools.swap import AuxLossTrainer, sparsify
from st_moe_pytorch.tools.watch import record_routing, routing_stats, warn_of_collapse


def swap_in(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    config = model.config
    return sparsify(model, "transformer.h.*.mlp", lambda ffn: MoE.from_dense(ffn, config.n_embd, config.num_experts))


class SparseGPT2(GPT2LMHeadModel):
    """GPT-2 with sparse layers, as a class, so that from_pretrained can load what save_pretrained saved."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        swap_in(self)


class SparseTrainer(AuxLossTrainer, Trainer):
    """Trainer that adds the auxiliary losses of sparse layers to the loss."""


def windows(ids: Tensor, length: int) -> list[dict[str, Tensor]]:
    """A text of token numbers (t) as examples of that length."""
    return [{"input_ids": window, "labels": window} for window in ids[: len(ids) // length * length].view(-1, length)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--model", help="name or directory of a trained GPT-2; None: a small one of random weights, on bytes"
    )
    parser.add_argument(
        "--text", type=Path, default=Path(sysconfig.get_path("stdlib"), "argparse.py"), help="file to train on"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/finetune_gpt2"), help="directory that gets the model")
    parser.add_argument("--experts", type=int, default=8, help="experts of a layer")
    parser.add_argument("--steps", type=int, default=100, help="updates")
    args = parser.parse_args()

    text = args.text.read_text(encoding="utf-8")
    if args.model:
        model, tokenizer = GPT2LMHeadModel.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
        ids = tokenizer(text, return_tensors="pt").input_ids[0]
    else:
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=256, n_positions=128, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        )
        ids = torch.tensor(list(text.encode()))
    model.config.num_experts = args.experts
    examples = windows(ids, min(model.config.n_positions, 256))
    held_out = max(len(examples) // 10, 1)

    trainer = SparseTrainer(
        model=swap_in(model),
        args=TrainingArguments(
            output_dir=str(args.out), max_steps=args.steps, per_device_train_batch_size=8,
            learning_rate=1e-3, lr_scheduler_type="cosine",
            warmup_steps=args.steps // 10, logging_steps=10, save_strategy="no", report_to=[], seed=0,
        ),
        train_dataset=examples[:-held_out],
        eval_dataset=examples[-held_out:],
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    with record_routing(model) as records:
        after = trainer.evaluate()["eval_loss"]
    stats = routing_stats(records)
    for layer, counted in stats.items():
        print(f"{layer}: experts get {counted.load().min():.1%} to {counted.load().max():.1%} of the choices")
    warn_of_collapse(stats)
    trainer.save_model()
    print(
        f"validation loss {before:.3f} before, {after:.3f} after; "
        f"SparseGPT2.from_pretrained('{args.out}') loads the model"
    )


if __name__ == "__main__":
    main()
