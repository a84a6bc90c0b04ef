"""Train a byte-level language model with sparse layers and see what its routers do. Needs `pip install 'st-moe-pytorch[examples]'`.

    python examples/train_lm.py                              # on the source of Python's standard library, minutes on 2 CPU cores
    python examples/train_lm.py --dense --out runs/dense     # the baseline: as much compute per token, no routing
    python examples/train_lm.py --text book.txt --out runs/book --prompt "Once "
    python examples/train_lm.py --resume                     # continue a run that was stopped or killed, with the very same numbers
    torchrun --nproc-per-node 2 examples/train_lm.py --expert-parallel      # the same model over two processes

The output directory gets settings.json, a checkpoint, metrics.jsonl (a line per evaluation), training.png, and routing.html,
which colours a generated text by the experts that its bytes went to.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import sysconfig
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from einops import rearrange
from plot_runs import plot_training, read_history
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn import functional as F
from tqdm import tqdm

from st_moe_pytorch import Expert, MoE, RMSNorm, Routing, SparseMoEBlock, TopNGating
from st_moe_pytorch.distributed import clip_grad_norm_, data_parallel, shard_experts
from st_moe_pytorch.tools.pictures import text_page
from st_moe_pytorch.tools.watch import RoutingStats, record_routing, routing_stats

HEAD_DIM = 32
TOP_N = 2
EVAL_BATCHES = 32
NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def start_processes(expert_parallel: bool) -> None:
    """Join the processes that torchrun started; a process of its own is a group of one."""
    alone = {} if expert_parallel else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", timeout=timedelta(minutes=5), **alone)


def mean_over_ranks(t: Tensor) -> Tensor:
    dist.all_reduce(t)
    return t / dist.get_world_size()


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


def draw_alike_on_any_number_of_ranks(gate: TopNGating) -> None:
    """Draw the numbers of random routing for the batches of all ranks, so that training goes the same way on any number of them."""
    route, ranks = gate.route, dist.get_world_size()

    def routed(x: Tensor, *args, **kwargs) -> Routing:
        draws = torch.rand(ranks * len(x), x.shape[1], gate.top_n).chunk(ranks)[dist.get_rank()] if gate.training else None
        return route(x, *args, draws=draws, **kwargs)

    gate.route = routed


def shares_of_choices(stats: list[RoutingStats]) -> dict[str, list]:
    """Per layer: each expert's share of the choices asked for; the shares of all choices that were dropped, or not asked for."""
    stats = [layer.over_ranks() for layer in stats]
    scalars = [layer.scalars() for layer in stats]
    shares = {name: [figures[name] for figures in scalars] for name in ("dropped", "not_asked")}
    return {"load": [layer.load().tolist() for layer in stats], **shares}


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
    """This rank's part of a step's batch. All draws of a step depend on step and seed alone: a resumed run sees what it would have seen."""
    torch.manual_seed(args.seed * 1_000_003 + step)
    starts = torch.randint(len(text) - args.seq_len, (args.batch,))
    return windows(text, starts.chunk(dist.get_world_size())[dist.get_rank()], args.seq_len)


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
    starts = torch.linspace(0, len(text) - args.seq_len - 1, EVAL_BATCHES * args.batch, dtype=torch.float64).long()
    mine = starts.view(EVAL_BATCHES, dist.get_world_size(), -1)[:, dist.get_rank()]
    losses = [cross_entropy(model, windows(text, part, args.seq_len), args.autocast)[0] for part in mine]
    model.train()
    return mean_over_ranks(torch.stack(losses).double().mean()).item() / math.log(2)


@torch.no_grad()
def generate(model: nn.Module, args: argparse.Namespace, length: int = 400, temperature: float = 0.7) -> Tensor:
    """Bytes (1 n) that begin with the prompt."""
    model.eval()
    generator = torch.Generator().manual_seed(args.seed)
    text = torch.tensor([list(args.prompt.encode())])
    for _ in range(length):
        logits, _ = model(text[:, -args.seq_len :])
        probs = (logits[:, -1] / temperature).softmax(dim=-1)
        text = torch.cat((text, torch.multinomial(probs, 1, generator=generator)), dim=1)
    return text


