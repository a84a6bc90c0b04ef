"""Does the language model of train_lm.py see the future in training? Two orders of service, over several seeds.

    python examples/causality_lm.py --seeds 0 1 2

With priority="position", as in the paper, a second choice may lose its place to the first choice of a later token;
with priority="token" it may not. Prints bits per byte in validation, where nothing is dropped, and the share of outputs
in the first half of a sequence that change, in training, when the second half does.
"""

from argparse import ArgumentParser
from statistics import mean

import runs
import torch
from language_model import LanguageModel
from optimizers import muon_and_adamw
from processes import processes
from torch import Tensor
from tqdm import tqdm
from train_lm import Settings, build_model, evaluate, learning_rate, routing_draws, training_batch, update

PROBES = 4  # batches whose second half is exchanged


@torch.no_grad()
def share_that_moves(model: LanguageModel, text: Tensor, settings: Settings) -> float:
    """Of outputs in the first half of sequences, those that the bytes of the second half change in training."""
    half, shares = settings.seq_len // 2, []
    for probe in range(PROBES):
        inputs, others = (training_batch(text, number, settings)[0] for number in (probe, PROBES + probe))
        changed = torch.cat((inputs[:, :half], others[:, half:]), dim=1)
        draws = routing_draws(probe, settings)
        moved = (model(inputs, draws)[0] - model(changed, draws)[0])[:, :half].abs().amax(dim=-1) > 1e-4
        shares.append(moved.double().mean().item())
    return mean(shares)


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--capacity-factor", type=float, default=1.25, help="slots in training, times tokens / experts")
    args = parser.parse_args()
    print("| priority | seed | bits per byte | outputs that depend on later bytes |\n|---|---|---|---|")
    for priority in ("position", "token"):
        for seed in args.seeds:
            settings = Settings(seed=seed, steps=args.steps, capacity_factor=args.capacity_factor)
            with processes():
                text, validation = runs.read_corpus(settings.text, settings.seq_len)
                model = build_model(settings)
                for block in model.blocks:
                    block.moe.gate.priority = priority
                optimizers = muon_and_adamw(model, settings.lr)
                for step in tqdm(range(settings.steps), leave=False):
                    batch = *training_batch(text, step, settings), routing_draws(step, settings)
                    update(model, optimizers, batch, learning_rate(step, settings), settings)
                bits = evaluate(model, validation, settings)
                moves = share_that_moves(model.train(), validation, settings)
            print(f"| {priority} | {seed} | {bits:.3f} | {moves:.0%} |", flush=True)


if __name__ == "__main__":
    main()
