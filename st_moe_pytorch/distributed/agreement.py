"""What ranks have to agree on, and the one error that all of them raise where they do not. Axes: e experts, r ranks."""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from st_moe_pytorch.distributed.collectives import Channel, integers

MESSAGE = 256  # integers that a rank tells all others before tokens are exchanged
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NO_NUMBER, FAILED = -1, -2  # in place of the number of a dtype


class Results(NamedTuple):
    """What experts return, where that is known before they run."""

    dtype: torch.dtype
    width: int


def gather_counts(
    counts: Tensor,
    needs_grad: bool,
    agreement: Mapping[str, str],
    copies: Mapping[str, Sequence[int]],
    channel: Channel,
    promised: Results | None = None,
) -> tuple[list[list[int]], bool, torch.dtype | None]:
    """Every rank's counts (e) int64, whether any needs gradients, and the dtype of results if all ranks promise any.

    It is one small collective, two for very many experts. The host looks at counts here only, this rank's own included:
    a device has to be waited for once.
    It carries a checksum of the agreement, what has to be equal on all ranks, and one of copies, the trainable
    parameters that other ranks hold too, with those ranks. Where ranks differ in either, the same RuntimeError is
    raised on all of them.
    """
    results = (NO_NUMBER, 0) if promised is None else (DTYPES.index(promised.dtype), promised.width)
    told = crc32(repr(agreement).encode()), int(needs_grad), _claims(copies, channel.rank), *results
    message = torch.cat((integers(told, counts.device), counts))
    start, end = len(told), len(message)
    # of one size for any number of experts, so that ranks with different numbers can still talk: gloo aborts where
    # sizes differ
    gathered = _gather_integers(F.pad(message[:MESSAGE], (0, max(MESSAGE - end, 0))), channel)
    checksums, needed, claims, codes, widths = zip(*(line[:start] for line in gathered), strict=True)
    if len(set(checksums)) > 1:
        require_agreement(agreement, channel)
    if sum(claims):
        raise RuntimeError(unequal_copies(copies, channel))
    if end > MESSAGE:
        rest = _gather_integers(message[MESSAGE:], channel)
        gathered = [line + more for line, more in zip(gathered, rest, strict=True)]
    is_promised = NO_NUMBER not in codes and len(set(widths)) == 1
    dtype = widest({DTYPES[code] for code in codes}) if is_promised else None
    return [line[start:end] for line in gathered], any(needed), dtype


def agree_with_replicas(
    copies: Sequence[str], needs_grad: bool, replicas: Channel, device: torch.device
) -> tuple[bool, str | None]:
    """Whether any replica needs gradients, and what is wrong if they differ in what is trainable, in one collective."""
    holders = dict.fromkeys(copies, range(replicas.size))
    told = integers([_claims(holders, replicas.rank), int(needs_grad)], device)
    claims, needed = zip(*_gather_integers(told, replicas), strict=True)
    return any(needed), unequal_copies(holders, replicas) if sum(claims) else None


def _claims(copies: Mapping[str, Sequence[int]], rank: int) -> int:
    """A number that sums to zero over ranks if all holders of every copy have it: one weighs as much as all others."""
    return sum(crc32(name.encode()) * (len(ranks) - 1 if rank == ranks[0] else -1) for name, ranks in copies.items())


def _gather_integers(values: Tensor, channel: Channel) -> list[list[int]]:
    """Every rank's integers (n), by rank."""
    gathered = values.new_empty(channel.size, len(values))
    channel.call(dist.all_gather_single, gathered.view(-1), values)
    return gathered.tolist()


def gather_objects(mine: Any, channel: Channel) -> list[Any]:
    """What each rank has, by rank; anything that pickle can send."""
    everyone: list[Any] = [None] * channel.size
    channel.call(dist.all_gather_object, everyone, mine)
    return everyone


def require_agreement(agreement: Mapping[str, str], channel: Channel) -> None:
    """Raise the same RuntimeError on all ranks, with values and ranks, unless all entries are equal on all ranks."""
    everyone = gather_objects(agreement, channel)
    differences = []
    for key in dict.fromkeys(key for theirs in everyone for key in theirs):
        ranks: dict[str, list[str]] = {}
        for rank, theirs in enumerate(everyone):
            ranks.setdefault(theirs.get(key, "absent"), []).append(str(rank))
        if len(ranks) > 1:
            differences.append(
                f"{key}: " + ", ".join(f"{value} on rank {' '.join(where)}" for value, where in ranks.items())
            )
    if differences:
        layers = " / ".join(dict.fromkeys(theirs["layer"] for theirs in everyone))
        raise RuntimeError(f"{layers}: the ranks differ, where they must agree, in " + "; ".join(differences[:3]))


def unequal_copies(copies: Mapping[str, Sequence[int]], channel: Channel) -> str | None:
    """Which parameter is trainable on only some of the ranks that hold it, in the same words on all ranks."""
    everyone = gather_objects(dict(copies), channel)
    for name, ranks in {name: ranks for theirs in everyone for name, ranks in theirs.items()}.items():
        if frozen := [rank for rank in ranks if name not in everyone[rank]]:
            return (
                f"{channel.layer}: its parameter {name} is held by ranks {', '.join(map(str, ranks))}, and frozen "
                f"or missing on rank {', '.join(map(str, frozen))}: set its requires_grad alike on all of them"
            )
    return None


def agree_on_results(results: Sequence[Tensor], channel: Channel) -> torch.dtype:
    """The widest dtype of what all ranks' experts returned, whose width is one, in one collective of two numbers.

    Raises RuntimeError where experts of another rank failed; and the same one on all ranks where widths differ or a
    dtype is none of a real number.
    """
    dtypes, width = {result.dtype for result in results}, results[0].shape[-1]
    code = DTYPES.index(widest(dtypes)) if dtypes <= set(DTYPES) else NO_NUMBER
    gathered = _gather_integers(integers([code, width], results[0].device), channel)
    codes, widths = (set(column) for column in zip(*gathered, strict=True))
    if FAILED in codes:
        failed = "; ".join(
            f"rank {rank}: {reason}" for rank, reason in enumerate(gather_objects(None, channel)) if reason
        )
        raise RuntimeError(f"{channel.layer}: experts failed on {failed}")
    if len(widths) > 1 or NO_NUMBER in codes:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        entries = {"width of the experts' results": str(width), "dtype of the experts' results": names}
        require_agreement({"layer": channel.layer, **entries}, channel)
        raise RuntimeError(f"{channel.layer}: the experts' results must be of one of the dtypes {DTYPES}, got {names}")
    return widest({DTYPES[code] for code in codes})


def tell_of_failure(error: Exception, channel: Channel, device: torch.device) -> None:
    """In place of `agree_on_results`, on a rank whose experts raised an error."""
    _gather_integers(integers([FAILED, 0], device), channel)
    gather_objects(f"{type(error).__name__}: {error}", channel)


def widest(dtypes: set[torch.dtype]) -> torch.dtype:
    """The dtype that all of these, at least one, can be cast to without loss."""
    return reduce(torch.promote_types, dtypes)
