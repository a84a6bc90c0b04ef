"""Many runs, each with a file of its own: what is missing is run, so that an interrupted script goes on."""

import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from processes import processes
from runs import write_whole
from tqdm import tqdm


class Run(NamedTuple):
    """A run of a script that makes many."""

    name: str
    """Of its file."""
    arguments: tuple[Any, ...]
    """What the function that runs it is called with."""
    settings: dict[str, Any]
    """All that its numbers depend on, for a file of other settings to be told."""


def results(function: Callable[..., dict], wanted: Sequence[Run], out: Path, jobs: int = 1) -> list[dict]:
    """What the function returned for each run, now or, by its file in ``out``, before.

    Missing runs take turns in ``jobs`` processes, each a group of its own with one thread.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{run.name.replace(', ', ' ').replace(' ', '-')}.json" for run in wanted]
    missing = []
    for place, path in enumerate(paths):
        if path.exists():
            _read(path, wanted[place])  # whose settings may be others, which is to be known before anything runs
        else:
            missing.append(place)
    with (
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool,
        tqdm(total=len(wanted), initial=len(wanted) - len(missing), unit="run", disable=not missing) as progress,
    ):
        running = {pool.submit(_run_alone, function, wanted[place].arguments): place for place in missing}
        for done in as_completed(running):
            place = running[done]
            write_whole(paths[place], json.dumps({"settings": wanted[place].settings, **done.result()}))
            progress.update()
    return [_read(path, run) for path, run in zip(paths, wanted, strict=True)]


def _run_alone(function: Callable[..., dict], arguments: tuple[Any, ...]) -> dict:
    torch.set_num_threads(1)
    with processes():
        return function(*arguments)


def _read(path: Path, run: Run) -> dict:
    result = json.loads(path.read_text())
    if result["settings"] != json.loads(json.dumps(run.settings)):
        was = f"{path} was run with other settings, {result['settings']}"
        raise SystemExit(f"{Path(sys.argv[0]).name}: {was}: choose another --out")
    return result
