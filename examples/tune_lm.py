"""Tune the sparse language model of train_lm.py and its dense baseline by one grid, on a seed that nothing else uses.

    python examples/tune_lm.py --jobs 2

The grid: optimizer, peak of the learning rate, initial values. The best of each model is then run on other seeds. Every
run is a file in --out, and a run that is there is not repeated. Prints tables of bits per byte in validation, the best
of the grid in bold.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import runs
from language_model import LanguageModel
from optimizers import adamw, muon_and_adamw
from options import option, parse
from sweeps import Run, results
from torch import nn
from train_lm import Settings, build_model, evaluate, learning_rate, routing_draws, training_batch, update

MODELS = ("sparse", "dense")
OPTIMIZERS = {"AdamW": lambda model, lr: [adamw(model, lr)], "Muon": muon_and_adamw}
INITIAL = ("of variance 1 / fan-in", "as the layers draw them")
SIZES = ("steps", "batch", "seq_len", "dim", "depth", "local", "experts", "capacity_factor")


@dataclass(frozen=True)
class Grid(Settings):
    """The options of the command line, of which those of `train_lm` that are no sizes stay as they are."""

    out: Path = option(Path("runs/grid"), "directory for a file of each run")  # noqa: RUF009
    seed: int = option(100, "of the grid: decides initial weights, order of the data, random routing", positive=False)
    rates: tuple[float, ...] = option((5e-3, 1e-2, 2e-2, 4e-2), "peaks of the learning rate")
    seeds: tuple[int, ...] = option((0, 1, 2, 3, 4), "of the runs that follow")
    jobs: int = option(1, "runs at the same time, with one thread each")


def reset(module: nn.Module) -> None:
    """Draw a module's parameters as its class does."""
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


class Cell(NamedTuple):
    """Of the grid."""

    optimizer: str
    initial: str
    rate: float
    model: str


def run(cell: Cell, settings: Grid) -> dict:
    """Train one model, and tell how well it predicts."""
    settings = replace(settings, dense=cell.model == "dense", lr=cell.rate)
    text, validation = runs.read_corpus(settings.text, settings.seq_len)
    trained: LanguageModel = build_model(settings)
    if cell.initial == INITIAL[1]:
        trained.apply(reset)
    optimizers = OPTIMIZERS[cell.optimizer](trained, cell.rate)
    for step in range(settings.steps):
        batch = *training_batch(text, step, settings), routing_draws(step, settings)
        update(trained, optimizers, batch, learning_rate(step, settings), settings)
    return {"bits": evaluate(trained, validation, settings)}


def bits_of(cells: Sequence[tuple[Cell, int]], settings: Grid) -> list[float]:
    """Bits per byte of cells of the grid, each with a seed."""
    sizes = {size: getattr(settings, size) for size in SIZES}
    wanted = [
        Run(
            f"{cell.model}-{cell.optimizer}-{INITIAL.index(cell.initial)}-{cell.rate}-{seed}",
            (cell, replace(settings, seed=seed)),
            sizes,
        )
        for cell, seed in cells
    ]
    return [result["bits"] for result in results(run, wanted, settings.out, settings.jobs)]


def main() -> None:
    settings = parse(Grid, __doc__, only=("out", "seed", "rates", "seeds", "jobs", *SIZES))
    grid = [Cell(*cell) for cell in product(OPTIMIZERS, INITIAL, settings.rates, MODELS)]
    bits = dict(zip(grid, bits_of([(cell, settings.seed) for cell in grid], settings), strict=True))
    best = [min((cell for cell in grid if cell.model == model), key=bits.__getitem__) for model in MODELS]
    print(f"| optimizer | initial values | learning rate | {' | '.join(MODELS)} |\n|---|---|---|---|---|")
    for row in product(OPTIMIZERS, INITIAL, settings.rates):
        cells = [Cell(*row, model) for model in MODELS]
        marked = [f"**{bits[cell]:.3f}**" if cell in best else f"{bits[cell]:.3f}" for cell in cells]
        print(f"| {row[0]} | {row[1]} | {row[2]:g} | {' | '.join(marked)} |")
    each = bits_of([(cell, seed) for cell in best for seed in settings.seeds], settings)
    sparse, dense = each[: len(settings.seeds)], each[len(settings.seeds) :]
    print(f"\n| seed | {' | '.join(MODELS)} | dense above sparse |\n|---|---|---|---|")
    rows = list(zip(settings.seeds, sparse, dense, strict=True))
    for seed, mine, theirs in rows:
        print(f"| {seed} | {mine:.3f} | {theirs:.3f} | {theirs - mine:+.3f} |")
    above = [theirs - mine for _, mine, theirs in rows]
    print(f"| mean (least to most) | {runs.spread(sparse)} | {runs.spread(dense)} | {runs.spread(above, '+.3f')} |")


if __name__ == "__main__":
    main()
