"""Ablate the recipe of ST-MoE on the small language model of train_lm.py: one change at a time, each over several seeds.

    python examples/ablate_lm.py --jobs 2                                   # all of it: 44 minutes on two cores
    python examples/ablate_lm.py --only "top 1" "top 3" --seeds 0           # some of it; the usual model is always there to compare with

Every run is a file in --out, and a run that is there is not repeated: what was interrupted goes on. Seeds fix initial weights, data and
random numbers, so that a change is compared with the usual model of the same seed. Prints tables and draws ablations.png.
"""

import argparse
import json
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm
from train_lm import LanguageModel, build_optimizer, evaluate, learning_rate, read_corpus, start_processes, training_batch, update

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
EXPERTS = 8
RECORD_EVERY = 20


def build_model(recipe: dict, dim: int, depth: int) -> nn.Module:
    """The language model with this recipe in its blocks. It drops nothing in evaluation, so that it sees no future."""

    def block() -> nn.Module:
        moe = MoE(
            dim,
            EXPERTS,
            gating_top_n=recipe["top_n"],
            capacity_factor_train=recipe["capacity_factor"],
            capacity_factor_eval=None,
            balance_loss_coef=recipe["balance_loss_coef"],
            router_z_loss_coef=recipe["router_z_loss_coef"],
        )
        return SparseMoEBlock(moe, add_ff_before=recipe["ff_before"], add_ff_after=recipe["ff_after"])

    model = LanguageModel(dim, depth, block)
    for name, parameter in model.named_parameters():
        if name.endswith("mult_bias"):
            parameter.requires_grad_(recipe["mult_bias"])  # it starts at 1: without a gradient, it might as well not be there
    return model


def run(change: str, seed: int, args: argparse.Namespace) -> dict:
    """Train one model and tell what its routers did, and how well it predicts."""
    recipe = USUAL | CHANGES[change]
    settings = argparse.Namespace(**vars(args) | {"seed": seed, "lr": recipe["lr"], "autocast": False, "text": None})
    text, validation = read_corpus(settings)
    torch.manual_seed(seed)
    model = build_model(recipe, args.dim, args.depth)
    optimizer = build_optimizer(model, recipe["lr"])
    history, seen = [], []
    start = time.perf_counter()
    for step in range(args.steps):
        batch = training_batch(text, step, settings)
        with record_routing(model) as routings:
            update(model, optimizer, batch, learning_rate(step, settings), autocast=False)
        if step % RECORD_EVERY == 0 or step == args.steps - 1:
            layers = [routing for records in routings.values() for routing in records]
            seen += [RoutingStats.of(layer).scalars() for layer in layers]
            z = [figures["router_z"] for figures in seen[-len(layers) :]]
            largest = max(float(layer.logits.abs().max()) for layer in layers)
            history.append({"step": step, "router_z": mean(z), "largest_logit": largest})
    seconds = time.perf_counter() - start
    return {
        "change": change,
        "seed": seed,
        "settings": run_settings(change, args),
        "seconds": seconds,
        "bits": evaluate_at_capacities(model, validation, settings),
        "dropped": mean(figures["dropped"] for figures in seen),
        "not_asked": mean(figures["not_asked"] for figures in seen),
        "largest_load": max(figures["largest_load"] for figures in seen[-len(layers) :]),
        "history": history,
    }


def evaluate_at_capacities(model: nn.Module, validation: torch.Tensor, settings: argparse.Namespace) -> dict[str, float]:
    """Bits per byte with less or more capacity than the model was trained with."""
    bits = {}
    for name, factor in CAPACITIES_IN_EVALUATION.items():
        for block in model.blocks:
            block.moe.gate.capacity_factor_eval = factor
        bits[name] = evaluate(model, validation, settings)
    return bits


def run_settings(change: str, args: argparse.Namespace) -> dict:
    """All that the numbers of a run depend on, but its seed."""
    return USUAL | CHANGES[change] | {name: getattr(args, name) for name in ("steps", "batch", "seq_len", "dim", "depth")}


def start_worker() -> None:
    torch.set_num_threads(1)
    start_processes(expert_parallel=False)


def result_path(change: str, seed: int, args: argparse.Namespace) -> Path:
    return args.out / f"{change.replace(', ', ' ').replace(' ', '-')}-{seed}.json"


def read_result(change: str, seed: int, args: argparse.Namespace) -> dict | None:
    path = result_path(change, seed, args)
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    if result["settings"] != run_settings(change, args):
        raise SystemExit(f"ablate_lm.py: {path} was run with other settings, {result['settings']}: choose another --out")
    return result


