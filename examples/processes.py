"""One process or several that torchrun started: how they begin, speak and end together."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm


def started_processes() -> int:
    """How many processes torchrun started; 0 if this one was started without it."""
    return int(os.environ.get("WORLD_SIZE", 0))


@contextmanager
def processes(device: str = "cpu", several: bool = False) -> Iterator[None]:
    """Join the processes that torchrun started; a process of its own is a group of one."""
    alone = {} if several else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if device == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise SystemExit(f"--device cuda needs a GPU for every process, here are {torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank)
    dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", timeout=timedelta(minutes=5), **alone)
    try:
        yield
    finally:
        dist.destroy_process_group()


def say(text: str, **where: Any) -> None:
    """Print on rank 0, above a progress bar if there is one."""
    if dist.get_rank() == 0:
        tqdm.write(text, **where)


@contextmanager
def ending_together(way_out: str = "") -> Iterator[None]:
    """If a rank cannot read or write in this block, all ranks end, and one line says why and what to do."""
    problem = ""
    try:
        yield
    except (OSError, ValueError, CheckpointException) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        problem = " ".join((str(cause) or type(cause).__name__).split()) + way_out
    problems = [""] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if any(problems):
        say(f"{Path(sys.argv[0]).name}: {next(filter(None, problems))}", file=sys.stderr)
        dist.barrier()  # torchrun kills the other processes when one ends: first, the line has to be out
        raise SystemExit(1)


def mean_over_ranks(t: Tensor) -> Tensor:
    dist.all_reduce(t)
    return t / dist.get_world_size()
