"""How fast is the layer on a GPU, against its experts' grouped products alone and against the experts of transformers?

    python benchmarks/accelerator.py                 # training and decoding in bfloat16, some minutes on one GPU
    python benchmarks/accelerator.py --device cpu --small      # only to see that it runs

A training step is forward and backward, dropless, timed by events of the device while the host runs ahead, as in
training: the median over rounds of several steps. Memory is the allocator's peak beyond what the model takes. Launches
and waits are counted by the profiler in one step. transformers is compared if it is installed; its experts have neither
biases nor `mult_bias`, so that the layer is measured with and without them.
"""

import argparse
import gc
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from st_moe_pytorch import Expert, MoE, TopNGating

ROUNDS, STEPS = 5, 8


class Work(NamedTuple):
    b: int
    n: int
    dim: int
    hidden: int
    experts: int
    k: int


LARGE = {
    "128 small experts": Work(8, 4096, 2048, 768, 128, 8),
    "8 large experts": Work(2, 4096, 4096, 14336, 8, 2),
}
SMALL = {"small": Work(2, 64, 64, 32, 8, 2)}


class Clock:
    """Milliseconds of steps on a device."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"

    def measure(self, step: Callable[[], object], steps: int = STEPS) -> float:
        """Median over rounds of the time of a step, of which several are started before any is waited for."""
        for _ in range(3):
            step()
        return median(self._round(step, steps) for _ in range(ROUNDS))

    def _round(self, step: Callable[[], object], steps: int) -> float:
        if not self.on_gpu:
            start = time.perf_counter()
            for _ in range(steps):
                step()
            return (time.perf_counter() - start) * 1e3 / steps
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(steps):
            step()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / steps

    def peak(self, step: Callable[[], object]) -> float:
        """GiB that a step takes beyond what was there before; 0 where no allocator counts."""
        if not self.on_gpu:
            return 0.0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    def counts(self, step: Callable[[], object]) -> tuple[int, int]:
        """Launches on the device in a step, and how often the host waits for it."""
        if not self.on_gpu:
            return 0, 0
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            step()
        events = found.events()
        launches = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events)
        return launches, sum("Synchronize" in event.name for event in events)


def layer(work: Work, plain: bool) -> MoE:
    """A layer that asks for all choices and drops none, as transformers' experts; plain: without what those lack.

    That is biases, `mult_bias` and gradients of the gates through the dispatched tokens.
    """
    mult = work.hidden * 1.5 / work.dim + 1e-6
    experts = [Expert(work.dim, mult, mult_bias=not plain, bias=not plain) for _ in range(work.experts)]
    gate = TopNGating(work.dim, work.experts, top_n=work.k, capacity_factor_train=None, capacity_factor_eval=None)
    gate.policy_train = gate.policy_eval = "all"
    gate.straight_through_dispatch_tensor = not plain
    return MoE(work.dim, work.experts, experts=experts, gate=gate)


def mixtral(work: Work, implementation: str) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    return MixtralSparseMoeBlock(
        MixtralConfig(
            hidden_size=work.dim,
            intermediate_size=work.hidden,
            num_local_experts=work.experts,
            num_experts_per_tok=work.k,
            hidden_act="gelu",
            experts_implementation=implementation,
        )
    )


def matrix_products(work: Work, x: Tensor) -> Callable[[], object]:
    """The grouped products of forward and backward on the rows that a layer routes, and nothing else."""
    moe = layer(work, plain=True).to(x)
    with torch.no_grad():
        routing = moe.gate.route(x)
        layout = routing.rows()
        rows, offs = routing.dispatch(x, layout), layout.offsets
        up, down = (torch.stack([expert.net[i].weight for expert in moe.experts.experts]) for i in (0, 2))
        hidden, dup, dy = (
            rows.new_empty(len(rows), width).normal_() for width in (work.hidden, 2 * work.hidden, work.dim)
        )

    def run() -> None:
        F.grouped_mm(rows, up.transpose(1, 2), offs=offs)
        F.grouped_mm(hidden, down.transpose(1, 2), offs=offs)
        F.grouped_mm(dy, down, offs=offs)
        F.grouped_mm(dy.t(), hidden, offs=offs)
        F.grouped_mm(dup, up, offs=offs)
        F.grouped_mm(dup.t(), rows, offs=offs)

    return run


def training(model: Any, x: Tensor) -> Callable[[], object]:
    """One forward and backward of a model that returns outputs, or outputs and a loss."""
    cotangent = torch.randn_like(x)
    inputs = [x, *model.parameters()]

    def step() -> None:
        results = model(x)
        outputs, *losses = results if isinstance(results, tuple) else (results,)
        torch.autograd.backward([outputs, *losses[:1]], [cotangent, *(torch.ones_like(loss) for loss in losses[:1])])
        for t in inputs:
            t.grad = None

    return step


def contenders(work: Work, compiled: bool) -> dict[str, Callable[[], nn.Module]]:
    """How to build each, by name."""
    found: dict[str, Callable[[], nn.Module]] = {
        "layer": lambda: layer(work, plain=False),
        "plain layer": lambda: layer(work, plain=True),
    }
    try:
        import transformers
    except ImportError:
        print("transformers is not installed, so it is not compared")
    else:
        found[f"transformers {transformers.__version__}, grouped_mm"] = lambda: mixtral(work, "grouped_mm")
        if not compiled:
            found[f"transformers {transformers.__version__}, eager"] = lambda: mixtral(work, "eager")
    return found


def compare_training(works: dict[str, Work], clock: Clock, device: str, compiled: bool) -> None:
    header = ("training in bfloat16", "form", "ms", "/ products", "forward ms", "peak GiB", "launches", "waits")
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for name, work in works.items():
        torch.manual_seed(0)
        x = torch.randn(work.b, work.n, work.dim, device=device, dtype=torch.bfloat16, requires_grad=True)
        floor = clock.measure(matrix_products(work, x))
        print(f"| {name} | products alone | {floor:.2f} | 1 | | | | |", flush=True)
        for contender, build in contenders(work, compiled).items():
            with torch.device(device):
                model = build().bfloat16()
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.02)
            for form in ("eager", "compiled") if compiled else ("eager",):
                run = model if form == "eager" else torch.compile(model)
                step = training(run, x)
                taken = clock.measure(step)
                with torch.no_grad():
                    forward = clock.measure(partial(run, x))
                cells = f"{taken:.2f} | {taken / floor:.2f} | {forward:.2f} | {clock.peak(step):.2f} | "
                print(f"| {contender} | {form} | {cells}{' | '.join(map(str, clock.counts(step)))} |", flush=True)
            gc.collect()


def compare_decoding(work: Work, clock: Clock, device: str) -> None:
    """One token of each of a few sequences, as it comes and, on CUDA, replayed from a graph."""
    print("\n| decoding in bfloat16 | batch | ms | in a CUDA graph |\n|---|---|---|---|")
    with torch.device(device):
        models: dict[str, nn.Module] = {"layer": layer(work, plain=True)}
        for implementation in ("batched_mm", "grouped_mm"):
            models[f"transformers, {implementation}"] = mixtral(work, implementation)
    for name, model in models.items():
        model.bfloat16().eval()
        for batch in (1, 8, 64):
            x = torch.randn(batch, 1, work.dim, device=device, dtype=torch.bfloat16)
            with torch.no_grad():
                taken = clock.measure(partial(model, x), steps=1)
                replayed = f"{clock.measure(captured(model, x)):.3f}" if clock.on_gpu else ""
            print(f"| {name} | {batch} | {taken:.3f} | {replayed} |", flush=True)


def captured(model: nn.Module, x: Tensor) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x)
    return graph.replay


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="a size that runs anywhere")
    parser.add_argument("--compiled", action="store_true", help="time compiled forms too")
    args = parser.parse_args()
    works = SMALL if args.small else LARGE
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {where}\n")
    clock = Clock(args.device)
    compare_training(works, clock, args.device, args.compiled)
    compare_decoding(next(iter(works.values())), clock, args.device)


if __name__ == "__main__":
    main()
