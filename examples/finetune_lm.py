"""Fine-tune the language model of train_lm.py on another language, as sections 4.1 to 4.4 of the paper do.

    python examples/finetune_lm.py --jobs 2                              # all of it
    python examples/finetune_lm.py --only "expert dropout" --seeds 0     # one table

For every seed, a sparse model and a dense one are trained on the source of Python's library. Each is then fine-tuned on
a few C++ headers that PyTorch ships, and evaluated on others of them: a task so small that models overfit. Every run is
a file in --out, and a run that is there is not repeated. Prints tables and draws finetuning.png.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import runs
import torch
from language_model import LanguageModel
from matplotlib.figure import Figure
from optimizers import adamw, muon_and_adamw
from options import option, parse
from sweeps import Run, results
from torch import Tensor
from train_lm import Settings, build_model, evaluate, learning_rate, routing_draws, training_batch, update

from st_moe_pytorch.tools.finetune import parameter_subset, set_expert_dropout
from st_moe_pytorch.tools.watch import record_routing, routing_stats

USUAL = {
    "model": "sparse",
    "text": "small",
    "batch": 8,
    "lr": 3e-3,
    "dropout": 0.0,
    "subset": "all",
    "capacity_factor": 2.0,
    "balance_loss": True,
}
EXPERIMENTS = {
    "expert dropout": [{"dropout": p} for p in (0.0, 0.1, 0.2, 0.4)],
    "expert dropout, a larger text": [{"text": "large", "dropout": p} for p in (0.0, 0.1, 0.2, 0.4)],
    "parameters": [{"subset": name} for name in ("all", "non_moe", "moe", "attention", "feed_forward")],
    "batch and learning rate": [
        {"model": model, "batch": batch, "lr": lr}
        for model in ("sparse", "dense")
        for batch in (4, 8, 16)
        for lr in (1e-3, 3e-3, 1e-2)
    ],
    "capacity and balance loss": [
        {"capacity_factor": factor, "balance_loss": balanced}
        for factor in (0.5, 1.0, 2.0, None)
        for balanced in (True, False)
    ],
}
SIZES = ("steps", "seq_len", "dim", "depth", "experts")


@dataclass(frozen=True)
class FineTuning(Settings):
    """The options of the command line, of which those of `train_lm` that are no sizes stay as they are."""

    out: Path = option(Path("runs/finetuning"), "directory for models, a file of each run, and the picture")  # noqa: RUF009
    only: tuple[str, ...] = option((), f"of: {', '.join(EXPERIMENTS)}", choices=EXPERIMENTS, metavar="EXPERIMENT")
    seeds: tuple[int, ...] = option((0, 1, 2), "every run for each")
    jobs: int = option(1, "runs at the same time, with one thread each")
    sequences: int = option(
        1200, "that fine-tuning takes, whatever the batch: six times the small text, twice the large"
    )


def headers(text: str, seq_len: int) -> list[Tensor]:
    """Bytes of every 64th (small) or 16th header of PyTorch's library c10 to tune on, and of others to validate."""
    root = Path(torch.__file__).parent / "include" / "c10"
    files = [path.read_bytes() for path in sorted(root.rglob("*.h"))]
    parts = [b"".join(files[first::step]) for first, step in ((0, 64 if text == "small" else 16), (4, 8))]
    if min(map(len, parts)) <= seq_len:
        raise SystemExit(f"finetune_lm.py: {root} has no headers, in this build of PyTorch")
    return [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts]


def pretrain(model: str, seed: int, settings: FineTuning) -> dict:
    """Train as train_lm.py does, and keep the weights."""
    settings = replace(settings, seed=seed, dense=model == "dense")
    text, validation = runs.read_corpus(None, settings.seq_len)
    trained = build_model(settings)
    optimizers = muon_and_adamw(trained, settings.lr)
    for step in range(settings.steps):
        batch = *training_batch(text, step, settings), routing_draws(step, settings)
        update(trained, optimizers, batch, learning_rate(step, settings), settings)
    torch.save(trained.state_dict(), weights(model, seed, settings))
    return {"bits": evaluate(trained, validation, settings)}


def weights(model: str, seed: int, settings: FineTuning) -> Path:
    return settings.out / f"{model}-{seed}.pt"


def prepared(change: dict, seed: int, settings: FineTuning) -> LanguageModel:
    """The pretrained model, with what is to be changed in its layers."""
    model = build_model(replace(settings, dense=change["model"] == "dense"))
    model.load_state_dict(torch.load(weights(change["model"], seed, settings), weights_only=True))
    if change["model"] == "sparse":
        set_expert_dropout(model, change["dropout"])
        parameter_subset(model, change["subset"])
        for block in model.blocks:
            block.moe.gate.capacity_factor_train = change["capacity_factor"]
            block.moe.balance_loss_coef *= change["balance_loss"]
    return model