@torch.no_grad()
def write_page(model: nn.Module, text: Tensor, path: Path) -> None:
    """A page that colours a text by the experts that its bytes went to. All ranks run the model, one writes."""
    with record_routing(model) as routings:
        model(text)
    if dist.get_rank() == 0 and routings:
        path.write_text(text_page([bytes([byte]).decode("latin-1") for byte in text[0].tolist()], routings), encoding="utf-8")


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


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """States of model and optimizer under global names: those of the experts on this rank, and all that ranks share."""
    model_state, optimizer_state = get_state_dict(model, optimizer, options=FLAT)
    return {"model": model_state, "optimizer": optimizer_state}


def checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints, oldest first; there is more than one only after a kill."""
    return sorted(out.glob("checkpoint-*[0-9]"), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def save_checkpoint(out: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Every rank writes its part. The directory gets its name when it is complete, and then takes the place of the one before."""
    temporary = out / f"checkpoint-{step}.tmp"
    dcp.save(training_state(model, optimizer), checkpoint_id=temporary)
    if dist.get_rank() == 0:
        older = checkpoints(out)
        os.replace(temporary, out / f"checkpoint-{step}")
        for path in older:
            shutil.rmtree(path)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load what any number of ranks saved."""
    state = training_state(model, optimizer)
    dcp.load(state, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=FLAT)


def prepare_output(args: argparse.Namespace, texts: list[Tensor]) -> None:
    """Make the directory of a new run and note what its numbers depend on: the text and all options but a few. Or find them unchanged."""
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "resume", "prompt", "expert_parallel")}
    settings["text"] = hashlib.sha256(b"".join(text.numpy().tobytes() for text in texts)).hexdigest()[:16]
    path = args.out / "settings.json"
    if not path.exists():
        args.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
        return
    if not args.resume:
        raise ValueError(f"{args.out} holds a run: continue it with --resume, or choose another --out")
    theirs = json.loads(path.read_text())
    different = [f"{name} was {theirs.get(name)}, is now {value}" for name, value in settings.items() if theirs.get(name) != value]
    if different:
        raise ValueError(f"{args.out} holds a run with other settings: {'; '.join(different)}")
    for half_saved in args.out.glob("checkpoint-*.tmp"):
        shutil.rmtree(half_saved)


def write_history(args: argparse.Namespace, history: list[dict]) -> None:
    if dist.get_rank() == 0:
        (args.out / "metrics.tmp").write_text("".join(json.dumps(record) + "\n" for record in history))
        os.replace(args.out / "metrics.tmp", args.out / "metrics.jsonl")


def train(model: nn.Module, texts: list[Tensor], args: argparse.Namespace) -> list[dict]:
    """Train to the end, from the last checkpoint on if there is one, and return the history: a record per evaluation."""
    optimizer = build_optimizer(model, args.lr)
    history: list[dict] = []
    for path in checkpoints(args.out)[-1:]:
        load_checkpoint(path, model, optimizer)
        history = [record for record in read_history(args.out) if record["step"] <= step_of(path)]
    for gate in [module for module in model.modules() if isinstance(module, TopNGating)]:
        draw_alike_on_any_number_of_ranks(gate)
    last = history[-1] if history else {"step": 0, "train_seconds": 0.0}
    with tqdm(total=args.steps, initial=last["step"], unit="step", dynamic_ncols=True, disable=dist.get_rank() > 0) as progress:
        while last["step"] < args.steps:
            start, bits, counted = time.perf_counter(), [], []
            stop = min(last["step"] + args.eval_every, args.steps)
            for step in range(last["step"], stop):
                with record_routing(model) as routings:
                    bits.append(update(model, optimizer, training_batch(texts[0], step, args), learning_rate(step, args), args.autocast))
                counted.append(routing_stats(routings).values())
                speed = len(bits) * args.batch * args.seq_len / (time.perf_counter() - start)
                progress.set_postfix({"bits/byte": f"{bits[-1]:.3f}", "tokens/s": f"{speed:,.0f}"}, refresh=False)
                progress.update()
            last = {
                "step": stop,
                "train_seconds": last["train_seconds"] + time.perf_counter() - start,
                "train_bits": mean_over_ranks(torch.tensor(bits, dtype=torch.float64)).mean().item(),
                "validation_bits": evaluate(model, texts[1], args),
                **shares_of_choices([sum(layer[1:], layer[0]) for layer in zip(*counted, strict=True)]),
            }
            history.append(last)
            write_history(args, history)
            save_checkpoint(args.out, stop, model, optimizer)
            progress.write("step {step}: {train_bits:.3f} bits per byte in training, {validation_bits:.3f} in validation".format(**last))
    return history


def update(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], lr: float, autocast: bool) -> float:
    """One step of training; returns the loss of its batch in bits per byte."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss, aux_loss = cross_entropy(model, batch, autocast)
    optimizer.zero_grad()
    (loss + aux_loss).backward()
    clip_grad_norm_(model, 1.0)
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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    option = parser.add_argument
    option("--out", type=Path, default="runs/train_lm", help="directory for checkpoint, metrics and picture")
    option("--resume", action="store_true", help="continue the run in --out from its last checkpoint, if it has one")
    option("--expert-parallel", action="store_true", help="spread experts and batches over the processes that torchrun starts")
    option("--text", type=Path, help="file to train on, whose last tenth is for validation, instead of Python's standard library")
    option("--dense", action="store_true", help=f"one feed-forward, {TOP_N} times as wide, in place of the {TOP_N} experts of a token")
    option("--autocast", action="store_true", help="compute in bfloat16 where that is safe")
    option("--seed", type=int, default=0, help="decides initial weights, order of the data and random routing")
    option("--steps", type=int, default=1000, help="updates, over which the learning rate rises and decays")
    option("--batch", type=int, default=4, help="sequences per step")
    option("--seq-len", type=int, default=256, help="bytes per sequence")
    option("--dim", type=int, default=128, help=f"width of the model, a multiple of {HEAD_DIM}")
    option("--depth", type=int, default=2, help="layers, each of attention and a SparseMoEBlock")
    option("--experts", type=int, default=8, help=f"experts of a layer, of which a token chooses {TOP_N}")
    option("--capacity-factor", type=float, default=2.0, help="slots of an expert in training, as a multiple of tokens / experts")
    option("--lr", type=float, default=3e-3, help="peak of the learning rate")
    option("--eval-every", type=int, default=100, help="steps between evaluations, each with a checkpoint")
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
    if args.expert_parallel and (args.dense or "WORLD_SIZE" not in os.environ):
        parser.error("--expert-parallel needs a sparse model, and torchrun to start it: torchrun --nproc-per-node 2 train_lm.py ...")
    if args.expert_parallel and args.batch % int(os.environ["WORLD_SIZE"]):
        parser.error(f"--batch must be a multiple of the {os.environ['WORLD_SIZE']} processes, got {args.batch}")
    return args


