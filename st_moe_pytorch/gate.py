"""What a router is to the rest of the library: a projection of tokens to logits, the same for all, and a decision."""

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from st_moe_pytorch.checks import check_counts, check_noise, check_positive, check_tokens, is_overridden
from st_moe_pytorch.compat import eager, has_hooks
from st_moe_pytorch.routing import Choices, DenseRouting, Routing, expert_capacity, without_autocast


class Listeners(threading.local):
    """Who wants to know what routers decide in this thread. Layers tell all of them, and nothing else changes by it."""

    of_decisions: tuple[Callable[[nn.Module, Routing], None], ...] = ()


LISTENERS = Listeners()


def tell(decider: nn.Module, routing: Routing) -> Routing:
    """The routing itself, told to all listeners: by a gate, and by the layer that goes by it."""
    for listen in LISTENERS.of_decisions:
        listen(decider, routing)
    return routing


REPLAYS: list[Callable[[nn.Module, Tensor, Tensor | None], Choices | None]] = []
"""Who may have recorded what routers are to choose.

In all threads, since backward passes run layers again in threads of their own.
"""


def replayed(decider: nn.Module, x: Tensor, mask: Tensor | None) -> Choices | None:
    """What the layer or gate is to choose for tokens x (b n d); None, but for a replay, where it decides by itself."""
    for replay in tuple(REPLAYS):
        if (choices := eager(replay, "recorded choices are replayed")(decider, x, mask)) is not None:
            return choices
    return None


