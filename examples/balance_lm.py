"""Balance the experts of the language model of train_lm.py with a loss, without one, or not at all, over several seeds.

    python examples/balance_lm.py --jobs 2 --seeds 0 1 2
    python examples/balance_lm.py --only "signs" --steps 300 --seeds 0

Every run is a file in --out, and a run that is there is not repeated. Seeds fix initial weights, data and random
numbers. Prints a table: the largest load over an equal one, in training steps before the next change of the bias.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import runs
import torch
from language_model import LanguageModel
from optimizers import muon_and_adamw
from options import option, parse
from sweeps import Run, results
from train_lm import Settings, evaluate, learning_rate, training_batch, update

from st_moe_pytorch import MoE, SparseMoEBlock, TopNGating
from st_moe_pytorch.tools.balance import LossFreeBalance
from st_moe_pytorch.tools.watch import RoutingStats, record_routing

TOP_N = 2
WAYS = {
    "balance loss": {"balance_loss_coef": 1e-2, "router_z_loss_coef": 1e-3, "rule": None},
    "signs": {"balance_loss_coef": 0.0, "router_z_loss_coef": 0.0, "rule": "sign"},
    "quantiles": {"balance_loss_coef": 0.0, "router_z_loss_coef": 0.0, "rule": "quantile"},
    "quantiles and z-loss": {"balance_loss_coef": 0.0, "router_z_loss_coef": 1e-3, "rule": "quantile"},
    "nothing": {"balance_loss_coef": 0.0, "router_z_loss_coef": 0.0, "rule": None},
}
SIZES = ("steps", "batch", "seq_len", "dim", "depth", "experts", "capacity_factor", "lr")


@dataclass(frozen=True)
class Balances(Settings):
    """The options of the command line, of which those of `train_lm` that are no sizes stay as they are."""

    out: Path = option(Path("runs/balance"), "directory for a file of each run")  # noqa: RUF009
    only: tuple[str, ...] = option((), f"of: {', '.join(WAYS)}; all if not given", choices=WAYS, metavar="WAY")
    seeds: tuple[int, ...] = option((0, 1, 2), "a run of every way for each")
    jobs: int = option(1, "runs at the same time, with one thread each")
    capacity_factor: float = option(1.25, "slots of an expert in training, as a multiple of tokens / experts")


def build_model(way: dict, settings: Balances) -> LanguageModel:
    """The language model, balanced in this way. It drops nothing in evaluation, so that it sees no future."""

    def block() -> SparseMoEBlock:
        capacity = {"capacity_factor_train": settings.capacity_factor, "capacity_factor_eval": None}
        gate = TopNGating(settings.dim, settings.experts, top_n=TOP_N, balance_bias=way["rule"] is not None, **capacity)
        coefs = {name: way[name] for name in ("balance_loss_coef", "router_z_loss_coef")}
        return SparseMoEBlock(MoE(settings.dim, settings.experts, gate=gate, **coefs))

    return LanguageModel(settings.dim, settings.depth, block, settings.local).reset_by_fan_in()


def run(name: str, seed: int, settings: Balances) -> dict:
    """Train one model and tell how its experts were loaded, and how well it predicts."""
    way, settings = WAYS[name], replace(settings, seed=seed)
    text, validation = runs.read_corpus(settings.text, settings.seq_len)
    torch.manual_seed(seed)
    model = build_model(way, settings)
    optimizers = muon_and_adamw(model, settings.lr)
    balance = LossFreeBalance(model, way["rule"]) if way["rule"] else None
    loads, dropped = [], []
    for step in range(settings.steps):
        batch = training_batch(text, step, settings)
        with balance or nullcontext(), record_routing(model) as routings:
            update(model, optimizers, batch, learning_rate(step, settings), settings)
        if balance:
            balance.step()
        layers = [routing for records in routings.values() for routing in records]
        chosen = [layer.indices.flatten().bincount(minlength=settings.experts).double() for layer in layers]
        loads.append(max(float(counts.max() / counts.mean()) for counts in chosen))
        dropped.append(mean(RoutingStats.of(layer).scalars()["dropped"] for layer in layers))
    return {"loads": loads, "dropped": mean(dropped), "bits": evaluate(model, validation, settings)}


def run_settings(name: str, settings: Balances) -> dict:
    """All that the numbers of a run depend on, but its seed."""
    return WAYS[name] | {size: getattr(settings, size) for size in SIZES}


def main() -> None:
    settings = parse(Balances, __doc__, only=("out", "only", "seeds", "jobs", *SIZES))
    names = [name for name in WAYS if not settings.only or name in settings.only]
    wanted = [
        Run(f"{name}-{seed}", (name, seed, settings), run_settings(name, settings))
        for name in names
        for seed in settings.seeds
    ]
    found = iter(results(run, wanted, settings.out, settings.jobs))
    print("| balanced by | largest / equal load: mean of steps | worst step | dropped in training | bits per byte |")
    print("|---|---|---|---|---|")
    for name in names:
        of_seeds = [next(found) for _ in settings.seeds]
        means, worst = ([of(result["loads"]) for result in of_seeds] for of in (mean, max))
        dropped, bits = ([result[key] for result in of_seeds] for key in ("dropped", "bits"))
        cells = runs.spread(means), runs.spread(worst), runs.spread(dropped, ".1%"), runs.spread(bits)
        print(f"| {' | '.join((name, *cells))} |")


if __name__ == "__main__":
    main()
