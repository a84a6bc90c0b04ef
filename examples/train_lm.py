"""Train a byte-level language model with sparse layers and see what its routers do. Needs `pip install 'st-moe-pytorch[examples]'`.

    python examples/train_lm.py                              # on the source of Python's standard library, minutes on 2 CPU cores
    python examples/train_lm.py --dense --out runs/dense     # the baseline: as much compute per token, no routing
    python examples/train_lm.py --text book.txt --out runs/book --prompt "Once "
    python examples/train_lm.py --resume                     # continue a run that was stopped or killed, with the very same numbers

The output directory gets checkpoint.pt, metrics.jsonl (a line per evaluation) and training.png.
"""

import argparse
import hashlib
import json
import math
import os
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from einops import rearrange
from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from st_moe_pytorch import Expert, MoE, RMSNorm, Routing, SparseMoEBlock, TopNGating

matplotlib.use("Agg")

HEAD_DIM = 32
TOP_N = 2
EVAL_WINDOWS = 128
NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "__pycache__"}


def rotary(x: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of queries or keys (b h n d)."""
    n, d = x.shape[-2:]
    angles = torch.outer(torch.arange(n, device=x.device), 10_000 ** -torch.linspace(0, 1, d // 2, device=x.device))
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).type_as(x)


class Attention(nn.Module):
    """Causal self-attention with normalised input, (b n d) -> (b n d)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.to_qkv(self.norm(x)), "b n (qkv h d) -> qkv b h n d", qkv=3, d=HEAD_DIM)
        attended = F.scaled_dot_product_attention(rotary(q), rotary(k), v, is_causal=True)
        return self.to_out(rearrange(attended, "b h n d -> b n (h d)"))


class DenseBlock(nn.Module):
    """A `SparseMoEBlock` without routing: one feed-forward as wide as the experts that a token uses together."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.wide = Expert(dim, hidden_mult=4 * TOP_N, prenorm=True)
        self.ff_after = Expert(dim, prenorm=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.wide(x) + x
        return self.ff_after(x) + x, x.new_zeros(())


def sparse_block(dim: int, num_experts: int, capacity_factor: float) -> SparseMoEBlock:
    # Where capacity binds, later tokens can take the place of a token's second choice: evaluation drops nothing, so that it sees no future.
    moe = MoE(dim, num_experts, gating_top_n=TOP_N, capacity_factor_train=capacity_factor, capacity_factor_eval=None)
    return SparseMoEBlock(moe)


class LanguageModel(nn.Module):
    """Bytes (b n) -> logits of the next byte (b n 256) and the routers' auxiliary loss, 0-d."""

    def __init__(self, dim: int, depth: int, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, dim)
        self.attentions = nn.ModuleList(Attention(dim) for _ in range(depth))
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.to_logits = nn.Sequential(RMSNorm(dim), nn.Linear(dim, 256))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(x)
        total_aux_loss = x.new_zeros(())
        for attention, block in zip(self.attentions, self.blocks, strict=True):
            x, aux_loss, *_ = block(attention(x) + x)
            total_aux_loss = total_aux_loss + aux_loss
        return self.to_logits(x), total_aux_loss


class RoutingMonitor:
    """Counts what becomes of tokens' choices in every sparse layer during training, by wrapping `gate.route`."""

    def __init__(self, model: nn.Module) -> None:
        self.gates = [module for module in model.modules() if isinstance(module, TopNGating)]
        self.reset()
        for layer, gate in enumerate(self.gates):
            gate.route = self.watch(layer, gate, gate.route)

    def reset(self) -> None:
        self.asked = [torch.zeros(gate.num_gates) for gate in self.gates]
        self.choices, self.dropped, self.not_asked = torch.zeros(3, len(self.gates))

    def watch(self, layer: int, gate: TopNGating, route: Callable[..., Routing]) -> Callable[..., Routing]:
        def watched(*args, **kwargs) -> Routing:
            routing = route(*args, **kwargs)
            if gate.training:
                self.asked[layer] += routing.indices[routing.asked].bincount(minlength=gate.num_gates)
                self.choices[layer] += routing.indices.numel()
                self.dropped[layer] += routing.dropped.sum()
                self.not_asked[layer] += routing.not_asked.sum()
            return routing

        return watched

    def shares(self) -> dict[str, list]:
        """Per layer: each expert's share of the choices asked for; the shares of all choices that were dropped, or not asked for."""
        load = [(asked / asked.sum()).tolist() for asked in self.asked]
        return {"load": load, "dropped": (self.dropped / self.choices).tolist(), "not_asked": (self.not_asked / self.choices).tolist()}


