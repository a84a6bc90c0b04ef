"""Tune the sparse language model of train_lm.py and its dense baseline by one grid, on a seed that nothing else uses.

    python examples/tune_lm.py --jobs 2

The grid: optimizer, peak of the learning rate, initial values. Every run is a file in --out, and a run that is there is
not repeated. Prints a table of bits per byte in validation, the best of each model in bold.
"""

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

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
    seed: int = option(100, "decides initial weights, order of the data and random routing", positive=False)
    rates: tuple[float, ...] = option((5e-3, 1e-2, 2e-2), "peaks of the learning rate")
    jobs: int = option(1, "runs at the same time, with one thread each")


def reset(module: nn.Module) -> None:
    """Draw a module's parameters as its class does."""
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


def run(model: str, optimizer: str, initial: str, rate: float, settings: Grid) -> dict:
    """Train one model, and tell how well it predicts."""
    settings = replace(settings, dense=model == "dense", lr=rate)
    text, validation = runs.read_corpus(settings.text, settings.seq_len)
    trained: LanguageModel = build_model(settings)
    if initial == INITIAL[1]:
        trained.apply(reset)
    optimizers = OPTIMIZERS[optimizer](trained, rate)
    for step in range(settings.steps):
        batch = *training_batch(text, step, settings), routing_draws(step, settings)
        update(trained, optimizers, batch, learning_rate(step, settings), settings)
    return {"bits": evaluate(trained, validation, settings)}


def main() -> None:
    settings = parse(Grid, __doc__, only=("out", "seed", "rates", "jobs", *SIZES))
    grid = list(product(OPTIMIZERS, INITIAL, settings.rates, MODELS))
    sizes = {size: getattr(settings, size) for size in (*SIZES, "seed")}
    wanted = [
        Run(f"{model}-{optimizer}-{INITIAL.index(initial)}-{rate}", (model, optimizer, initial, rate, settings), sizes)
        for optimizer, initial, rate, model in grid
    ]
    bits = [result["bits"] for result in results(run, wanted, settings.out, settings.jobs)]
    best = {model: min(each for each, (*_, kind) in zip(bits, grid, strict=True) if kind == model) for model in MODELS}
    cells = iter(f"**{each:.3f}**" if each in best.values() else f"{each:.3f}" for each in bits)
    print(f"| optimizer | initial values | learning rate | {' | '.join(MODELS)} |")
    print("|---|---|---|---|---|")
    for optimizer, initial, rate in product(OPTIMIZERS, INITIAL, settings.rates):
        print(f"| {optimizer} | {initial} | {rate:g} | {' | '.join(next(cells) for _ in MODELS)} |")


if __name__ == "__main__":
    main()