def tune(change: dict, seed: int, settings: FineTuning) -> dict:
    """Fine-tune one model: bits per byte before, after and at the end of training, and the share of choices dropped."""
    text, validation = headers(change["text"], settings.seq_len)
    model = prepared(change, seed, settings)
    steps = settings.sequences // change["batch"]
    tuning = replace(settings, seed=seed, batch=change["batch"], lr=change["lr"], steps=steps)
    before, bits, dropped = evaluate(model, validation, settings), [], []
    optimizers = [adamw(model, tuning.lr)]
    for step in range(steps):
        batch = *training_batch(text, step, tuning), routing_draws(step, tuning)
        with nullcontext({}) if change["model"] == "dense" else record_routing(model) as routings:
            bits.append(update(model, optimizers, batch, learning_rate(step, tuning), tuning))
        dropped += [layer.scalars()["dropped"] for layer in routing_stats(routings).values()]
    return {
        "before": before,
        "bits": evaluate(model, validation, settings),
        "training": mean(bits[-steps // 10 :]),
        "dropped": mean(dropped or [0.0]),
    }


def name_of(change: dict) -> str:
    """What of a change is not usual."""
    told = [f"{key} {value}" for key, value in change.items() if value != USUAL[key]]
    return ", ".join(told) or "usual"


def print_tables(found: dict[tuple[str, int], dict], experiments: list[str], settings: FineTuning) -> None:
    before = runs.spread([found["usual", seed]["before"] for seed in settings.seeds])
    print(f"\nbefore fine-tuning, sparse: {before} bits per byte")
    for experiment in experiments:
        names = [name_of(USUAL | change) for change in EXPERIMENTS[experiment]]
        compared = "usual" if "usual" in names else names[0]
        print(f"\n| {experiment} | validation | above {compared} | end of training | dropped |\n|---|---|---|---|---|")
        for name in names:
            of_seeds = [found[name, seed] for seed in settings.seeds]
            usual = [found[compared, seed]["bits"] for seed in settings.seeds]
            bits, training, dropped = ([run[key] for run in of_seeds] for key in ("bits", "training", "dropped"))
            above = [mine - theirs for mine, theirs in zip(bits, usual, strict=True)]
            cells = runs.spread(bits), runs.spread(above, "+.3f"), runs.spread(training), f"{mean(dropped):.1%}"
            print(f"| {' | '.join((name, *cells))} |")


def label_of(name: str) -> str:
    """What a change is called in the picture."""
    words = {
        "capacity_factor None": "nothing dropped",
        "balance_loss False": "no balance loss",
        "subset ": "",
        "_": " ",
    }
    for written, said in words.items():
        name = name.replace(written, said)
    return name


def plot(found: dict[tuple[str, int], dict], experiments: list[str], settings: FineTuning, path: Path) -> None:
    """Bits per byte of every run, a dot per seed, a panel per experiment; long ones stand in a column of their own."""
    columns = [[name for name in experiments if (len(EXPERIMENTS[name]) > 10) is is_long] for is_long in (False, True)]
    columns = [column for column in columns if column]
    figure = Figure(figsize=(7 * len(columns), 8), layout="constrained")
    for part, column in zip(figure.subfigures(1, len(columns), squeeze=False)[0], columns, strict=True):
        heights = [len(EXPERIMENTS[experiment]) for experiment in column]
        panels = part.subplots(len(column), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, experiment in zip(panels, column, strict=True):
            names = [name_of(USUAL | change) for change in EXPERIMENTS[experiment]]
            for row, name in enumerate(names):
                bits = [found[name, seed]["bits"] for seed in settings.seeds]
                axes.plot(bits, [row] * len(bits), "o", color="C0", alpha=0.6)
                axes.plot(mean(bits), row, "|", color="black", markersize=12)
            axes.set_yticks(range(len(names)), map(label_of, names))
            axes.invert_yaxis()
            axes.set_title(experiment, loc="left")
        panels[-1].set_xlabel("bits per byte in validation")
    figure.savefig(path, dpi=80)


def main() -> None:
    settings = parse(FineTuning, __doc__, only=("out", "only", "seeds", "jobs", "sequences", *SIZES))
    experiments = [name for name in EXPERIMENTS if not settings.only or name in settings.only]
    changes = {name_of(USUAL | change): USUAL | change for name in experiments for change in EXPERIMENTS[name]}
    sizes = {name: getattr(settings, name) for name in SIZES}
    models = sorted({change["model"] for change in changes.values()})
    first = [Run(f"{model}-{seed}", (model, seed, settings), sizes) for seed in settings.seeds for model in models]
    for run, result in zip(first, results(pretrain, first, settings.out, settings.jobs), strict=True):
        print(f"{run.name} was trained to {result['bits']:.3f} bits per byte")
    sizes |= {"sequences": settings.sequences}
    each = [(name, seed) for seed in settings.seeds for name in changes]
    wanted = [Run(f"{name}-{seed}", (changes[name], seed, settings), changes[name] | sizes) for name, seed in each]
    found = dict(zip(each, results(tune, wanted, settings.out, settings.jobs), strict=True))
    print_tables(found, experiments, settings)
    plot(found, experiments, settings, settings.out / "finetuning.png")
    print(f"\nwrote {settings.out / 'finetuning.png'}")


if __name__ == "__main__":
    main()
