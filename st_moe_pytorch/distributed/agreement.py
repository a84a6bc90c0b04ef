"""What ranks have to agree on, and the one error that all of them raise where they do not. Axes: e experts, r ranks."""

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from st_moe_pytorch.distributed.collectives import Channel

MESSAGE = 256  # integers that a rank tells all others before tokens are exchanged
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def gather_counts(
    counts: Sequence[int], needs_grad: bool, agreement: dict[str, str], channel: Channel, device: Any
) -> tuple[list[list[int]], bool]:
    """Every rank's counts (r e), and whether any rank needs gradients, in one small collective, two for very many experts.

    It carries a checksum of the agreement, what has to be equal on all ranks. Where it is not, `require_agreement` raises on all of them.
    """
    message = [crc32(repr(agreement).encode()), int(needs_grad), *counts]
    # of one size for any number of experts, so that ranks with different numbers can still talk: gloo aborts where sizes differ
    gathered = _gather_integers(message[:MESSAGE] + [0] * (MESSAGE - len(message)), channel, device)
    if len({checksum for checksum, *_ in gathered}) > 1:
        require_agreement(agreement, channel)
    needs_grad = any(needed for _, needed, *_ in gathered)
    if len(message) > MESSAGE:
        gathered = [first + rest for first, rest in zip(gathered, _gather_integers(message[MESSAGE:], channel, device), strict=True)]
    return [line[2 : len(message)] for line in gathered], needs_grad


def _gather_integers(values: list[int], channel: Channel, device: Any) -> list[list[int]]:
    gathered = torch.empty(channel.size, len(values), dtype=torch.int64, device=device)
    channel.call(dist.all_gather_single, gathered.view(-1), torch.tensor(values, device=device))
    return gathered.tolist()


def require_agreement(agreement: dict[str, str], channel: Channel) -> None:
    """Raise the same RuntimeError on all ranks, with values and ranks, unless all entries are equal on all ranks."""
    everyone: list[Any] = [None] * channel.size
    channel.call(dist.all_gather_object, everyone, agreement)
    differences = []
    for key in dict.fromkeys(key for theirs in everyone for key in theirs):
        ranks: dict[str, list[str]] = {}
        for rank, theirs in enumerate(everyone):
            ranks.setdefault(theirs.get(key, "absent"), []).append(str(rank))
        if len(ranks) > 1:
            differences.append(f"{key}: " + ", ".join(f"{value} on rank {' '.join(where)}" for value, where in ranks.items()))
    if differences:
        layers = " / ".join(dict.fromkeys(theirs["layer"] for theirs in everyone))
        raise RuntimeError(f"{layers}: the ranks differ, where they must agree, in " + "; ".join(differences[:3]))


def agree_on_results(results: Sequence[Tensor], channel: Channel) -> torch.dtype:
    """The widest dtype of what all ranks' experts returned, whose width is one, in one collective of two numbers.

    Raises the same RuntimeError on all ranks where widths differ or a dtype is none of a real number.
    """
    dtypes = {result.dtype for result in results}
    width = results[0].shape[-1]
    code = DTYPES.index(_widest(dtypes)) if dtypes <= set(DTYPES) else -1
    gathered = _gather_integers([code, width], channel, results[0].device)
    codes, widths = (set(column) for column in zip(*gathered, strict=True))
    if len(widths) > 1 or -1 in codes:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        entries = {"width of the experts' results": str(width), "dtype of the experts' results": names}
        require_agreement({"layer": channel.layer, **entries}, channel)
        raise RuntimeError(f"{channel.layer}: the experts' results must be of one of the dtypes {DTYPES}, got {names}")
    return _widest({DTYPES[code] for code in codes})


def _widest(dtypes: set[torch.dtype]) -> torch.dtype:
    widest, *others = dtypes
    for dtype in others:
        widest = torch.promote_types(widest, dtype)
    return widest
