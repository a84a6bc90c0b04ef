"""What is not about training: the text, the directory of a run with its checkpoints, pictures of what happened."""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from options import Options
from processes import ending_together, say
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from st_moe_pytorch.tools.pictures import plot_load, text_page
from st_moe_pytorch.tools.watch import RoutingStats, record_routing

NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
FREE_TO_CHANGE = ("out", "resume", "device", "expert_parallel", "prompt")  # what may differ when a run is resumed
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def read_corpus(path: Path | None, seq_len: int) -> list[Tensor]:
    """Training and validation bytes: a file and its last tenth, or Python's library and every 20th file of it."""
    with ending_together():
        if path is not None:
            content = path.read_bytes()
            cut = len(content) * 9 // 10
            parts = content[:cut], content[cut:]
        else:
            root = Path(sysconfig.get_paths()["stdlib"])
            paths = [path for path in sorted(root.rglob("*.py")) if NOT_SOURCE.isdisjoint(path.relative_to(root).parts)]
            files = [path.read_bytes() for path in paths]
            parts = b"".join(file for number, file in enumerate(files) if number % 20 != 10), b"".join(files[10::20])
        sizes = [len(part) for part in parts]
        if min(sizes) <= seq_len:
            found = f"{sizes[0]} bytes to train on and {sizes[1]} to validate"
            raise ValueError(f"text is too short: {found}, --seq-len {seq_len} needs more")
    return [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts]


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there as a whole or, after a kill or on a full disk, as it was before."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