def report(model: nn.Module, history: list[dict], args: argparse.Namespace) -> None:
    """The end of a run: pictures, figures and a sample, which all ranks generate together and one prints."""
    sample, last = generate(model, args), history[-1]
    write_page(model, sample[:, -args.seq_len :], args.out / "routing.html")
    if dist.get_rank() > 0:
        return
    plot_training(history, args.out / "training.png")
    tokens = last["step"] * args.batch * args.seq_len
    print(f"finished {last['step']} steps: {last['train_seconds']:.0f} s of training, {tokens / last['train_seconds']:,.0f} tokens/s")
    for layer, load in enumerate(last["load"], start=1):
        print(f"layer {layer}: experts get {min(load):.1%} to {max(load):.1%} of the choices asked for")
    print(f"{last['validation_bits']:.3f} bits per byte in validation; wrote {args.out}\n")
    print(bytes(sample[0].tolist()).decode(errors="replace"))


def run(args: argparse.Namespace) -> None:
    try:
        texts = read_corpus(args)
        if dist.get_rank() == 0:
            prepare_output(args, texts)
    except (OSError, ValueError) as error:
        raise SystemExit(f"train_lm.py: {error}") from None
    torch.manual_seed(args.seed)
    block = (lambda: DenseBlock(args.dim)) if args.dense else (lambda: sparse_block(args.dim, args.experts, args.capacity_factor))
    model = LanguageModel(args.dim, args.depth, block)
    if dist.get_rank() == 0:
        print(describe(model, args))
    if args.expert_parallel:
        model = data_parallel(shard_experts(model))
    try:
        report(model, train(model, texts, args), args)
    except KeyboardInterrupt:
        raise SystemExit(f"\nstopped; --resume continues from the checkpoint in {args.out}, if there was an evaluation yet") from None


def main() -> None:
    args = parse_arguments()
    start_processes(args.expert_parallel)
    try:
        run(args)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
