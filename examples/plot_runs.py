"""Pictures of runs of train_lm.py, and a table that compares them.

    python examples/plot_runs.py runs/*      # writes runs/comparison.png and prints bits per byte by kind of run, over its seeds

A run's own picture, training.png, is drawn by train_lm.py.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter

matplotlib.use("Agg")


def read_history(run: Path) -> list[dict]:
    """The records of a run, one per evaluation."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def plot_training(history: list[dict], path: Path) -> None:
    """Learning curves and, of a sparse model, what became of the choices and how much each expert was asked for."""
    layers, steps = len(history[0]["load"]), [record["step"] for record in history]
    figure = plt.figure(figsize=(9.6, 3.6 + 1.4 * layers), layout="constrained")
    grid = figure.add_gridspec(1 + layers, 2, height_ratios=[3.6] + [1.4] * layers)
    curves = figure.add_subplot(grid[0, 0] if layers else grid[0, :])
    curves.plot(steps, [record["train_bits"] for record in history], color="0.6", label="training")
    curves.plot(steps, [record["validation_bits"] for record in history], color="black", label="validation")
    curves.set(title=f"Loss: {history[-1]['validation_bits']:.2f} bits per byte in validation", xlabel="step", ylabel="bits per byte")
    curves.legend(frameon=False)
    if layers:
        plot_unused(figure.add_subplot(grid[0, 1]), history)
        plot_load([figure.add_subplot(grid[1 + layer, :]) for layer in range(layers)], history)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def plot_unused(axes: plt.Axes, history: list[dict]) -> None:
    steps = [record["step"] for record in history]
    for name, style, reason in (("dropped", "-", "dropped, expert full"), ("not_asked", "--", "not asked for, by policy")):
        for layer in range(len(history[0]["load"])):
            shares = [record[name][layer] for record in history]
            axes.plot(steps, shares, style, color=f"C{layer}", label=f"layer {layer + 1}: {reason}")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(title="Choices that reached no expert, in training", xlabel="step", ylabel="share of all choices", ylim=(0, None))
    axes.legend(frameon=False, fontsize="small")


def plot_load(panels: list[plt.Axes], history: list[dict]) -> None:
    experts = len(history[0]["load"][0])
    edges = [0] + [record["step"] for record in history]
    for layer, axes in enumerate(panels):
        load = torch.tensor([record["load"][layer] for record in history]).T
        image = axes.pcolormesh(edges, range(experts + 1), load, vmin=0, vmax=2 / experts, cmap="RdBu_r")
        axes.set(ylabel=f"layer {layer + 1}\nexpert", yticks=[expert + 0.5 for expert in range(experts)][:: max(1, experts // 4)])
        axes.set_yticklabels(range(0, experts, max(1, experts // 4)))
        axes.tick_params(labelbottom=axes is panels[-1])
    panels[0].set_title("Load: each expert's share of the choices asked for, in training")
    panels[-1].set_xlabel("step")
    bar = panels[0].figure.colorbar(image, ax=panels, format=PercentFormatter(1, decimals=0), extend="max")
    bar.set_label(f"share (equal: {1 / experts:.1%})")


def kinds_of_runs(runs: list[Path]) -> dict[str, list[list[dict]]]:
    """Histories of runs that differ in their seeds only, by what the kinds are called."""
    kinds: dict[str, list[list[dict]]] = {}
    for run in runs:
        settings = json.loads((run / "settings.json").read_text())
        history = read_history(run)
        if history and history[-1]["step"] == settings["steps"]:
            kinds.setdefault(f"{'dense' if settings['dense'] else 'sparse'}, {settings['steps']} steps", []).append(history)
        else:
            print(f"left out, since it did not end: {run}")
    return kinds


def print_comparison(kinds: dict[str, list[list[dict]]]) -> None:
    print("| model | seeds | bits per byte in validation: mean (least to most) | seconds of training (least to most) |\n|---|---|---|---|")
    for kind, histories in kinds.items():
        bits, seconds = ([history[-1][key] for history in histories] for key in ("validation_bits", "train_seconds"))
        spread = f"{mean(bits):.3f} ({min(bits):.3f} to {max(bits):.3f})"
        print(f"| {kind} | {len(histories)} | {spread} | {mean(seconds):.0f} ({min(seconds):.0f} to {max(seconds):.0f}) |")


def plot_comparison(kinds: dict[str, list[list[dict]]], path: Path) -> None:
    """Validation curves of all runs, over steps and over time."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.6), sharey=True, layout="constrained")
    for axes, key, label in zip(panels, ("step", "train_seconds"), ("step", "seconds of training"), strict=True):
        for color, (kind, histories) in enumerate(kinds.items()):
            for seed, history in enumerate(histories):
                x, y = ([record[name] for record in history] for name in (key, "validation_bits"))
                axes.plot(x, y, color=f"C{color}", linewidth=1, label=None if seed else kind)
        axes.set(xlabel=label)
    panels[0].set(ylabel="bits per byte in validation")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="directories that train_lm.py wrote, of any kinds and seeds")
    runs = [run for run in parser.parse_args().runs if (run / "settings.json").exists()]
    kinds = kinds_of_runs(runs)
    if not kinds:
        raise SystemExit("plot_runs.py: no run of train_lm.py that ended is among these directories")
    print_comparison(kinds)
    path = runs[0].parent / "comparison.png"
    plot_comparison(kinds, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
