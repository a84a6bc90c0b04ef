"""Ablate ST-MoE's recipe on the small language model of train_lm.py: one change at a time, each over several seeds.

    python examples/ablate_lm.py --jobs 2                               # all of it: 44 minutes on two cores
    python examples/ablate_lm.py --only "top 1" "top 3" --seeds 0       # some of it, and the usual model

Every run is a file in --out, and a run that is there is not repeated: what was interrupted goes on. Seeds fix initial
weights, data and random numbers, so that a change is compared with the usual model of the same seed. Prints tables and
draws ablations.png.
"""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import runs
import torch
from language_model import LanguageModel
from matplotlib.figure import Figure
from optimizers import adamw
from options import option, parse
from runs import spread
from sweeps import Run, results
from torch import nn
from train_lm import WIDE, Settings, evaluate, learning_rate, training_batch, update

from st_moe_pytorch import MoE, SparseMoEBlock
from st_moe_pytorch.tools.watch import RoutingStats, record_routing

USUAL = {
    "lr": 3e-3,
    "top_n": 2,
    "capacity_factor": 1.25,
    "ff_before": False,
    "ff_after": True,
    "mult_bias": True,
    "balance_loss_coef": 1e-2,
    "router_z_loss_coef": 1e-3,
}
HIGH_LR = 3e-2
CHANGES = {
    "usual": {},
    "no z-loss": {"router_z_loss_coef": 0.0},
    "high learning rate": {"lr": HIGH_LR},
    "high learning rate, no z-loss": {"lr": HIGH_LR, "router_z_loss_coef": 0.0},
    "no balance loss": {"balance_loss_coef": 0.0},
    "capacity factor 1": {"capacity_factor": 1.0},
    "capacity factor 2": {"capacity_factor": 2.0},
    "top 1": {"top_n": 1},
    "top 3": {"top_n": 3},
    "top 3, capacity factor 3": {"top_n": 3, "capacity_factor": 3.0},
    "no dense feed-forward": {"ff_after": False},
    "feed-forward before": {"ff_before": True, "ff_after": False},
    "feed-forward before and after": {"ff_before": True},
    "no multiplicative bias": {"mult_bias": False},
}
CAPACITIES_IN_EVALUATION = {"1": 1.0, "1.25": 1.25, "2": 2.0, "none dropped": None}
RECORD_EVERY = 20
SIZES = ("steps", "batch", "seq_len", "dim", "depth")


@dataclass(frozen=True)
class Ablations(Settings):
    """The options of the command line, of which those of `train_lm` that are no sizes stay as they are."""

    out: Path = option(Path("runs/ablations"), "directory for a file of each run, and the picture")  # noqa: RUF009
    only: tuple[str, ...] = option(
        (), f"changes to run, of: {', '.join(CHANGES)}; all if not given", choices=CHANGES, metavar="CHANGE"
    )
    seeds: tuple[int, ...] = option((0, 1, 2), "a run of every change for each")
    jobs: int = option(1, "runs at the same time, with one thread each")


def build_model(recipe: dict, settings: Ablations) -> nn.Module:
    """The language model with this recipe in its blocks. It drops nothing in evaluation, so that it sees no future."""

    def block() -> nn.Module:
        moe = MoE(
            settings.dim,
            settings.experts,
            gating_top_n=recipe["top_n"],
            capacity_factor_train=recipe["capacity_factor"],
            capacity_factor_eval=None,
            balance_loss_coef=recipe["balance_loss_coef"],
            router_z_loss_coef=recipe["router_z_loss_coef"],
        )
        return SparseMoEBlock(moe, add_ff_before=recipe["ff_before"], add_ff_after=recipe["ff_after"])

    model = LanguageModel(settings.dim, settings.depth, block)
    for name, parameter in model.named_parameters():
        if name.endswith("mult_bias"):
            # it starts at 1: without a gradient, it might as well not be there
            parameter.requires_grad_(recipe["mult_bias"])
    return model


def run(change: str, seed: int, settings: Ablations) -> dict:
    """Train one model and tell what its routers did, and how well it predicts."""
    recipe = USUAL | CHANGES[change]
    settings = replace(settings, seed=seed, lr=recipe["lr"])
    text, validation = runs.read_corpus(settings.text, settings.seq_len)
    torch.manual_seed(seed)
    model = build_model(recipe, settings)
    optimizers = [adamw(model, settings.lr)]
    history, seen = [], []
    start = time.perf_counter()
    for step in range(settings.steps):
        batch = training_batch(text, step, settings)
        with record_routing(model) as routings:
            update(model, optimizers, batch, learning_rate(step, settings), settings)
        if step % RECORD_EVERY == 0 or step == settings.steps - 1:
            layers = [routing for records in routings.values() for routing in records]
            seen += [RoutingStats.of(layer).scalars() for layer in layers]
            z = [figures["router_z"] for figures in seen[-len(layers) :]]
            largest = max(float(layer.logits.abs().max()) for layer in layers)
            history.append({"step": step, "router_z": mean(z), "largest_logit": largest})
    seconds = time.perf_counter() - start
    return {
        "change": change,
        "seed": seed,
        "seconds": seconds,
        "bits": evaluate_at_capacities(model, validation, settings),
        "dropped": mean(figures["dropped"] for figures in seen),
        "not_asked": mean(figures["not_asked"] for figures in seen),
        "largest_load": max(figures["largest_load"] for figures in seen[-len(layers) :]),
        "history": history,
    }


