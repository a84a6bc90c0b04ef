"""Train a byte-level language model with sparse layers and see what its routers do.

    pip install -e '.[examples]'
    python examples/train_lm.py                            # on the source of Python's library: 70 seconds on 2 cores
    python examples/train_lm.py --dense --out runs/dense   # the baseline: as much compute per token, no routing
    python examples/train_lm.py --text book.txt --out runs/book --prompt "Once "
    python examples/train_lm.py --resume                   # continue a stopped or killed run, to the same numbers
    torchrun --nproc-per-node 2 examples/train_lm.py --expert-parallel    # the same model over two processes

The output directory gets settings.json, a checkpoint, metrics.jsonl (a line per evaluation), training.png, load.png and
routing.html, which colours a text by the experts that its bytes went to.

Beside this file: language_model.py is the transformer around the sparse layers, optimizers.py what updates it,
processes.py what several processes do together, runs.py what is not about training, such as directories, checkpoints
and pictures.
"""

import math
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import runs
import torch
import torch.distributed as dist
from language_model import HEAD_DIM, DenseBlock, LanguageModel
from optimizers import muon_and_adamw
from options import Options, option, parse
from processes import mean_over_ranks, processes, say, started_processes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from tqdm import tqdm

from st_moe_pytorch import MoE, SparseMoEBlock
from st_moe_pytorch.distributed import clip_grad_norm_, data_parallel, shard_experts
from st_moe_pytorch.tools.draws import keyed_draws
from st_moe_pytorch.tools.watch import record_routing, routing_stats

TOP_N = 2  # experts that a token chooses
EVAL_BATCHES = 32  # batches of validation text in an evaluation
WIDE = {"batch": 4, "dim": 128, "experts": 8, "lr": 3e-3}  # defaults of the scripts that begin with this one


@dataclass(frozen=True)
class Settings(Options):
    """The options of the command line: --seq-len sets seq_len."""

    out: Path = option(Path("runs/train_lm"), "directory for checkpoint, metrics, pictures and page")  # noqa: RUF009
    resume: bool = option(False, "continue the run in --out from its last checkpoint, if it has one")
    device: str = option("cpu", "where to compute; with cuda, every process has a GPU", choices=("cpu", "cuda"))
    expert_parallel: bool = option(False, "spread experts and batches over the processes that torchrun starts")
    text: Path | None = option(None, "file to train on, its last tenth to validate, instead of Python's library")  # noqa: RUF009
    dense: bool = option(False, f"one feed-forward, {TOP_N} times as wide, in place of the {TOP_N} experts of a token")
    autocast: bool = option(False, "compute in bfloat16 where that is safe")
    seed: int = option(0, "decides initial weights, order of the data and random routing", positive=False)
    steps: int = option(500, "updates, over which the learning rate rises and decays")
    batch: int = option(8, "sequences per step")
    seq_len: int = option(256, "bytes per sequence")
    dim: int = option(64, f"width of the model, a multiple of {HEAD_DIM}")
    depth: int = option(2, "layers, each of attention and a SparseMoEBlock")
    local: int = option(3, "earlier bytes that a layer adds to each byte, before attention")
    experts: int = option(16, f"experts of a layer, of which a token chooses {TOP_N}")
    capacity_factor: float = option(2.0, "slots of an expert in training, as a multiple of tokens / experts")
    lr: float = option(1e-2, "peak of the learning rate")
    eval_every: int = option(100, "steps between evaluations, each with a checkpoint")
    prompt: str = option("def ", "beginning of the generated text")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim % HEAD_DIM:
            raise ValueError(f"--dim must be a multiple of {HEAD_DIM}, the width of an attention head, got {self.dim}")
        if self.experts < TOP_N:
            raise ValueError(f"--experts must be at least {TOP_N}, the choices of a token, got {self.experts}")
        if not self.prompt:
            raise ValueError("--prompt must not be empty")
        if self.expert_parallel and (self.dense or not started_processes()):
            how = "torchrun --nproc-per-node 2 train_lm.py --expert-parallel"
            raise ValueError(f"--expert-parallel needs a sparse model, and torchrun to start it: {how}")
        if self.expert_parallel and self.batch % started_processes():
            raise ValueError(f"--batch must be a multiple of the {started_processes()} processes, got {self.batch}")


def build_model(settings: Settings) -> LanguageModel:
    torch.manual_seed(settings.seed)
    # Where capacity binds, a later token can take the place of a token's second choice.
    # Evaluation drops nothing, so that it sees no future.
    capacity = {"capacity_factor_train": settings.capacity_factor, "capacity_factor_eval": None}

    def block() -> nn.Module:
        if settings.dense:
            return DenseBlock(settings.dim, TOP_N)
        return SparseMoEBlock(MoE(settings.dim, settings.experts, gating_top_n=TOP_N, **capacity))

    return LanguageModel(settings.dim, settings.depth, block, settings.local).reset_by_fan_in()


