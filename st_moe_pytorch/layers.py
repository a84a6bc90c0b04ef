"""The layers that experts are made of. Axes: d width."""

# pyright: reportIncompatibleMethodOverride=false

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from types import FunctionType, NoneType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from st_moe_pytorch.checks import check_counts, check_one_of, check_positive, refuse_old_pickle, typechecked
from st_moe_pytorch.compat import contents, fused, has_hooks, is_fused, is_lifted, may_be_derived, with_known_signature
from st_moe_pytorch.grouped.cpu import cpu_linear, is_worthwhile, with_spare_rows

Activation = Literal["gelu", "gelu_tanh", "silu"]


def _silu_gradient(grad: Tensor, gate: Tensor) -> Tensor:
    """As aten::silu_backward, which has no derivative."""
    sigmoid = gate.sigmoid()
    return grad * sigmoid * (1 + gate * (1 - sigmoid))


_GELU, _SILU = torch.ops.aten.gelu_backward, torch.ops.aten.silu_backward
# function; its gradient (grad, input), which has derivatives; the same in place, without
ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], ...]] = {
    "gelu": (F.gelu, _GELU, _GELU.grad_input),
    "gelu_tanh": tuple(partial(f, approximate="tanh") for f in (F.gelu, _GELU, _GELU.grad_input)),
    "silu": (F.silu, _silu_gradient, _SILU.grad_input),
}
SMALL = 2**18  # numbers, of which keeping more for the backward costs less time than a function in Python takes


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang & Sennrich 2019): ``x / |x| * sqrt(d) * gamma`` on (..., d).

    The norm is taken in float32 for half types, in which the square of a small number would vanish.
    """

    @typechecked
    def __init__(self, dim: int) -> None:
        super().__init__()
        check_counts(dim=dim)
        self.dim = dim
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalized(x) * self.gamma

    def normalized(self, x: Tensor) -> Tensor:
        """x (..., d) before gamma: of length sqrt(d)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        eps = 1e-3 if x.dtype == torch.float16 else 1e-12  # whose inverse, the gradient at zero, exists in float16
        return F.normalize(wide, dim=-1, eps=eps).to(x.dtype) * self.scale

    def extra_repr(self) -> str:
        return f"{self.dim}"


class GEGLU(nn.Module):
    """Gated GELU (Shazeer 2020) with a multiplicative bias, (..., 2d) -> (..., d).

    ``gelu(gate) * x * mult_bias``, where x and gate are the halves of the input. activation: "gelu", its approximation
    "gelu_tanh", or "silu", with which the layer is a SwiGLU.

    Of inputs that are not small, its backward keeps nothing else and computes the rest again, at no measurable time.
    """

    @typechecked
    def __init__(self, dim: int, mult_bias: bool = True, *, activation: Activation = "gelu") -> None:
        super().__init__()
        check_counts(dim=dim)
        check_one_of(get_args(Activation), activation=activation)
        self.dim = dim
        self.activation = activation
        self.mult_bias = nn.Parameter(torch.ones(dim)) if mult_bias else 1.0

    def reset_parameters(self) -> None:
        if isinstance(self.mult_bias, Tensor):
            nn.init.ones_(self.mult_bias)

    def forward(self, x: Tensor) -> Tensor:
        return gated_unit(x, self.mult_bias, self.activation)

    def __setstate__(self, state: dict[str, Any]) -> None:
        refuse_old_pickle(self, state, "dim")
        super().__setstate__(state)

    def extra_repr(self) -> str:
        return f"{self.dim}, mult_bias={isinstance(self.mult_bias, Tensor)}, activation={self.activation!r}"


