"""Upcycle a dense language model into a sparse one and see whether that beats training it on (Komatsuzaki et al. 2022).

    python examples/upcycle_lm.py                    # train a dense model, then go on in three ways: about four minutes on one core
    python examples/upcycle_lm.py --seeds 0 1 2

The sparse model starts where the dense one ended: its experts are copies of the dense feed-forwards, so that a token uses two instead of
one, and takes longer. It is compared with the dense model after as many further steps, and after as many as take the same time.
"""

import argparse
import copy
import math
import time
from statistics import mean

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm
from train_lm import TOP_N, DenseBlock, LanguageModel, build_optimizer, cross_entropy, evaluate, learning_rate, read_corpus, start_processes
from train_lm import training_batch as batch_of

from st_moe_pytorch import MoE
from st_moe_pytorch.tools.swap import collect_aux_losses, sparsify
from st_moe_pytorch.tools.watch import record_routing, routing_stats, warn_of_collapse


def train(model: nn.Module, texts: list[Tensor], args: argparse.Namespace, steps: int, first: int, name: str) -> tuple[float, float]:
    """Train for some steps, on batches from the first one on; bits per byte in validation, and seconds of training."""
    optimizer = build_optimizer(model, args.lr)
    schedule = argparse.Namespace(lr=args.lr, steps=steps)
    start = time.perf_counter()
    for step in tqdm(range(steps), desc=name, leave=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule)
        with collect_aux_losses() as aux:
            loss, _ = cross_entropy(model, batch_of(texts[0], first + step, args), autocast=False)
        optimizer.zero_grad()
        (loss + aux.total).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = time.perf_counter() - start
    return evaluate(model, texts[1], args), seconds


def upcycle(dense: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The sparse model that computes what the dense one does."""
    make = lambda ffn: MoE.from_dense(ffn, args.dim, args.experts, noise=args.noise, gating_top_n=TOP_N)  # noqa: E731
    return sparsify(copy.deepcopy(dense), "blocks.*.wide", make)


def compare(seed: int, args: argparse.Namespace, texts: list[Tensor]) -> dict[str, float]:
    """Bits per byte in validation at the start and at the end of each way to go on."""
    torch.manual_seed(seed)
    args.seed = seed
    dense = LanguageModel(args.dim, args.depth, lambda: DenseBlock(args.dim))
    start, _ = train(dense, texts, args, args.steps, 0, "dense")
    sparse, longer = upcycle(dense, args), copy.deepcopy(dense)
    upcycled, first = evaluate(sparse, texts[1], args), args.steps
    if args.noise == 0 and not math.isclose(start, upcycled, rel_tol=1e-5):
        raise AssertionError(f"the upcycled model must start at {start} bits per byte, got {upcycled}")
    sparse_bits, sparse_seconds = train(sparse, texts, args, args.more_steps, first, "upcycled")
    dense_bits, dense_seconds = train(dense, texts, args, args.more_steps, first, "dense, equal steps")
    equal_time = round(args.more_steps * sparse_seconds / dense_seconds)
    longer_bits, _ = train(longer, texts, args, equal_time, first, "dense, equal time")
    with record_routing(sparse) as records:
        evaluate(sparse, texts[1], args)
    warn_of_collapse(routing_stats(records))
    print(f"seed {seed}: {start:.3f} bits per byte after {first} steps of the dense model, {upcycled:.3f} upcycled, before it goes on")
    print(f"    {args.more_steps} steps later: {dense_bits:.3f} dense, {sparse_bits:.3f} sparse")
    print(f"    which took {sparse_seconds / dense_seconds:.2f} times as long; {longer_bits:.3f} dense in that time")
    return {"before": start, "sparse": sparse_bits, "dense, equal steps": dense_bits, "dense, equal time": longer_bits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    option = parser.add_argument
    option("--seeds", type=int, nargs="+", default=[0], help="a run for each")
    option("--steps", type=int, default=400, help="steps of the dense model before it is upcycled")
    option("--more-steps", type=int, default=400, help="steps after that")
    option("--noise", type=float, default=0.0, help="noise of the copies, as a multiple of the spread of each parameter")
    option("--experts", type=int, default=8, help=f"experts of a layer, of which a token chooses {TOP_N}")
    option("--batch", type=int, default=4, help="sequences per step")
    option("--seq-len", type=int, default=256, help="bytes per sequence")
    option("--dim", type=int, default=128, help="width of the model")
    option("--depth", type=int, default=2, help="layers")
    option("--lr", type=float, default=3e-3, help="peak of the learning rate, each time")
    args = parser.parse_args()
    args.text, args.autocast = None, False
    start_processes(expert_parallel=False)
    texts = read_corpus(args)
    results = [compare(seed, args, texts) for seed in args.seeds]
    for name in results[0]:
        values = [result[name] for result in results]
        print(f"{name}: {mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