def windows(text: Tensor, starts: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Inputs and targets, the next bytes, (b n) each, of the windows that start at (b)."""
    window = text[starts.unsqueeze(-1) + torch.arange(settings.seq_len + 1)].long().to(settings.device)
    return window[:, :-1], window[:, 1:]


def training_batch(text: Tensor, step: int, settings: Settings) -> tuple[Tensor, Tensor]:
    """This rank's part of a step's batch. It depends on step and seed alone, so that a resumed run sees the same."""
    torch.manual_seed(settings.seed * 1_000_003 + step)
    starts = torch.randint(len(text) - settings.seq_len, (settings.batch,))
    return windows(text, starts.chunk(dist.get_world_size())[dist.get_rank()], settings)


def routing_draws(step: int, settings: Settings) -> Tensor:
    """For each layer, the uniform numbers (b n k) that decide the random routing of this rank's part of a step's batch.

    They belong to tokens by their place in the whole batch, so that training goes the same way on any number of ranks.
    """
    tokens = torch.arange(settings.batch * settings.seq_len, device=settings.device).view(settings.batch, -1)
    layers = torch.arange(settings.depth).view(-1, 1, 1)
    return keyed_draws(settings.seed, step, layers, tokens.chunk(dist.get_world_size())[dist.get_rank()], TOP_N)


def compute_loss(model: nn.Module, batch: tuple[Tensor, ...], settings: Settings) -> tuple[Tensor, Tensor]:
    """Mean loss in nats per byte and auxiliary loss of a batch: inputs, targets and, if not drawn anew, draws."""
    inputs, targets, *draws = batch
    with torch.autocast(settings.device, torch.bfloat16, enabled=settings.autocast):
        logits, aux_loss = model(inputs, *draws)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()), aux_loss


@torch.no_grad()
def evaluate(model: nn.Module, text: Tensor, settings: Settings) -> float:
    """Bits per byte on the same windows every time, spread evenly over the text."""
    model.eval()
    count, last = EVAL_BATCHES * settings.batch, len(text) - settings.seq_len - 1
    starts = torch.linspace(0, last, count, dtype=torch.float64).long()
    mine = starts.view(EVAL_BATCHES, dist.get_world_size(), -1)[:, dist.get_rank()]
    losses = [compute_loss(model, windows(text, part, settings), settings)[0] for part in mine]
    model.train()
    return mean_over_ranks(torch.stack(losses).double().mean()).item() / math.log(2)


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine down to a twentieth of the peak."""
    warmup = max(settings.steps // 10, 1)
    progress = (step - warmup) / max(settings.steps - warmup, 1)
    return settings.lr * (min((step + 1) / warmup, 1) if progress < 0 else 0.525 + 0.475 * math.cos(math.pi * progress))


def update(
    model: nn.Module,
    optimizers: list[Optimizer],
    batch: tuple[Tensor, ...],
    lr: float,
    settings: Settings,
) -> float:
    """One step of training; returns the loss of its batch in bits per byte."""
    for group in chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
        group["lr"] = lr
    loss, aux_loss = compute_loss(model, batch, settings)
    model.zero_grad()
    (loss + aux_loss).backward()
    clip_grad_norm_(model, 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return loss.item() / math.log(2)


def train(model: LanguageModel, texts: list[Tensor], settings: Settings) -> list[dict]:
    """Train to the end, from the last checkpoint on, and return the history: a record per evaluation."""
    parallel = data_parallel(shard_experts(model)) if settings.expert_parallel else model
    optimizers = muon_and_adamw(model, settings.lr)
    history = runs.load(settings.out, model, optimizers)
    last = history[-1] if history else {"step": 0, "train_seconds": 0.0}
    if history:
        say(f"resuming from step {last['step']}")
    start, bits, routed = time.perf_counter(), [], []
    bar = {"total": settings.steps, "unit": "step", "dynamic_ncols": True, "disable": dist.get_rank() > 0}
    with tqdm(initial=last["step"], **bar) as progress:
        for step in range(last["step"], settings.steps):
            batch = *training_batch(texts[0], step, settings), routing_draws(step, settings)
            with nullcontext({}) if settings.dense else record_routing(model) as routings:
                bits.append(update(parallel, optimizers, batch, learning_rate(step, settings), settings))
            routed.append(routing_stats(routings))
            speed = len(bits) * settings.batch * settings.seq_len / (time.perf_counter() - start)
            progress.set_postfix({"bits/byte": f"{bits[-1]:.3f}", "tokens/s": f"{speed:,.0f}"}, refresh=False)
            progress.update()
            if (step + 1) % settings.eval_every and step + 1 < settings.steps:
                continue
            last = {
                "step": step + 1,
                "train_seconds": last["train_seconds"] + time.perf_counter() - start,
                "train_bits": mean_over_ranks(torch.tensor(bits, dtype=torch.float64)).mean().item(),
                "validation_bits": evaluate(model, texts[1], settings),
                **runs.routing_metrics(routed),
            }
            history.append(last)
            runs.save(settings.out, history, model, optimizers)
            told = "step {step}: {train_bits:.3f} bits per byte in training, {validation_bits:.3f} in validation"
            say(told.format(**last))
            start, bits, routed = time.perf_counter(), [], []
    return history


def main() -> None:
    settings = parse(Settings, __doc__)
    with processes(settings.device, settings.expert_parallel):
        texts = runs.read_corpus(settings.text, settings.seq_len)
        with runs.directory(settings.out, settings, texts, resume=settings.resume):
            model = build_model(settings).to(settings.device)
            say(model.describe(settings.seq_len))
            history = train(model, texts, settings)
            sample = model.generate(os.fsencode(settings.prompt), settings.seed, settings.seq_len)
            runs.report(settings.out, history, model, texts[1][: settings.seq_len], settings.batch * settings.seq_len)
            say(f"\n{runs.printable(sample)}")


if __name__ == "__main__":
    main()