def run_missing(changes: list[str], args: argparse.Namespace) -> list[dict]:
    """Results of all runs, by change and then by seed; those that are not there yet are run."""
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = [(change, seed) for change in changes for seed in args.seeds]
    missing = [each for each in wanted if read_result(*each, args) is None]
    with (
        ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn"), initializer=start_worker) as pool,
        tqdm(total=len(wanted), initial=len(wanted) - len(missing), unit="run") as progress,
    ):
        for done in as_completed([pool.submit(run, *each, args) for each in missing]):
            result = done.result()
            path = result_path(result["change"], result["seed"], args)
            path.with_suffix(".tmp").write_text(json.dumps(result))
            os.replace(path.with_suffix(".tmp"), path)
            progress.write(f"{result['change']}, seed {result['seed']}: {result['bits']['none dropped']:.3f} bits per byte")
            progress.update()
    return [read_result(*each, args) for each in wanted]


def spread(values: list[float], form: str = ".3f") -> str:
    """Mean of the seeds, and least to most."""
    return f"{mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def differences(results: list[dict], change: str, compared_with: str = "usual") -> list[float]:
    """Bits per byte above those of another model, seed by seed."""
    bits = {(result["change"], result["seed"]): result["bits"]["none dropped"] for result in results}
    return [bits[change, seed] - bits[compared_with, seed] for seed in sorted({seed for name, seed in bits if name == change})]


def print_tables(results: list[dict], changes: list[str]) -> None:
    """What every change did; what capacity does in evaluation."""
    print("| change | bits per byte in validation | above usual | dropped in training | largest logit | seconds |")
    print("|---|---|---|---|---|---|")
    groups = {change: [result for result in results if result["change"] == change] for change in changes}
    for change, runs in groups.items():
        bits, largest, seconds = ([get(run) for run in runs] for get in (final_bits, largest_logit, lambda run: run["seconds"]))
        above = spread(differences(results, change), "+.3f") if change != "usual" else ""
        dropped = mean(run["dropped"] for run in runs)
        print(f"| {change} | {spread(bits)} | {above} | {dropped:.1%} | {spread(largest, '.0f')} | {mean(seconds):.0f} |")
    print(f"\n| trained with | {' | '.join(CAPACITIES_IN_EVALUATION)} |\n|---{'|---' * len(CAPACITIES_IN_EVALUATION)}|")
    for change in ("capacity factor 1", "usual", "capacity factor 2"):
        if runs := groups.get(change):
            print(f"| {change} | {' | '.join(spread([run['bits'][name] for run in runs]) for name in CAPACITIES_IN_EVALUATION)} |")


def final_bits(run: dict) -> float:
    return run["bits"]["none dropped"]


def largest_logit(run: dict) -> float:
    """The largest absolute logit that any router gave in training."""
    return max(record["largest_logit"] for record in run["history"])


def plot_ablations(results: list[dict], changes: list[str], path: Path) -> None:
    """Every change's difference to the usual model, a dot per seed, and the size of logits with and without z-loss."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    dots, logits = figure.subplots(1, 2, width_ratios=(1.2, 1))
    shown = [change for change in changes if change != "usual" and "lr" not in CHANGES[change]]  # those would be far to the right
    for row, change in enumerate(shown):
        above = differences(results, change)
        dots.plot(above, [row] * len(above), "o", color="C0", alpha=0.6)
        dots.plot(mean(above), row, "|", color="black", markersize=14)
    dots.axvline(0, color="0.7", zorder=0)
    dots.set_yticks(range(len(shown)), shown)
    dots.invert_yaxis()
    dots.locator_params(axis="x", nbins=6)
    dots.set(title="Bits per byte above the usual model", xlabel="worse to the right; a dot per seed, a line for their mean")
    for color, change in enumerate(name for name in changes if name == "usual" or "z-loss" in name or "learning rate" in name):
        for number, result in enumerate(result for result in results if result["change"] == change):
            steps, z = ([record[name] for record in result["history"]] for name in ("step", "router_z"))
            size = [math.sqrt(value) for value in z]
            logits.plot(steps, size, color=f"C{color}", linewidth=1, label=None if number else change)
    logits.set(title="Size of the router's logits in training", xlabel="step", ylabel="root mean square of logsumexp(logits)", yscale="log")
    logits.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=100)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    option = parser.add_argument
    option("--out", type=Path, default="runs/ablations", help="directory for a file of each run, and the picture")
    option("--only", nargs="+", choices=CHANGES, metavar="CHANGE", help=f"changes to run, of: {', '.join(CHANGES)}; all if not given")
    option("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run of every change for each")
    option("--jobs", type=int, default=1, help="runs at the same time, with one thread each")
    option("--steps", type=int, default=1000, help="updates, over which the learning rate rises and decays")
    option("--batch", type=int, default=4, help="sequences per step")
    option("--seq-len", type=int, default=256, help="bytes per sequence")
    option("--dim", type=int, default=128, help="width of the model")
    option("--depth", type=int, default=2, help="layers")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    changes = [change for change in CHANGES if args.only is None or change in ("usual", *args.only)]
    results = run_missing(changes, args)
    print_tables(results, changes)
    plot_ablations(results, changes, args.out / "ablations.png")
    print(f"\nwrote {args.out / 'ablations.png'}")


if __name__ == "__main__":
    main()
