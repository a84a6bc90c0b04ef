"""Pictures of runs of train_lm.py, and a table that compares them.

    python examples/plot_runs.py runs/*      # writes runs/comparison.png and prints bits per byte by kind of run

A run's own picture, training.png, is drawn by train_lm.py.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from runs import read_history, read_settings, spread


def kinds_of_runs(runs: list[Path]) -> dict[str, list[list[dict]]]:
    """Histories of runs that differ in their seeds only, by what the kinds are called."""
    kinds: dict[str, list[list[dict]]] = {}
    for run in runs:
        settings = read_settings(run)
        history = read_history(run) if (run / "metrics.jsonl").exists() else []
        if history and history[-1]["step"] == settings["steps"]:
            kinds.setdefault(f"{'dense' if settings['dense'] else 'sparse'}, {settings['steps']} steps", []).append(
                history
            )
        else:
            print(f"left out, since it did not end: {run}")
    return kinds


def print_comparison(kinds: dict[str, list[list[dict]]]) -> None:
    print(
        "| model | seeds | bits per byte in validation: mean (least to most) | seconds of training (least to "
        "most) |\n|---|---|---|---|"
    )
    for kind, histories in kinds.items():
        bits, seconds = ([history[-1][key] for history in histories] for key in ("validation_bits", "train_seconds"))
        print(f"| {kind} | {len(histories)} | {spread(bits)} | {spread(seconds, '.0f')} |")


def plot_comparison(kinds: dict[str, list[list[dict]]], path: Path) -> None:
    """Validation curves of all runs, over steps and over time."""
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, label in zip(panels, ("step", "train_seconds"), ("step", "seconds of training"), strict=True):
        for color, (kind, histories) in enumerate(kinds.items()):
            for seed, history in enumerate(histories):
                x, y = ([record[name] for record in history] for name in (key, "validation_bits"))
                axes.plot(x, y, color=f"C{color}", linewidth=1, label=None if seed else kind)
        axes.set(xlabel=label)
    panels[0].set(ylabel="bits per byte in validation")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="directories that train_lm.py wrote, of any kinds and seeds")
    runs = [run for run in parser.parse_args().runs if (run / "settings.json").exists()]
    try:
        kinds = kinds_of_runs(runs)
    except ValueError as error:
        raise SystemExit(f"plot_runs.py: {error}") from None
    if not kinds:
        raise SystemExit("plot_runs.py: no run of train_lm.py that ended is among these directories")
    print_comparison(kinds)
    path = runs[0].parent / "comparison.png"
    plot_comparison(kinds, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
