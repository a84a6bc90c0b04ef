"""How close is the layer to its experts' matrix products alone, and how far from other implementations?

Printed are ratios of the same round.

    python benchmarks/speed.py                       # everything, about an hour
    python benchmarks/speed.py --only decoding       # the workloads with that word in their name
    python benchmarks/speed.py --no-peers            # without installing other libraries into a temporary folder

Compared are, each in fresh processes that take turns:

    floor     only the matrix products of the experts on the rows that the layer routes, as `nn.Linear` computes them
    layer     `MoE`
    dense     `MoE` through the einsums with its dense tensors, which are quadratic in n
    0.1.8     st-moe-pytorch 0.1.8
    plain     `MoE` without what Mixtral's block lacks: biases, multiplicative biases, gradients of the gates through
              the dispatched tokens
    mixtral   `MixtralSparseMoeBlock` of Hugging Face transformers with grouped products

The first four run with the usual capacities and policies. Mixtral's block drops nothing, and is compared with layers
that do so too and ask for every choice, all with as many hidden units: a multiple of 16, as its products need.

By default, glibc gives freed memory back, so that each step may fault in fresh pages for the gradients of all weights,
or not, by chance, which for many small experts takes as long as their products. With --keep-memory it keeps them.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

CONTENDERS = ("floor", "layer", "dense", "plain", "0.1.8", "mixtral")
PEERS = ("st-moe-pytorch==0.1.8", "transformers")
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


class Workload(NamedTuple):
    name: str
    b: int
    n: int
    dim: int
    experts: int
    k: int = 2
    training: bool = True
    """Forward and backward in training mode, or else forward in evaluation under no_grad."""
    autocast: bool = False
    compiled: bool = False
    dropless: bool = False
    """Nothing is dropped, and every choice asked for."""


WORKLOADS = [
    Workload("README layer", 4, 1024, 512, 16),
    Workload("README layer, forward only", 4, 1024, 512, 16, training=False),
    Workload("README layer, compiled", 4, 1024, 512, 16, compiled=True),
    Workload("4k tokens", 1, 4096, 512, 16),
    *(Workload(f"length {n}", 1, n, 256, 16) for n in (1024, 4096, 16384)),
    *(Workload(f"{experts} experts", 1, 512, 512, experts) for experts in (8, 64, 256)),
    *(Workload(f"top {k}", 1, 2048, 256, 16, k=k) for k in (1, 2, 4)),
    *(Workload(f"top 8 of {experts} small experts", 1, 1024, 256, experts, k=8) for experts in (64, 256)),
    *(
        work._replace(name=f"dropless, {work.name}", dropless=True)
        for work in (
            Workload("README layer", 4, 1024, 512, 16),
            Workload("README layer, forward only", 4, 1024, 512, 16, training=False),
            Workload("README layer, bfloat16 autocast", 4, 1024, 512, 16, autocast=True),
            *(Workload(f"{experts} experts", 1, 512, 512, experts) for experts in (64, 256)),
            *(Workload(f"top {k}", 1, 2048, 256, 16, k=k) for k in (1, 2, 4)),
            Workload("top 8 of 64 small experts", 1, 1024, 256, 64, k=8),
            *(Workload(f"decoding, batch {b}", b, 1, 512, 16, training=False) for b in (1, 8, 64)),
            Workload("decoding, batch 8, compiled", 8, 1, 512, 16, training=False, compiled=True),
            Workload("half the width, compiled", 2, 512, 256, 16, compiled=True),
        )
    ),
]


def is_possible(contender: str, work: Workload) -> bool:
    """Whether a contender can run a workload.

    Mixtral's block has no capacity to be run with; the dense and old forms, which are quadratic in it, are not run
    without, and not compiled; 0.1.8 chooses two experts at least.
    """
    if contender in ("plain", "mixtral"):
        return work.dropless and not work.compiled
    if contender in ("dense", "0.1.8"):
        return not work.dropless and not work.compiled and not (contender == "0.1.8" and work.k < 2)
    return True


def hidden_units(work: Workload) -> int:
    """Of an expert as Mixtral's grouped products can have them."""
    return int(work.dim * 4 * 2 / 3) // 16 * 16


