"""Compare the ways of bringing rows to other ranks' experts and back, in one run: times, and bytes really sent.

    python benchmarks/communication.py

Each way is a `Strategy`, as `shard_experts` takes them; all must deliver the same rows. Processes on one machine talk
through gloo and the loopback network, whose counters (Linux) give the bytes. Times are those of the slowest rank,
medians of runs that take turns.
"""

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import accumulate, chain
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from st_moe_pytorch.distributed.collectives import Channel
from st_moe_pytorch.distributed.strategies import all_gather, all_to_all

CHANNEL = Channel("benchmark")
Traffic = list[list[int]]


def pick(everything: Tensor, sizes: list[int], traffic: Traffic, rank: int) -> Tensor:
    """This rank's rows among all ranks', in blocks of ``sizes``, the traffic of each rank first in its block."""
    starts = list(accumulate(sizes, initial=0))
    firsts = [start + sum(sent[:rank]) for start, sent in zip(starts, traffic, strict=False)]
    return torch.cat([everything[first : first + sent[rank]] for first, sent in zip(firsts, traffic, strict=True)])


def all_gather_padded(rows: Tensor, traffic: Traffic, channel: Channel) -> Tensor:
    """Torch's own all-gather, which wants equal sizes."""
    sizes = [max(map(sum, traffic))] * channel.size
    padded = torch.cat([rows, rows.new_zeros(sizes[0] - len(rows), *rows.shape[1:])])
    everything = rows.new_empty(sum(sizes), *rows.shape[1:])
    dist.all_gather_single(everything, padded)
    return pick(everything, sizes, traffic, channel.rank)


def reduce_scatter(rows: Tensor, traffic: Traffic, channel: Channel) -> Tensor:
    """The sum over ranks of buffers for all destinations, in which each rank fills its own lines."""
    received = [sum(column) for column in zip(*traffic, strict=True)]
    buffer = rows.new_zeros(channel.size, max(received), *rows.shape[1:])
    for destination, part in enumerate(rows.split(traffic[channel.rank])):
        first = sum(sent[destination] for sent in traffic[: channel.rank])
        buffer[destination, first : first + len(part)] = part
    mine = rows.new_empty(buffer.shape[1:])
    dist.reduce_scatter_single(mine, buffer.flatten(0, 1))
    return mine[: received[channel.rank]]


def broadcasts(rows: Tensor, traffic: Traffic, channel: Channel, asynchronous: bool = False) -> Tensor:
    """Every rank broadcasts its rows, one after the other or all at once."""
    sizes = [sum(sent) for sent in traffic]
    blocks = [
        rows if rank == channel.rank else rows.new_empty(size, *rows.shape[1:]) for rank, size in enumerate(sizes)
    ]
    works: list[Any] = [dist.broadcast(block, src=rank, async_op=asynchronous) for rank, block in enumerate(blocks)]
    for work in filter(None, works):
        work.wait()
    return pick(torch.cat(blocks), sizes, traffic, channel.rank)


def broadcasts_at_once(rows: Tensor, traffic: Traffic, channel: Channel) -> Tensor:
    return broadcasts(rows, traffic, channel, asynchronous=True)


WAYS: dict[str, Callable[[Tensor, Traffic, Channel], Tensor]] = {
    "all-to-all": all_to_all,
    "all-gather": all_gather,
    "all-gather, padded": all_gather_padded,
    "reduce-scatter": reduce_scatter,
    "broadcasts, synchronous": broadcasts,
    "broadcasts, asynchronous": broadcasts_at_once,
}


def loopback_bytes() -> int:
    """Bytes that all processes of this machine have sent to each other."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


def there_and_back(way: Callable[..., Tensor], rows: Tensor, traffic: Traffic) -> Tensor:
    arrived = way(rows, traffic, CHANNEL)
    return way(arrived * (1 + CHANNEL.rank), [list(line) for line in zip(*traffic, strict=True)], CHANNEL)


@torch.no_grad()
def measure(rank: int, ranks: int, rendezvous: str, sizes: list[tuple[int, int]], repeats: int, results: Any) -> None:
    """Times in seconds and bytes of every way and size, into results by rank 0."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=ranks, timeout=timedelta(minutes=2))
    for tokens, dim in sizes:
        generator = torch.Generator().manual_seed(0)
        # destinations drawn at random, so that all pairs of ranks have a little more or less to tell each other
        traffic = [
            torch.randint(ranks, (tokens,), generator=generator).bincount(minlength=ranks).tolist()
            for _ in range(ranks)
        ]
        rows = torch.randn(tokens, dim, generator=torch.Generator().manual_seed(rank))
        expected = torch.cat([part * (1 + r) for r, part in enumerate(rows.split(traffic[rank]))])
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        sent: dict[str, list[int]] = {name: [] for name in WAYS}
        for _ in range(repeats + 1):
            for name, way in WAYS.items():
                dist.barrier()
                before, start = loopback_bytes(), time.perf_counter()
                outcome = there_and_back(way, rows, traffic)
                seconds[name].append(time.perf_counter() - start)
                dist.barrier()
                sent[name].append(loopback_bytes() - before)
                assert torch.equal(outcome, expected), name
        slowest = torch.tensor([times[1:] for times in seconds.values()])  # without the first, which opens connections
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        fewest = (
            2
            * rows.element_size()
            * dim
            * sum(sum(chain(line[:r], line[r + 1 :])) for r, line in enumerate(traffic))
            / ranks
        )
        if rank == 0:
            times = {name: median(line.tolist()) for name, line in zip(WAYS, slowest, strict=True)}
            results.put(
                (ranks, tokens, dim, times, {name: median(numbers) / ranks for name, numbers in sent.items()}, fewest)
            )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--sizes", nargs="+", default=["64x512", "1024x512", "8192x512"], help="rows of a rank x width")
    parser.add_argument("--repeats", type=int, default=21, help="runs of each way, of which the median counts")
    args = parser.parse_args()
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes]
    results = mp.get_context("spawn").SimpleQueue()
    print(
        f"torch {torch.__version__}, gloo on {platform.machine()}, {torch.get_num_threads()} cores, one thread "
        "per rank\n"
    )
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as directory:
            arguments = (ranks, f"{directory}/rendezvous", sizes, args.repeats, results)
            mp.start_processes(measure, arguments, nprocs=ranks, start_method="spawn")
        for _ in sizes:
            ranks, tokens, dim, times, sent, fewest = results.get()
            first = next(iter(times))
            print(
                f"{ranks} ranks, {tokens} rows of {dim} float32 each, there and back; {first}: "
                f"{times[first] * 1e3:.2f} ms"
            )
            print("| way | time / all-to-all | bytes sent per rank / fewest possible |\n|---|---|---|")
            for name in times:
                print(f"| {name} | {times[name] / times[first]:.2f} | {sent[name] / fewest:.2f} |")
            print(f"fewest possible: {fewest:,.0f} bytes per rank\n", flush=True)


if __name__ == "__main__":
    main()