def read_corpus(args: argparse.Namespace) -> list[Tensor]:
    """Training and validation bytes: a file and its last tenth, or Python's standard library and every 20th file of it."""
    if args.text is not None:
        content = args.text.read_bytes()
        cut = len(content) * 9 // 10
        parts = content[:cut], content[cut:]
    else:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [path.read_bytes() for path in sorted(root.rglob("*.py")) if NOT_SOURCE.isdisjoint(path.relative_to(root).parts)]
        parts = b"".join(file for number, file in enumerate(files) if number % 20 != 10), b"".join(files[10::20])
    sizes = [len(part) for part in parts]
    if min(sizes) <= args.seq_len:
        raise ValueError(f"text is too short: {sizes[0]} bytes to train on and {sizes[1]} to validate, --seq-len {args.seq_len} needs more")
    return [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts]


def windows(text: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, the next bytes, (b n) each, of the windows that start at (b)."""
    window = text[starts.unsqueeze(-1) + torch.arange(length + 1)].long()
    return window[:, :-1], window[:, 1:]


def training_batch(text: Tensor, step: int, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The batch of a step depends on step and seed alone, so that a resumed run sees what it would have seen."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    return windows(text, torch.randint(len(text) - args.seq_len, (args.batch,), generator=generator), args.seq_len)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor], autocast: bool) -> tuple[Tensor, Tensor]:
    """Mean loss of a batch in nats per byte, and the auxiliary loss."""
    inputs, targets = batch
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, aux_loss = model(inputs)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()), aux_loss


@torch.no_grad()
def evaluate(model: nn.Module, text: Tensor, args: argparse.Namespace) -> float:
    """Bits per byte on the same windows every time, spread evenly over the text."""
    model.eval()
    nats = 0.0
    for starts in torch.linspace(0, len(text) - args.seq_len - 1, EVAL_WINDOWS).long().split(args.batch):
        loss, _ = cross_entropy(model, windows(text, starts, args.seq_len), args.autocast)
        nats += loss.item() * len(starts)
    model.train()
    return nats / EVAL_WINDOWS / math.log(2)


@torch.no_grad()
def generate(model: nn.Module, args: argparse.Namespace, length: int = 400, temperature: float = 0.7) -> str:
    model.eval()
    generator = torch.Generator().manual_seed(args.seed)
    text = torch.tensor([list(args.prompt.encode())])
    for _ in range(length):
        logits, _ = model(text[:, -args.seq_len :])
        probs = (logits[:, -1] / temperature).softmax(dim=-1)
        text = torch.cat((text, torch.multinomial(probs, 1, generator=generator)), dim=1)
    return bytes(text[0].tolist()).decode(errors="replace")


def build_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW that decays matrices, but not norms, biases and embeddings."""
    matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    ids = set(map(id, matrices))
    others = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine down to a twentieth of the peak."""
    warmup = max(args.steps // 10, 1)
    progress = (step - warmup) / max(args.steps - warmup, 1)
    return args.lr * (min((step + 1) / warmup, 1) if progress < 0 else 0.525 + 0.475 * math.cos(math.pi * progress))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write so that, whenever the process dies, the path holds either the old content or the new."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def write_metrics(args: argparse.Namespace, history: list[dict]) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in history)
    replace_file(args.out / "metrics.jsonl", lambda path: path.write_text(lines))


def run_settings(args: argparse.Namespace, texts: list[Tensor]) -> dict:
    """What the numbers of a run depend on: the text and all options but where to write."""
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "resume", "prompt")}
    return settings | {"text": hashlib.sha256(b"".join(text.numpy().tobytes() for text in texts)).hexdigest()[:16]}


def load_checkpoint(args: argparse.Namespace, settings: dict) -> dict | None:
    path = args.out / "checkpoint.pt"
    if not path.exists():
        return None
    if not args.resume:
        raise SystemExit(f"{path} exists: continue that run with --resume, or choose another --out")
    state = torch.load(path)
    theirs = state["settings"]
    different = [f"{name} was {theirs.get(name)}, is now {value}" for name, value in settings.items() if theirs.get(name) != value]
    if different:
        raise SystemExit(f"{path} belongs to a run with other settings: {'; '.join(different)}")
    return state


def train(model: nn.Module, texts: list[Tensor], args: argparse.Namespace) -> list[dict]:
    """Train to the end, from the last checkpoint on if there is one, and return the history: a record per evaluation."""
    optimizer = build_optimizer(model, args.lr)
    settings = run_settings(args, texts)
    history = []
    if (state := load_checkpoint(args, settings)) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random_state"])
        history = state["history"]
    monitor = RoutingMonitor(model)
    last = history[-1] if history else {"step": 0, "train_seconds": 0.0, "total_seconds": 0.0}
    with tqdm(total=args.steps, initial=last["step"], unit="step", dynamic_ncols=True) as progress:
        while last["step"] < args.steps:
            monitor.reset()
            start, bits = time.perf_counter(), []
            stop = min(last["step"] + args.eval_every, args.steps)
            for step in range(last["step"], stop):
                bits.append(update(model, optimizer, training_batch(texts[0], step, args), learning_rate(step, args), args.autocast))
                speed = len(bits) * args.batch * args.seq_len / (time.perf_counter() - start)
                progress.set_postfix({"bits/byte": f"{bits[-1]:.3f}", "tokens/s": f"{speed:,.0f}"}, refresh=False)
                progress.update()
            train_seconds = time.perf_counter() - start
            last = {
                "step": stop,
                "train_bits": sum(bits) / len(bits),
                "validation_bits": evaluate(model, texts[1], args),
                "train_seconds": last["train_seconds"] + train_seconds,
                "total_seconds": last["total_seconds"] + time.perf_counter() - start,
                **monitor.shares(),
            }
            history.append(last)
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random_state": torch.get_rng_state()}
            state = {"settings": settings, "history": history, **states}
            replace_file(args.out / "checkpoint.pt", lambda path, state=state: torch.save(state, path))
            write_metrics(args, history)
            progress.write("step {step}: {train_bits:.3f} bits per byte in training, {validation_bits:.3f} in validation".format(**last))
    return history


def update(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], lr: float, autocast: bool) -> float:
    """One step of training; returns the loss of its batch in bits per byte."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss, aux_loss = cross_entropy(model, batch, autocast)
    optimizer.zero_grad()
    (loss + aux_loss).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item() / math.log(2)


def describe(model: nn.Module, args: argparse.Namespace) -> str:
    """Parameters and cost per token, as if every choice reached its expert."""
    used, wide = 0.0, 0.0
    for name, parameter in model.named_parameters():
        is_expert = ".experts." in name
        active = parameter.numel() * (TOP_N / args.experts if is_expert else 1)
        used += 0 if name == "embedding.weight" else active
        wide += active if parameter.ndim > 1 and (is_expert or ".wide." in name) else 0
    total = sum(parameter.numel() for parameter in model.parameters())
    flops = 2 * used + 2 * args.depth * args.dim * args.seq_len
    kind, layers = ("dense", "wide layers") if args.dense else ("sparse", f"{TOP_N} of {args.experts} experts")
    cost = f"{used:,.0f} used by a token; {flops / 1e6:.2f} MFLOPs forward, {2 * wide / 1e6:.2f} of them in {layers}"
    return f"{kind}: {total:,} parameters, {cost}"


def plot(history: list[dict], path: Path) -> None:
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
        unused = figure.add_subplot(grid[0, 1])
        for name, style, reason in (("dropped", "-", "dropped, expert full"), ("not_asked", "--", "not asked for, by policy")):
            for layer in range(layers):
                shares = [record[name][layer] for record in history]
                unused.plot(steps, shares, style, color=f"C{layer}", label=f"layer {layer + 1}: {reason}")
        unused.yaxis.set_major_formatter(PercentFormatter(1))
        unused.set(title="Choices that reached no expert, in training", xlabel="step", ylabel="share of all choices", ylim=(0, None))
        unused.legend(frameon=False, fontsize="small")
        plot_load([figure.add_subplot(grid[1 + layer, :]) for layer in range(layers)], history)
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    plt.close(figure)


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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    option = parser.add_argument
    option("--out", type=Path, default="runs/train_lm", help="directory for checkpoint, metrics and picture")
    option("--resume", action="store_true", help="continue the run in --out from its last checkpoint, if it has one")
    option("--text", type=Path, help="file to train on, whose last tenth is for validation, instead of Python's standard library")
    dense = f"replace experts by one feed-forward of {TOP_N} times their hidden width: a token costs the FLOPs of its {TOP_N} experts"
    option(
        "--dense", action="store_true", help=f"{dense}, to within a hidden unit; the sparse model adds a router and saves unused choices"
    )
    option("--autocast", action="store_true", help="compute in bfloat16 where that is safe")
    option("--seed", type=int, default=0, help="decides initial weights, order of the data and random routing")
    option("--steps", type=int, default=1500, help="updates, over which the learning rate rises and decays")
    option("--batch", type=int, default=8, help="sequences per step")
    option("--seq-len", type=int, default=256, help="bytes per sequence")
    option("--dim", type=int, default=128, help=f"width of the model, a multiple of {HEAD_DIM}")
    option("--depth", type=int, default=3, help="layers, each of attention and a SparseMoEBlock")
    option("--experts", type=int, default=8, help=f"experts of a layer, of which a token chooses {TOP_N}")
    option("--capacity-factor", type=float, default=2.0, help="slots of an expert in training, as a multiple of tokens / experts")
    option("--lr", type=float, default=3e-3, help="peak of the learning rate")
    option("--eval-every", type=int, default=50, help="steps between evaluations, each with a checkpoint")
    option("--prompt", default="def ", help="beginning of the generated text")
    args = parser.parse_args()
    for name, value in vars(args).items():
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "seed" and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above zero, got {value}")
    if args.dim % HEAD_DIM:
        parser.error(f"--dim must be a multiple of {HEAD_DIM}, the width of an attention head, got {args.dim}")
    if args.experts < TOP_N:
        parser.error(f"--experts must be at least {TOP_N}, the choices of a token, got {args.experts}")
    if not args.prompt:
        parser.error("--prompt must not be empty")
    return args


def main() -> None:
    args = parse_arguments()
    try:
        texts = read_corpus(args)
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise SystemExit(f"train_lm.py: {error}") from None
    torch.manual_seed(args.seed)
    block = (lambda: DenseBlock(args.dim)) if args.dense else (lambda: sparse_block(args.dim, args.experts, args.capacity_factor))
    model = LanguageModel(args.dim, args.depth, block)
    print(describe(model, args))
    try:
        history = train(model, texts, args)
    except KeyboardInterrupt:
        raise SystemExit(f"\nstopped; --resume continues from {args.out / 'checkpoint.pt'}, if there was an evaluation yet") from None
    last = history[-1]
    write_metrics(args, history)
    plot(history, args.out / "training.png")
    tokens = last["step"] * args.batch * args.seq_len
    print(f"finished {last['step']} steps: {last['train_seconds']:.0f} s of training, {tokens / last['train_seconds']:,.0f} tokens/s")
    for layer, load in enumerate(last["load"], start=1):
        print(f"layer {layer}: experts get {min(load):.1%} to {max(load):.1%} of the choices asked for")
    print(f"{last['validation_bits']:.3f} bits per byte in validation; wrote {args.out}\n\n{generate(model, args)}")


if __name__ == "__main__":
    main()