def layer(work: Workload, is_plain: bool = False) -> Any:
    """This library's layer or, in the environment of the peers, that of 0.1.8."""
    import st_moe_pytorch

    if not work.dropless:
        return st_moe_pytorch.MoE(work.dim, work.experts, gating_top_n=work.k).train(work.training)
    nothing_dropped = {"capacity_factor_train": None, "capacity_factor_eval": None}
    policies = {"policy_train": "all", "policy_eval": "all"}
    parts = {"straight_through_dispatch_tensor": not is_plain, **nothing_dropped, **policies}
    gate = st_moe_pytorch.TopNGating(work.dim, work.experts, top_n=work.k, **parts)
    biases = {"bias": not is_plain, "mult_bias": not is_plain}
    hidden_mult = hidden_units(work) * 1.5 / work.dim + 1e-6
    experts = [st_moe_pytorch.Expert(work.dim, hidden_mult, **biases) for _ in range(work.experts)]
    return st_moe_pytorch.MoE(work.dim, work.experts, experts=experts, gate=gate).train(work.training)


def mixtral(work: Workload) -> Any:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=work.dim,
        intermediate_size=hidden_units(work),
        num_local_experts=work.experts,
        num_experts_per_tok=work.k,
        experts_implementation="grouped_mm",
    )
    block = MixtralSparseMoeBlock(config).train(work.training)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return block


def matrix_products(work: Workload, x: Tensor) -> Callable[[], object]:
    """The two products of each expert with rows and, in training, its backward's four; results are kept for a step."""
    moe = layer(work)
    routing = moe.gate.route(x.detach())
    layout = routing.rows()
    rows, ends = routing.dispatch(x.detach(), layout), layout.offsets.tolist()
    jobs = []
    for expert, start, stop in zip(moe.experts.experts, [0, *ends], ends, strict=False):
        part = rows[start:stop]
        first, _, last = (child.requires_grad_(False) for child in expert.net)
        if len(part):
            jobs.append(
                (
                    part,
                    torch.randn(len(part), last.in_features),
                    torch.randn(len(part), first.out_features),
                    first,
                    last,
                )
            )

    def run() -> None:
        results = [(first(part), last(hidden)) for part, hidden, _, first, last in jobs]
        if work.training:
            _ = [
                (y @ last.weight, y.t() @ hidden, wide @ first.weight, wide.t() @ part)
                for (part, hidden, wide, first, last), (_, y) in zip(jobs, results, strict=True)
            ]

    return run


def build(contender: str, work: Workload) -> Callable[[], object]:
    """One forward, and backward in training, of a contender."""
    torch.manual_seed(0)
    x = torch.randn(work.b, work.n, work.dim, requires_grad=work.training)
    if contender == "floor":
        run = matrix_products(work, x)
    else:
        model = mixtral(work) if contender == "mixtral" else layer(work, contender == "plain")
        if contender == "dense":
            model.gate.forward = model.gate.forward  # an assigned forward decides by its dense tensors
            warnings.filterwarnings("ignore", message="the gate's forward is overridden")
        if work.compiled:
            model = torch.compile(model, fullgraph=True)
        cotangent = torch.randn_like(x)

        def run() -> None:
            with torch.set_grad_enabled(work.training):
                results = model(x)
                outputs, *losses = results if isinstance(results, tuple) else (results,)
                if work.training:
                    total = (outputs * cotangent).sum()
                    (total + losses[0].sum() if contender != "mixtral" else total).backward()
                    model.zero_grad(set_to_none=True)
                    x.grad = None

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=work.autocast):
            run()

    return step


def measure(contender: str, work: Workload) -> dict[str, float]:
    """Median seconds of a step, and the most memory in bytes that a step takes beyond what was there before (Linux)."""
    step = build(contender, work)
    status = Path("/proc/self/status")

    def memory(key: str) -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith(key)).split()[1]) * 1024

    peak = 0
    if status.exists():
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        step()
        peak = memory("VmHWM") - before
    step()
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds) < 1.5 and len(seconds) < 200):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": median(seconds), "memory": peak}


