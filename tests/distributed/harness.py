"""Runs functions on several processes that form a gloo group, and fails, never hangs, when one of them does.

A test is a module-level function plus one call: ``workers.run(function, *arguments)`` calls ``function(rank,
*arguments)`` on every rank.
"""

import datetime
import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

PROCESSES = multiprocessing.get_context("forkserver")
# what the tests, or DistributedDataParallel when it is built, would else import in each process, which takes seconds
PROCESSES.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", "st_moe_pytorch.distributed"]
)


class Workers:
    """Processes 0 to size - 1, started at the first run and kept for the next, unless a run goes wrong."""

    def __init__(self, size: int, timeout: float = float(os.environ.get("RANKS_TIMEOUT", 120))) -> None:
        self.size = size
        self.timeout = timeout
        self.processes: list[Any] = []

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Results of all ranks.

        Raises AssertionError with the traceback of each rank that failed, or that did not end in time.
        """
        outcomes = self.outcomes(function, *arguments)
        failures = [f"rank {rank} of {self.size}:\n{error}" for rank, (_, error) in enumerate(outcomes) if error]
        assert not failures, "\n".join(failures)
        return [result for result, _ in outcomes]

    def outcomes(self, function: Callable[..., Any], *arguments: Any) -> list[tuple[Any, str]]:
        """Result and traceback of every rank; a rank that died has its exit code in place of a traceback."""
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, arguments))
        deadline = time.monotonic() + self.timeout + 20
        outcomes: list[Any] = [(None, f"no answer in {self.timeout + 20} seconds")] * self.size
        waiting = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        while waiting and (left := deadline - time.monotonic()) > 0:
            for pipe in multiprocessing.connection.wait(list(waiting), left):
                rank = waiting.pop(pipe)
                try:
                    outcomes[rank] = pipe.recv()
                except EOFError:
                    self.processes[rank].join()
                    outcomes[rank] = None, f"exit code {self.processes[rank].exitcode}"
        if any(error for _, error in outcomes):
            self.kill()
        return outcomes

    def close(self) -> None:
        """End all processes in order."""
        for pipe in self.pipes if self.processes else ():
            pipe.send(None)
        for process in self.processes:
            process.join(30)
        codes = [process.exitcode for process in self.processes]
        self.kill()
        assert not any(codes), f"exit codes {codes}"

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
            process.close()
        if self.processes:
            for pipe in self.pipes:
                pipe.close()
            self.directory.cleanup()
        self.processes = []

    def _start(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.pipes = []
        for rank in range(self.size):
            ours, theirs = PROCESSES.Pipe()
            arguments = rank, self.size, os.path.join(self.directory.name, "rendezvous"), self.timeout, theirs
            self.processes.append(PROCESSES.Process(target=_work, args=arguments, daemon=True))
            self.processes[-1].start()
            self.pipes.append(ours)
            theirs.close()


def _work(rank: int, size: int, rendezvous: str, timeout: float, pipe: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # fresh memory is NaN from now on, so that a row that nobody wrote is seen
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    delay = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=delay)
    while (task := pipe.recv()) is not None:
        function, arguments = task
        torch.manual_seed(0)
        try:
            outcome = function(rank, *arguments), ""
        except Exception:
            outcome = None, traceback.format_exc()
        pipe.send(outcome)
        sys.stdout.flush()
    dist.destroy_process_group()