class Expert(nn.Module):
    """GEGLU feed-forward (..., dim) -> (..., dim) with ``int(dim * hidden_mult * 2 / 3)`` hidden units.

    Two thirds, because a gated layer has three matrices where a plain one has two. ``prenorm`` puts an RMSNorm first;
    ``dropout`` acts on the hidden units (expert dropout, Fedus et al. 2021, section 2.4); ``bias`` is that of the
    matrices; ``activation`` is as in `GEGLU`.
    """

    @typechecked
    def __init__(
        self,
        dim: int,
        hidden_mult: float = 4,
        mult_bias: bool = True,
        prenorm: bool = False,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__()
        check_counts(dim=dim)
        check_positive(hidden_mult=hidden_mult, hidden_units=int(dim * hidden_mult * 2 / 3))
        hidden = int(dim * hidden_mult * 2 / 3)
        layers = [RMSNorm(dim)] if prenorm else []
        gated = GEGLU(hidden, mult_bias, activation=activation)
        layers += [nn.Linear(dim, hidden * 2, bias), gated, nn.Linear(hidden, dim, bias)]
        self.net = nn.Sequential()
        for number, layer in enumerate(layers):
            # named, not numbered, so that checkpoints do not depend on whether there is dropout
            if dropout and layer is layers[-1]:
                self.net.add_module("dropout", nn.Dropout(dropout))
            self.net.add_module(str(number), layer)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights and biases uniform in ``+-out_features ** -0.5``, gamma and mult_bias ones."""
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                bound = layer.out_features**-0.5
                nn.init.uniform_(layer.weight, -bound, bound)
                if layer.bias is not None:
                    nn.init.uniform_(layer.bias, -bound, bound)
            elif isinstance(layer, RMSNorm | GEGLU):
                layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        if not is_worthwhile(x) or type(self.net) is not nn.Sequential or not are_plain([self.net]):
            return self.net(x)
        rows = with_spare_rows(x.reshape(-1, x.shape[-1]))
        for layer in self.net:
            rows = cpu_linear(rows, layer) if isinstance(layer, nn.Linear) else layer(rows)
        return rows[: x.shape[:-1].numel()].view(*x.shape[:-1], -1)


def gated_unit(z: Tensor, mult_bias: Tensor | float = 1.0, activation: str = "gelu") -> Tensor:
    """``gelu(gate) * x * mult_bias`` (..., d) of the halves x and gate of z (..., 2d), in the dtype of z.

    So for "gelu"; the activation is one of `ACTIVATIONS`.
    """
    if isinstance(mult_bias, Tensor):
        mult_bias = mult_bias.to(z.dtype)
    # compilers choose by themselves what to keep
    if torch.compiler.is_compiling() or z.numel() < SMALL or is_lifted() or not may_be_derived(z, mult_bias):
        return _gated_unit(z, mult_bias, activation)
    return _GatedUnit.apply(z, mult_bias, activation)


@fused
def _gated_unit(z: Tensor, mult_bias: Tensor | float, activation: str) -> Tensor:
    x, gate = z.chunk(2, dim=-1)
    hidden = ACTIVATIONS[activation][0](gate) * x
    return hidden * mult_bias if isinstance(mult_bias, Tensor) else hidden


@fused
def _write_gradients(grad: Tensor, z: Tensor, dx: Tensor, dgate: Tensor, activation: str) -> None:
    """Gradients of gated_unit(z) without a factor into the halves dx and dgate of one tensor, in one kernel."""
    function, gradient, _ = ACTIVATIONS[activation]
    x, gate = z.chunk(2, dim=-1)
    dx.copy_(function(gate) * grad)
    dgate.copy_(gradient(grad * x, gate))


@with_known_signature
class _GatedUnit(Function):
    """`_gated_unit` that keeps z only, where plain operations keep z and two more of half its size."""

    forward = staticmethod(_gated_unit)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | float, str], output: Tensor) -> None:
        z, mult_bias, ctx.activation = inputs
        ctx.save_for_backward(*((z, mult_bias) if isinstance(mult_bias, Tensor) else (z,)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        z, *factor = ctx.saved_tensors
        function, gradient, write_gradient = ACTIVATIONS[ctx.activation]
        x, gate = z.chunk(2, dim=-1)
        is_last = grad.dtype == z.dtype and not may_be_derived(grad, z, *factor)
        if is_last and not factor and is_fused(grad):
            dz = torch.empty_like(z)
            _write_gradients(grad, z, *dz.chunk(2, dim=-1), ctx.activation)
            return dz, None, None
        dx, inner = function(gate) * grad, grad * factor[0] if factor else grad
        dbias = (dx * x).sum_to_size(factor[0].shape).to(factor[0].dtype) if ctx.needs_input_grad[1] else None
        if is_last:
            dz = torch.empty_like(z)  # written in place, for less memory
            torch.mul(dx, factor[0] if factor else 1.0, out=dz.chunk(2, dim=-1)[0])
            write_gradient(inner * x, gate, grad_input=dz.chunk(2, dim=-1)[1])
            return dz, dbias, None
        dx, inner = dx * factor[0] if factor else dx, (inner * x).to(z.dtype)
        return torch.cat((dx.to(z.dtype), gradient(inner, gate)), dim=-1), dbias, None


# modules that compute nothing but what their class and parameters say
PLAIN = {Expert, nn.Sequential, nn.Linear, GEGLU, RMSNorm, nn.Dropout}


def are_plain(modules: Sequence[nn.Module]) -> bool:
    """Whether all compute nothing but what their class and parameters say, and the same but for parameters' values.

    It is asked of all experts in every forward, and so of all at once, layer by layer.
    """
    kinds, columns = set(), []
    for module in modules:
        own, (children, parameters) = vars(module), contents(module)
        if type(module) not in PLAIN or "forward" in own or has_hooks(module):
            return False
        settings = own["training"], own.get("p"), own.get("activation")
        kinds.add((type(module), *settings, len(children), len(parameters)))
        columns.append((children.values(), parameters.values()))
    for parameters in zip(*(own for _, own in columns), strict=False):
        tensors = {p if p is None else (type(p), p.shape, p.dtype, p.device) for p in parameters}
        if len(tensors) > 1 or type(parameters[0]) not in (nn.Parameter, NoneType):
            return False
    return len(kinds) == 1 and all(map(are_plain, zip(*(children for children, _ in columns), strict=False)))


def dense_copies(ffn: nn.Module, num_experts: int, noise: float = 0.0) -> list[nn.Module]:
    """Experts that start as copies of a feed-forward, which stays as it is, with noise as of `MoE.from_dense`."""
    check_counts(num_experts=num_experts)
    if not noise >= 0:
        raise ValueError(f"noise must be 0 or more, got {noise}")
    # a function goes on calling what it was written for, where methods and partials are copied with their module
    forwards = {name or "itself": vars(module).get("forward") for name, module in ffn.named_modules()}
    if assigned := ", ".join(name for name, forward in forwards.items() if isinstance(forward, FunctionType)):
        raise ValueError(f"ffn must not have an assigned forward, which its copies would share, got one on {assigned}")
    copies = [deepcopy(ffn) for _ in range(num_experts)]
    if noise:
        with torch.no_grad():
            for parameter in (parameter for copy in copies for parameter in copy.parameters()):
                spread = parameter.std(correction=0)
                parameter.add_(torch.randn_like(parameter) * spread * noise)
    return copies
