"""Upcycle a dense language model into a sparse one and see whether that beats training it on (Komatsuzaki et al. 2022).

    python examples/upcycle_lm.py                # train a dense model, then go on in three ways: 4 minutes on one core
    python examples/upcycle_lm.py --seeds 0 1 2

The sparse model starts where the dense one ended: its experts are copies of the dense feed-forwards, so that a token
uses two instead of one, and takes longer. It is compared with the dense model after as many further steps, and after as
many as take the same time.
"""

import copy
import math
import time
from dataclasses import dataclass, replace

import runs
import torch
from language_model import DenseBlock, LanguageModel
from optimizers import adamw
from options import option, parse
from processes import processes
from torch import Tensor, nn
from tqdm import tqdm
from train_lm import TOP_N, WIDE, Settings, evaluate, learning_rate, training_batch, update

from st_moe_pytorch import MoE
from st_moe_pytorch.tools.swap import collect_aux_losses, sparsify
from st_moe_pytorch.tools.watch import record_routing, routing_stats, warn_of_collapse


@dataclass(frozen=True)
class Upcycling(Settings):
    """The options of the command line, beside those of `train_lm` that are sizes."""

    seeds: tuple[int, ...] = option((0,), "a run for each")
    steps: int = option(400, "steps of the dense model before it is upcycled")
    more_steps: int = option(400, "steps after that")
    noise: float = option(0.0, "noise of the copies, as a multiple of the spread of each parameter", positive=False)


class WithAuxLosses(nn.Module):
    """A model with layers that were swapped: their auxiliary losses are collected, since it does not know of them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with collect_aux_losses() as aux:
            logits, _ = self.model(x)
        return logits, aux.total


def train(
    model: nn.Module,
    texts: list[Tensor],
    settings: Upcycling,
    steps: int,
    first: int,
    name: str,
) -> tuple[float, float]:
    """Train for some steps, on batches from the first one on; bits per byte in validation, and seconds of training."""
    model = WithAuxLosses(model)
    optimizers = [adamw(model, settings.lr)]
    schedule = replace(settings, steps=steps)
    start = time.perf_counter()
    for step in tqdm(range(steps), desc=name, leave=False):
        batch = training_batch(texts[0], first + step, settings)
        update(model, optimizers, batch, learning_rate(step, schedule), settings)
    seconds = time.perf_counter() - start
    return evaluate(model, texts[1], settings), seconds


def upcycle(dense: nn.Module, settings: Upcycling) -> nn.Module:
    """The sparse model that computes what the dense one does."""

    def make(ffn: nn.Module) -> MoE:
        return MoE.from_dense(ffn, settings.dim, settings.experts, noise=settings.noise, gating_top_n=TOP_N)

    return sparsify(copy.deepcopy(dense), "blocks.*.wide", make)


def compare(settings: Upcycling, texts: list[Tensor]) -> dict[str, float]:
    """Bits per byte in validation at the start and at the end of each way to go on."""
    torch.manual_seed(settings.seed)
    dense = LanguageModel(settings.dim, settings.depth, lambda: DenseBlock(settings.dim, TOP_N))
    start, _ = train(dense, texts, settings, settings.steps, 0, "dense")
    sparse, longer = upcycle(dense, settings), copy.deepcopy(dense)
    upcycled, first = evaluate(sparse, texts[1], settings), settings.steps
    if settings.noise == 0 and not math.isclose(start, upcycled, rel_tol=1e-5):
        raise AssertionError(f"the upcycled model must start at {start} bits per byte, got {upcycled}")
    sparse_bits, sparse_seconds = train(sparse, texts, settings, settings.more_steps, first, "upcycled")
    dense_bits, dense_seconds = train(dense, texts, settings, settings.more_steps, first, "dense, equal steps")
    equal_time = round(settings.more_steps * sparse_seconds / dense_seconds)
    longer_bits, _ = train(longer, texts, settings, equal_time, first, "dense, equal time")
    with record_routing(sparse) as records:
        evaluate(sparse, texts[1], settings)
    warn_of_collapse(routing_stats(records))
    before = f"{start:.3f} bits per byte after {first} steps of the dense model"
    print(f"seed {settings.seed}: {before}, {upcycled:.3f} upcycled, before it goes on")
    print(f"    {settings.more_steps} steps later: {dense_bits:.3f} dense, {sparse_bits:.3f} sparse")
    print(f"    which took {sparse_seconds / dense_seconds:.2f} times as long; {longer_bits:.3f} dense in that time")
    return {"before": start, "sparse": sparse_bits, "dense, equal steps": dense_bits, "dense, equal time": longer_bits}


def main() -> None:
    sizes = ("experts", "batch", "seq_len", "dim", "depth", "lr")
    settings = parse(Upcycling, __doc__, only=("seeds", "steps", "more_steps", "noise", *sizes), **WIDE)
    with processes():
        texts = runs.read_corpus(settings.text, settings.seq_len)
        results = [compare(replace(settings, seed=seed), texts) for seed in settings.seeds]
    for name in results[0]:
        print(f"{name}: {runs.spread([result[name] for result in results])}")


if __name__ == "__main__":
    main()