class RouterLinear(nn.Linear):
    """Linear without bias: tokens (... d) of any dtype -> logits (... e) in float32, or float64 for float64 tokens."""

    def __init__(self, dim: int, num_gates: int) -> None:
        super().__init__(dim, num_gates, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(input.dtype, torch.float32)
        return F.linear(input.to(dtype), self.weight.to(dtype))


R = TypeVar("R")


class Routed(nn.Module, Generic[R]):
    """A module that is called with tokens and what concerns their routing, and returns an R."""

    if TYPE_CHECKING:  # editors, to which a module's call is of any type

        def __call__(self, x: Tensor, noise_gates: bool = ..., noise_mult: float = ..., **given: Any) -> R: ...


class Gate(Routed[DenseRouting]):
    """The router of an `MoE` layer.

    A subclass says in `decide` what happens to a batch of logits; the rest is here, for all of them.

    dim, num_gates: width of a token and number of experts.
    group_size: tokens that share a capacity, regrouped over sequences; None: a sequence is a group. For subclasses to
        heed.
    jitter: in training, what the router looks at is multiplied by uniform numbers in [1 - jitter, 1 + jitter] (ST-MoE,
        section 3.2).

    Subclasses that have a capacity set ``capacity_factor_train``, ``capacity_factor_eval`` and ``min_expert_capacity``,
    as those of `TopNGating`, and ask `capacity`.

    `MoE` calls `route`: assign or override it to replace or record decisions. `forward` gives them as dense tensors, as
    0.1.8 did; where it is overridden or hooked, those tensors decide, at a cost that is quadratic in the number of
    tokens.
    """

    capacity_factor_train: float | None = None
    capacity_factor_eval: float | None = None
    min_expert_capacity: int = 4

    def __init__(self, dim: int, num_gates: int, *, group_size: int | None = None, jitter: float = 0.0) -> None:
        super().__init__()
        check_counts(dim=dim, num_gates=num_gates, group_size=group_size)
        self.dim = dim
        self.num_gates = num_gates
        self.group_size = group_size
        self.jitter = jitter
        self.check_jitter()
        self.to_gates = RouterLinear(dim, num_gates)

    def decide(
        self,
        logits: Tensor,
        *,
        mask: Tensor | None = None,
        draws: Tensor | None = None,
        noised: Tensor | None = None,
        choices: Choices | None = None,
    ) -> Routing:
        """Where tokens with these logits (b n e), float32 or float64, go.

        No projection is needed: recorded logits will do.

        mask (b n) bool, True for real tokens.
        draws (b n k): uniform numbers in [0, 1) in place of fresh ones, for routers that draw.
        noised (b n e): the logits to route by, if noise was added; the z-loss is that of ``logits``.
        choices: what to choose, with weights by these logits. A gate that does not take this argument cannot be
            replayed.
        """
        wanted = "decide(logits, *, mask=None, draws=None, noised=None) -> Routing"
        raise NotImplementedError(f"{type(self).__name__} must define {wanted}")

    def route(
        self,
        x: Tensor,
        noise_gates: bool = False,
        noise_mult: float = 1.0,
        *,
        mask: Tensor | None = None,
        route_by: Tensor | None = None,
        draws: Tensor | None = None,
        choices: Choices | None = None,
    ) -> Routing:
        """Decide where the tokens x (b n d) go, in float32 or, for float64 tokens, in float64, whatever autocast says.

        noise_gates adds Gumbel noise, times noise_mult, to the logits that are routed by; the z-loss stays that of the
            clean ones.
        mask (b n) is True for real tokens: padding asks for nothing and counts in no loss.
        route_by (b n d) is what the router looks at instead of x, such as word embeddings.
        draws (b n k), or by group, are uniform numbers in [0, 1) for routers that draw, instead of fresh ones.
        choices, as of `Routing.choices`, are taken instead of deciding, and weighted by the logits of x.
        """
        check_noise(noise_gates, noise_mult)
        check_tokens(x, self.dim, mask, route_by)
        if x.ndim != 3:
            wanted = f"shape (batch, tokens, {self.dim}) here"
            raise ValueError(f"x must have {wanted}, got {tuple(x.shape)}: add or flatten axes")
        choices = replayed(self, x, mask) if choices is None else choices
        given: dict[str, Any] = {} if choices is None else {"choices": choices}
        features = x if route_by is None else route_by
        if mask is not None:
            features = features.masked_fill(~mask.unsqueeze(-1), 0.0)
        self.check_jitter()
        if self.jitter and self.training:
            features = features * torch.empty_like(features).uniform_(1 - self.jitter, 1 + self.jitter)
        with without_autocast(x):
            logits = self.to_gates(features).to(torch.promote_types(x.dtype, torch.float32))
            if noise_gates and noise_mult:
                # Gumbel noise is -log of an exponential draw
                given["noised"] = logits - noise_mult * torch.empty_like(logits).exponential_().log()
            return tell(self, self.decide(logits, mask=mask, draws=draws, **given))

    def forward(
        self,
        x: Tensor,
        noise_gates: bool = False,
        noise_mult: float = 1.0,
        *,
        mask: Tensor | None = None,
        route_by: Tensor | None = None,
        draws: Tensor | None = None,
    ) -> DenseRouting:
        """The routing of x (b n d) as dense tensors (b n e c). Arguments as in `route`."""
        routing = self.route(x, noise_gates, noise_mult, mask=mask, route_by=route_by, draws=draws)
        return DenseRouting(*routing.dense(), routing.balance_loss, routing.router_z_loss)

    def check_jitter(self) -> None:
        """Raise ValueError for a jitter that means nothing."""
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter must lie in [0, 1), got {self.jitter}")

    def check_capacity(self) -> None:
        """Raise ValueError for settings of capacity that mean nothing."""
        check_counts(min_expert_capacity=self.min_expert_capacity)
        check_positive(capacity_factor_train=self.capacity_factor_train, capacity_factor_eval=self.capacity_factor_eval)

    def capacity(self, tokens: int) -> int:
        """Slots of an expert for a group of that many tokens, in the gate's mode."""
        self.check_capacity()
        factor = self.capacity_factor_train if self.training else self.capacity_factor_eval
        return expert_capacity(tokens, self.num_gates, factor, self.min_expert_capacity)

    def groups(self, b: int, n: int) -> tuple[int, int]:
        """Number and size of the groups that b sequences of n tokens form.

        ``group_size`` is met as Mesh-TensorFlow does, by a divisor of the number of tokens.
        """
        check_counts(group_size=self.group_size)
        if self.group_size is None:
            return b, n
        groups = max(1, b * n // self.group_size)
        while b * n % groups:
            groups += 1
        size = b * n // groups
        if groups > 1 and 2 * size < self.group_size and not torch.compiler.is_compiling():
            warnings.warn(
                f"group_size={self.group_size} does not divide the {b * n} tokens of this batch well: groups have "
                f"{size} tokens. Choose batch and sequence lengths whose product has a divisor near group_size",
                stacklevel=4,
            )
        return groups, size


def is_dense(gate: nn.Module) -> bool:
    """Whether a gate decides by its forward's dense tensors: it is hooked, has no ``route`` or not `Gate`'s forward."""
    if not hasattr(gate, "route") or has_hooks(gate):
        return True
    return isinstance(gate, Gate) and is_overridden(gate, Gate)


def refuse_misfit(gate: nn.Module, dim: int, num_experts: int, ignored: Sequence[str]) -> None:
    """Raise ValueError if a gate is of another size than a layer, or if settings of the layer would be ignored."""
    if ignored:
        names = ", ".join(ignored).replace("top_n", "gating_top_n")
        raise ValueError(f"{names} must be set on the gate where gate= is given, since it decides all of routing")
    for name, needed in (("dim", dim), ("num_gates", num_experts)):
        if (got := getattr(gate, name, needed)) != needed:
            raise ValueError(f"gate.{name} must be {needed} in MoE(dim={dim}, num_experts={num_experts}), got {got}")