def evaluate_at_capacities(model: nn.Module, validation: torch.Tensor, settings: Ablations) -> dict[str, float]:
    """Bits per byte with less or more capacity than the model was trained with."""
    bits = {}
    for name, factor in CAPACITIES_IN_EVALUATION.items():
        for block in model.blocks:
            block.moe.gate.capacity_factor_eval = factor
        bits[name] = evaluate(model, validation, settings)
    return bits


def run_settings(change: str, settings: Ablations) -> dict:
    """All that the numbers of a run depend on, but its seed."""
    return USUAL | CHANGES[change] | {name: getattr(settings, name) for name in SIZES}


def differences(results: list[dict], change: str, compared_with: str = "usual") -> list[float]:
    """Bits per byte above those of another model, seed by seed."""
    bits = {(result["change"], result["seed"]): result["bits"]["none dropped"] for result in results}
    return [
        bits[change, seed] - bits[compared_with, seed]
        for seed in sorted({seed for name, seed in bits if name == change})
    ]


def print_tables(results: list[dict], changes: list[str]) -> None:
    """What every change did; what capacity does in evaluation."""
    print("| change | bits per byte in validation | above usual | dropped in training | largest logit | seconds |")
    print("|---|---|---|---|---|---|")
    groups = {change: [result for result in results if result["change"] == change] for change in changes}
    for change, group in groups.items():
        bits, largest, seconds = (
            [get(run) for run in group] for get in (final_bits, largest_logit, lambda run: run["seconds"])
        )
        above = spread(differences(results, change), "+.3f") if change != "usual" else ""
        dropped = mean(run["dropped"] for run in group)
        print(
            f"| {change} | {spread(bits)} | {above} | {dropped:.1%} | {spread(largest, '.0f')} | {mean(seconds):.0f} |"
        )
    print(f"\n| trained with | {' | '.join(CAPACITIES_IN_EVALUATION)} |\n|---{'|---' * len(CAPACITIES_IN_EVALUATION)}|")
    for change in ("capacity factor 1", "usual", "capacity factor 2"):
        if group := groups.get(change):
            print(
                f"| {change} | "
                + " | ".join(spread([run["bits"][name] for run in group]) for name in CAPACITIES_IN_EVALUATION)
                + " |"
            )


def final_bits(run: dict) -> float:
    return run["bits"]["none dropped"]


def largest_logit(run: dict) -> float:
    """The largest absolute logit that any router gave in training."""
    return max(record["largest_logit"] for record in run["history"])


def plot_ablations(results: list[dict], changes: list[str], path: Path) -> None:
    """Every change's difference to the usual model, a dot per seed, and the size of logits with and without z-loss."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    dots, logits = figure.subplots(1, 2, width_ratios=(1.2, 1))
    shown = [
        change for change in changes if change != "usual" and "lr" not in CHANGES[change]
    ]  # those would be far to the right
    for row, change in enumerate(shown):
        above = differences(results, change)
        dots.plot(above, [row] * len(above), "o", color="C0", alpha=0.6)
        dots.plot(mean(above), row, "|", color="black", markersize=14)
    dots.axvline(0, color="0.7", zorder=0)
    dots.set_yticks(range(len(shown)), shown)
    dots.invert_yaxis()
    dots.locator_params(axis="x", nbins=6)
    dots.set(
        title="Bits per byte above the usual model", xlabel="worse to the right; a dot per seed, a line for their mean"
    )
    for color, change in enumerate(
        name for name in changes if name == "usual" or "z-loss" in name or "learning rate" in name
    ):
        for number, result in enumerate(result for result in results if result["change"] == change):
            steps, z = ([record[name] for record in result["history"]] for name in ("step", "router_z"))
            size = [math.sqrt(value) for value in z]
            logits.plot(steps, size, color=f"C{color}", linewidth=1, label=None if number else change)
    logits.set(
        title="Size of the router's logits in training",
        xlabel="step",
        ylabel="root mean square of logsumexp(logits)",
        yscale="log",
    )
    logits.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=100)


def main() -> None:
    settings = parse(Ablations, __doc__, only=("out", "only", "seeds", "jobs", *SIZES), **WIDE | {"steps": 1000})
    changes = [change for change in CHANGES if not settings.only or change in ("usual", *settings.only)]
    wanted = [
        Run(f"{change}-{seed}", (change, seed, settings), run_settings(change, settings))
        for change in changes
        for seed in settings.seeds
    ]
    found = results(run, wanted, settings.out, settings.jobs)
    print_tables(found, changes)
    plot_ablations(found, changes, settings.out / "ablations.png")
    print(f"\nwrote {settings.out / 'ablations.png'}")


if __name__ == "__main__":
    main()