def install_peers(folder: str) -> str:
    """A virtual environment that has the peers and sees the packages of this one for the rest, and its python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = f"{folder}/bin/python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    Path(site.stdout.strip(), "parent.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS], check=True, capture_output=True)
    return python


Results = dict[str, list[dict[str, float]]]
"""What each contender took, a result for each round."""


def floor_of(work: Workload) -> Workload:
    """The same products in the same mode: workloads that have this in common are compared with one floor."""
    return work._replace(name="", compiled=False)


def compare(
    works: Sequence[Workload], pythons: dict[str, str], rounds: int, settings: dict[str, str]
) -> dict[str, Results]:
    """Every contender on workloads of one floor, in turns, each time in a fresh process."""
    found: dict[str, Results] = {work.name: {name: [] for name in pythons if is_possible(name, work)} for work in works}
    environment = os.environ | settings | {"PYTHONWARNINGS": "ignore"}
    for _ in range(rounds):
        floor: dict[str, float] = {}
        for work in works:
            for contender, results in found[work.name].items():
                if contender == "floor" and floor:
                    results.append(floor)
                    continue
                command = [pythons[contender], __file__, "--measure", contender, json.dumps(work)]
                process = subprocess.run(command, capture_output=True, text=True, env=environment)
                if process.returncode:
                    raise SystemExit(f"{contender}, {work.name}:\n{process.stderr}")
                results.append(json.loads(process.stdout.splitlines()[-1]))
                floor = results[-1] if contender == "floor" else floor
    return found


def ratios(found: Results, name: str, key: str, base: str) -> str:
    """A contender's multiple of another one's, round by round: the median and, in brackets, the least and the most."""
    if name not in found or base not in found:
        return ""
    each = [mine[key] / max(theirs[key], 1e-9) for mine, theirs in zip(found[name], found[base], strict=True)]
    spread = f" ({min(each):.2f} to {max(each):.2f})" if len(each) > 1 else ""
    return f"{median(each):.2f}{spread}"


def columns(ours: Sequence[str], peers: Sequence[str]) -> dict[str, Callable[[Results], str]]:
    """Heads of a table's columns, and what stands in them for a workload."""

    def each(key: str, names: Sequence[str], bases: Sequence[str]) -> dict[str, Callable[[Results], str]]:
        pairs = product(names, bases)
        return {f"{name} / {base}": partial(ratios, name=name, key=key, base=base) for name, base in pairs}

    return {
        "floor": lambda found: f"{median(result['seconds'] for result in found['floor']) * 1e3:.1f} ms",
        **each("seconds", (*ours, *peers), ("floor",)),
        **each("seconds", ours, peers),
        "memory of layer": lambda found: f"{median(result['memory'] for result in found['layer']) / 2**20:.0f} MiB",
        **{f"memory: {head}": of for head, of in each("memory", peers, ("layer",)).items()},
    }


def plot(found: dict[str, Results], path: Path) -> None:
    """Cost per token over the length of the sequence and over the number of experts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
    series = {
        "tokens of a sequence": (r"length \d+", lambda work: work.n),
        "experts, for 512 tokens": (r"\d+ experts", lambda work: work.experts),
    }
    for axes, (label, (name_of_work, of)) in zip(panels, series.items(), strict=True):
        works = [work for work in WORKLOADS if re.fullmatch(name_of_work, work.name) and work.name in found]
        for color, name in enumerate(CONTENDERS):
            taken = {work: found[work.name][name] for work in works if name in found[work.name]}
            points = [
                (of(work), median(r["seconds"] for r in results) / work.b / work.n * 1e6)
                for work, results in taken.items()
            ]
            if points:
                axes.loglog(*zip(*points, strict=True), marker="o", color=f"C{color}", label=name)
        values = sorted({of(work) for work in works})
        axes.set_xticks(values, [f"{value:,}" for value in values], minor=False)
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel(label)
    panels[0].set_ylabel("µs per token, forward and backward")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--only", default="", help="run the workloads whose name contains this")
    parser.add_argument(
        "--rounds", type=int, default=3, help="processes of each contender and workload, of which the median counts"
    )
    parser.add_argument("--no-peers", action="store_true", help="compare with nothing that has to be installed")
    parser.add_argument(
        "--keep-memory", action="store_true", help="have the allocator keep what a step frees for the next one"
    )
    parser.add_argument("--plot", type=Path, help="write a picture of the cost per token here (needs matplotlib)")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        contender, work = args.measure
        print(json.dumps(measure(contender, Workload(*json.loads(work)))))
        return
    works = [work for work in WORKLOADS if args.only in work.name]
    with tempfile.TemporaryDirectory() as folder:
        pythons = dict.fromkeys(CONTENDERS[:4], sys.executable)
        if not args.no_peers:
            pythons |= dict.fromkeys(CONTENDERS[4:], install_peers(folder))
        print(
            f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()} {platform.system()}\n"
        )
        found: dict[str, Results] = {}
        settings = KEEP_MEMORY if args.keep_memory else {}
        for ours, peers, is_dropless in (
            (("layer",), ("dense", "0.1.8"), False),
            (("layer", "plain"), ("mixtral",), True),
        ):
            table = columns(ours, peers)
            mine = [work for work in works if work.dropless == is_dropless]
            if mine:
                heads = ["workload", "(b, n, d), experts, k", *table]
                print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
            for floor in dict.fromkeys(map(floor_of, mine)):
                alike = [work for work in mine if floor_of(work) == floor]
                found |= compare(alike, pythons, args.rounds, settings)
                for work in alike:
                    shape = f"({work.b}, {work.n}, {work.dim}), {work.experts}, {work.k}"
                    cells = [of(found[work.name]) for of in table.values()]
                    print(f"| {' | '.join((work.name, shape, *cells))} |", flush=True)
            print()
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