@contextmanager
def directory(out: Path, options: Options, texts: list[Tensor], resume: bool) -> Iterator[None]:
    """Hold the directory of a run, a new one or one to resume, against other processes. Rank 0 does so for all."""
    settings = {name: value for name, value in asdict(options).items() if name not in FREE_TO_CHANGE}
    settings["text"] = hashlib.sha256(b"".join(text.numpy().tobytes() for text in texts)).hexdigest()[:16]
    with ExitStack() as stack:
        with ending_together():
            if dist.get_rank() == 0:
                out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_lock(out))
                _prepare(out, settings, resume)
        try:
            yield
        except KeyboardInterrupt:
            way_on = f"--resume continues from the checkpoint in {out}, if there was an evaluation yet"
            say(f"\nstopped; {way_on}", file=sys.stderr)
            raise SystemExit(1) from None


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    """A file with the id of the process that holds the directory, and a lock on it, which ends with the process."""
    with open(out / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = f"process {file.read()}"
            raise ValueError(f"{out} is in use by {holder}: wait until it ends, or choose another --out") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _prepare(out: Path, settings: dict[str, Any], resume: bool) -> None:
    """Note in a new directory what the numbers of its run depend on, or find it unchanged."""
    path, saved = out / "settings.json", checkpoints(out)
    if saved or path.exists() or (out / "metrics.jsonl").exists():
        theirs = read_settings(out) if resume or path.exists() else settings
        different = [name for name, value in settings.items() if theirs.get(name) != value]
        if different:
            changes = [f"{name} was {theirs.get(name)}, is now {settings[name]}" for name in different]
            raise ValueError(f"{out} holds a run with other settings: {'; '.join(changes)}: choose another --out")
        if not resume:
            raise ValueError(f"{out} holds a run: continue it with --resume, or choose another --out")
    else:
        write_whole(path, json.dumps(settings))
    for half_saved in out.glob("checkpoint-*.tmp"):
        shutil.rmtree(half_saved)
    if resume and not saved:
        say(f"{out} has no checkpoint to resume from: starting anew")


def read_settings(out: Path) -> dict[str, Any]:
    path = out / "settings.json"
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        way_out = "restore it, or start anew with another --out"
        raise ValueError(f"{path} is missing or broken ({error}): {way_out}") from None


def checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints, oldest first; there is more than one only after a kill."""
    return sorted(out.glob("checkpoint-*[0-9]"), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _state(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, dict]:
    """States of model and optimizers under global names: those of this rank's experts, and all that ranks share."""
    model_state, optimizer_state = get_state_dict(model, optimizers, options=FLAT)
    return {"model": model_state, "optimizer": optimizer_state}


def save(out: Path, history: list[dict], model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Save a checkpoint with the history in it. It gets its name, and replaces the last one, when it is complete."""
    step, lines = history[-1]["step"], "".join(json.dumps(record) + "\n" for record in history)
    temporary = out / f"checkpoint-{step}.tmp"
    way_out = f"; step {step} was not saved; make room, and --resume goes on from the checkpoint before it"
    with ending_together(way_out):
        dcp.save(_state(model, optimizers), checkpoint_id=temporary)
    with ending_together(way_out):
        if dist.get_rank() == 0:
            older = checkpoints(out)
            for copy in (out, temporary):
                write_whole(copy / "metrics.jsonl", lines)
            write_whole(temporary / "digests.json", json.dumps(_digests(temporary)))
            os.replace(temporary, out / f"checkpoint-{step}")
            for path in older:
                shutil.rmtree(path)


def _digests(checkpoint: Path) -> dict[str, str]:
    files = [path for path in sorted(checkpoint.iterdir()) if path.name != "digests.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _is_whole(checkpoint: Path) -> bool:
    """Whether all files are as they were saved: what reads them does not notice when numbers in them are others."""
    try:
        return json.loads((checkpoint / "digests.json").read_text()) == _digests(checkpoint)
    except (OSError, ValueError):
        return False


def load(out: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> list[dict]:
    """Load the last checkpoint, if there is one, that any number of ranks saved, and return its history."""
    saved = checkpoints(out)
    if not saved:
        return []
    with ending_together("; restore it from a copy, or start anew with another --out"):
        if dist.get_rank() == 0 and not _is_whole(saved[-1]):
            raise ValueError(f"{saved[-1]} is damaged, or was saved by another version")
    state, history = _state(model, optimizers), read_history(saved[-1])
    dcp.load(state, checkpoint_id=saved[-1])
    set_state_dict(
        model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=FLAT
    )
    with ending_together():
        if dist.get_rank() == 0:
            write_whole(out / "metrics.jsonl", (saved[-1] / "metrics.jsonl").read_text())
    return history


def read_history(directory: Path) -> list[dict]:
    """The records of a run or a checkpoint, one per evaluation."""
    path, history = directory / "metrics.jsonl", []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            history.append(json.loads(line))
        except ValueError as error:
            way_out = "train_lm.py --resume writes it anew from the checkpoint"
            raise ValueError(f"line {number} of {path} is broken ({error}): {way_out}") from None
    return history


def routing_metrics(stats: list[dict[str, RoutingStats]]) -> dict[str, dict]:
    """What routers did, by layer, over steps and ranks.

    load: each expert's share of the choices asked for. dropped, not_asked: shares of all choices.
    """
    layers = {name: sum((step[name] for step in stats[1:]), stats[0][name]).over_ranks() for name in stats[0]}
    scalars = {name: layer.scalars() for name, layer in layers.items()}
    shares = {key: {name: figures[key] for name, figures in scalars.items()} for key in ("dropped", "not_asked")}
    return {"load": {name: layer.load().tolist() for name, layer in layers.items()}, **shares}


def report(out: Path, history: list[dict], model: nn.Module, text: Tensor, tokens_per_step: int) -> None:
    """The end of a run: pictures, figures, and a page that shows where the bytes of a text (n) go."""
    last = history[-1]
    page = routing_page(model, text, last["step"]) if last["load"] else None
    with ending_together(f"; nothing is lost, and --resume writes pictures and page of {out} again"):
        if dist.get_rank() == 0:
            plot_training(history, out / "training.png")
            if page is not None:
                plot_load({record["step"]: record["load"] for record in history}, out / "load.png")
                write_whole(out / "routing.html", page)
    speed = last["step"] * tokens_per_step / last["train_seconds"]
    say(f"finished {last['step']} steps: {last['train_seconds']:.0f} s of training, {speed:,.0f} tokens/s")
    for layer, load in last["load"].items():
        say(f"{layer}: experts get {min(load):.1%} to {max(load):.1%} of the choices asked for")
    say(f"{last['validation_bits']:.3f} bits per byte in validation; wrote {out}")
    if page is not None:
        say(f"open {out / 'routing.html'} to see where the bytes of a text go")


@torch.no_grad()
def routing_page(model: nn.Module, text: Tensor, step: int) -> str:
    """A page that colours the bytes of a text (n) by the experts that they went to."""
    model.eval()
    with record_routing(model) as routings:
        model(text.unsqueeze(0).long().to(next(model.parameters()).device))
    title = f"Where the bytes of a validation text go after {step} steps"
    return text_page([printable(bytes([byte])) for byte in text.tolist()], routings, title=title)


def printable(content: bytes) -> str:
    """Text that no terminal acts on: control characters and what is no text are escaped; lines and tabs stay."""
    text = content.decode(errors="backslashreplace")
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def plot_training(history: list[dict], path: Path) -> None:
    """Learning curves and, of a sparse model, what became of the choices."""
    layers, steps = list(history[0]["load"]), [record["step"] for record in history]
    figure = Figure(figsize=(9.6, 3.6 + 0.2 * len(layers)), layout="constrained")
    curves, *others = figure.subplots(1, 2 if layers else 1, squeeze=False)[0]
    curves.plot(steps, [record["train_bits"] for record in history], color="0.6", label="training")
    curves.plot(steps, [record["validation_bits"] for record in history], color="black", label="validation")
    title = f"Loss: {history[-1]['validation_bits']:.2f} bits per byte in validation"
    curves.set(title=title, xlabel="step", ylabel="bits per byte")
    curves.legend(frameon=False)
    for unused in others:
        reasons = {"dropped": ("-", "dropped, expert full"), "not_asked": ("--", "not asked for, by policy")}
        for name, (style, reason) in reasons.items():
            for color, layer in enumerate(layers):
                shares = [record[name][layer] for record in history]
                unused.plot(steps, shares, style, color=f"C{color}", label=f"{layer}: {reason}")
        unused.yaxis.set_major_formatter(PercentFormatter(1))
        unused.set(title="Choices that reached no expert, in training", xlabel="step", ylabel="share of all choices")
        unused.set_ylim(0, None)
        # below, where it hides no curve
        figure.legend(*unused.get_legend_handles_labels(), loc="outside lower right", ncols=2, fontsize="small")
    figure.savefig(path, dpi=100)


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Mean, and least to most."""
    return f"{mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"
