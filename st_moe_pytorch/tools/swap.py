"""Sparse layers in models that others wrote: swap feed-forwards, and collect auxiliary losses with the model unedited.

sparsify(model, "transformer.h.*.mlp", lambda ffn: MoE.from_dense(ffn, dim=768, num_experts=8))

with collect_aux_losses() as aux:
    loss = model(**batch).loss
(loss + aux.total).backward()
"""

import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from st_moe_pytorch.checks import check_counts
from st_moe_pytorch.compat import eager
from st_moe_pytorch.experts import Experts
from st_moe_pytorch.gate import RouterLinear
from st_moe_pytorch.gating import TopNGating
from st_moe_pytorch.layers import GEGLU, Expert, RMSNorm
from st_moe_pytorch.moe import MoE, SparseMoEBlock, given_only
from st_moe_pytorch.tools.compat import initialize_with, is_in_reentrant_checkpoint, is_recomputing
from st_moe_pytorch.tools.find import FeedForward, Where, feed_forwards, nearest, refuse_misfit

NUMBERS = itertools.count()


class AuxLosses:
    """What `collect_aux_losses` collects: ``total``, the 0-d sum of total_aux_loss over every call of every layer."""

    def __init__(self) -> None:
        self.number = next(NUMBERS)
        # a leaf that requires grad if layers' losses do, so that compiled code sees the same kind of tensor in every
        # layer
        self.total: Tensor = torch.zeros((), requires_grad=torch.is_grad_enabled())
        self.has_layers = False


class _Collecting(threading.local):
    """The innermost block of this thread, if any."""

    losses: AuxLosses | None = None


_COLLECTING = _Collecting()


@contextmanager
def collect_aux_losses() -> Iterator[AuxLosses]:
    """Collect the auxiliary losses of all swapped-in layers that run inside, in this thread and in any model.

    Add ``total`` to the loss. Scale it as the loss, for instance by 1 / micro-batches when gradients accumulate. Layers
    that run again in the backward, for activation checkpointing, are not counted again, and those that run under
    no_grad in a block that was opened with gradients are not counted at all. In evaluation the total is 0.
    Of nested blocks, the innermost collects. Warns if no such layer ran: layers that are built into a model return
    their losses instead.
    """
    before, losses = _COLLECTING.losses, AuxLosses()
    _COLLECTING.losses = losses
    try:
        yield losses
    finally:
        _COLLECTING.losses = before
    if not losses.has_layers and torch.is_grad_enabled():
        why = "no swapped-in layer ran in this block, and layers that are built into a model return their losses"
        warnings.warn(f"no auxiliary losses were collected: {why}", stacklevel=3)


class AuxLossTrainer:
    """Adds the auxiliary losses to the loss of transformers' Trainer.

    ``class SparseTrainer(AuxLossTrainer, Trainer): pass``
    """

    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with collect_aux_losses() as aux:
            given = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
            result = super().compute_loss(model, inputs, **given)  # pyright: ignore[reportAttributeAccessIssue]
        loss, outputs = result if return_outputs else (result, None)
        # a loss over the items of all accumulated batches is not divided by their number again; decided as the Trainer
        # does
        is_scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if is_scaled is None:
            by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            is_scaled = by_model or self.compute_loss_func is not None
        steps = self.current_gradient_accumulation_steps if model.training and is_scaled else 1
        loss = loss + aux.total.to(loss.device) / steps
        return (loss, outputs) if return_outputs else loss


class SparseFeedForward(nn.Module):
    """A sparse layer in place of a feed-forward, tensor to tensor. Its auxiliary loss goes to `collect_aux_losses`."""

    def __init__(self, moe: MoE | SparseMoEBlock, name: str = "") -> None:
        super().__init__()
        self.moe = moe
        self.name = name or type(self).__name__
        self.mask: Tensor | None = None
        self.has_mask = False  # in the last forward
        self.ran_in = self.counted_in = -1  # numbers of blocks
        self.dim: int = moe.dim if isinstance(moe, MoE) else moe.moe.dim

    def forward(self, x: Tensor, *others: Any, mask: Tensor | None = None, **named: Any) -> Tensor:
        """Tokens x (... d) -> outputs of the layer.

        mask (...) is True for real tokens; without one, and outside `padded`, padding is routed as tokens are.

        What else the model hands to its feed-forwards has to be None.
        """
        given = [f"argument {place}" for place, other in enumerate(others, 2) if other is not None]
        if given := given + [name for name, other in named.items() if other is not None]:
            too = f"but its model gives it {', '.join(given)} too"
            raise ValueError(f"{self.name}: a sparse layer takes tokens and mask=, {too}")
        if x.shape[-1] != self.dim:
            raise ValueError(f"{self.name}: x must have shape (..., {self.dim}), got {tuple(x.shape)}")
        mask = self.mask if mask is None else mask
        if is_recomputing() and self.has_mask and mask is None:
            raise RuntimeError(f"{self.name} runs again in the backward without its mask: run both in `padded`")
        if self.has_mask != (mask is not None):
            self.has_mask = mask is not None
        outputs, aux_loss, _, _ = self.moe(x, **given_only(mask=mask))
        if outputs.shape != x.shape:
            wanted = f"experts must keep the width of a feed-forward, {self.dim}"
            raise ValueError(f"{self.name}: {wanted}, got {outputs.shape[-1]}")
        if _COLLECTING.losses is not None:
            _COLLECTING.losses.has_layers = True
        layer = self.moe if isinstance(self.moe, MoE) else self.moe.moe
        if self.training and (layer.balance_loss_coef or layer.router_z_loss_coef):
            self._hand_over(aux_loss)
        return outputs

    def extra_repr(self) -> str:
        return f"in place of {self.name}"

    def _hand_over(self, aux_loss: Tensor) -> None:
        losses, is_compiling = _COLLECTING.losses, torch.compiler.is_compiling()
        if is_recomputing():
            if self.ran_in != self.counted_in:
                self._refuse_lost()
        elif losses is None:
            if torch.is_grad_enabled() and not is_compiling:
                how = "run the model inside `with collect_aux_losses() as aux:` and add aux.total to the loss"
                lost = "a swapped-in sparse layer is trained without its balance loss and router z-loss"
                warnings.warn(f"{lost}: {how}", stacklevel=3)
        elif losses.total.requires_grad and not torch.is_grad_enabled():  # a reference model, or lost by checkpointing
            if is_compiling or is_in_reentrant_checkpoint():
                eager(self._refuse_lost, "an auxiliary loss has no gradient")()
            self.ran_in = losses.number
        else:
            if not is_compiling:
                self.ran_in = self.counted_in = losses.number
            losses.total = losses.total.to(aux_loss.device) + aux_loss

    def _refuse_lost(self) -> None:
        why = f"the auxiliary loss of {self.name} has no gradient, because it ran without gradients in a training step"
        how = "if by activation checkpointing, choose the kind that keeps them, use_reentrant=False"
        raise RuntimeError(f"{why}: {how}; run a reference model in evaluation, or outside of the block")


@contextmanager
def padded(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Tell the swapped-in layers of a model which tokens are real, since models do not tell their feed-forwards.

        with padded(model, batch["attention_mask"]), collect_aux_losses() as aux:
            (model(**batch).loss + aux.total).backward()

    Padding then takes no expert's place, counts in no loss, and gets output 0 from `MoE` layers.

    mask: (b n), True or 1 for real tokens, of the shape that all swapped-in layers of the model get theirs in. Where
        encoder and decoder differ, open a block for each of them.

    Run the backward in the block too if activation checkpointing runs layers again. Raises ValueError for a model
    without swapped-in layers; a layer whose tokens do not have the mask's shape raises it in its forward.
    """
    layers = [module for module in model.modules() if isinstance(module, SparseFeedForward)]
    if not layers:
        raise ValueError(f"model must have layers that sparsify has swapped in, got a {type(model).__name__} without")
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
        raise ValueError(f"mask must be bool or integer, 1 for real, got {getattr(mask, 'dtype', type(mask).__name__)}")
    before = [layer.mask for layer in layers]
    for layer in layers:
        layer.mask = mask.to(next(layer.parameters()).device, torch.bool)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.mask = own


M = TypeVar("M", bound=nn.Module)


def sparsify(model: M, where: Where, make: Callable[[nn.Module], MoE | SparseMoEBlock], *, every: int = 1) -> M:
    """Put a sparse layer in place of each feed-forward of a model, and return the model, changed in place.

    `swapped` tells which were swapped.

    where: which modules are swapped. A pattern of their names, such as "encoder.layers.*.mlp", where * is one name
        between dots or a part of one, and ** any number of names; or their type, or a tuple of types. Of modules inside
        each other, the outermost is swapped. A feed-forward whose parts the model runs itself is a tuple of patterns,
        one for each part in order, such as ("bert.encoder.layer.*.intermediate", "bert.encoder.layer.*.output.dense"):
        the first part is swapped, the others pass on. `nn.TransformerEncoderLayer` and `nn.TransformerDecoderLayer`, by
        type or name, get their feed-forwards swapped.
    make: builds the layer for one of them, which it gets, several parts as one `nn.Sequential`. The layer moves to its
        device, dtype and mode. A feed-forward that is shared gets one layer, as shared.
    every: of so many feed-forwards that follow each other, only the last is swapped: 4 in ST-MoE (table 11).

    Swap before an optimizer or DistributedDataParallel is built: it would not know the new parameters. Hooks of a
    feed-forward go with it. Models of transformers initialise in the layers what a checkpoint lacks. To start from a
    dense checkpoint, load it before the swap.

    Modules must map one tensor (... d) to one of the same shape. Raises ValueError, with the model unchanged, if
    nothing is found, if what is found is sparse already, or if it is seen to map otherwise; what is not seen, the layer
    says by name in its first forward.
    """
    if isinstance(make, nn.Module | type):
        raise ValueError("make must be a function that builds a layer for each feed-forward, not a layer or a class")
    found = feed_forwards(model, where)
    if not found:
        raise ValueError(f"where must match modules of the model, got {where!r}; there are {nearest(model, where)}")
    check_counts(every=every)
    if every > len(found):
        raise ValueError(f"where must match every={every} feed-forwards or more to swap any, found {len(found)}")
    found = found[every - 1 :: every]
    modules = dict(model.named_modules(remove_duplicate=False))
    layers: dict[nn.Module | None, SparseFeedForward] = {}
    for feed_forward in found:
        first = modules.get(feed_forward.names[0])
        if first not in layers:
            layers[first] = _in_place_of(feed_forward, make(feed_forward.module))
    for feed_forward in found:
        first, *others = feed_forward.names
        model.set_submodule(first, layers[modules.get(first)])
        for name in others:
            parent, _, part = name.rpartition(".")
            setattr(modules[parent], part, nn.Identity())
        while first:
            first = first.rpartition(".")[0]
            _make_known_to(modules[first])
    return model


def _make_known_to(outer: nn.Module) -> None:
    """Have a module around a sparse layer treat it rightly, where it deals with all that is inside by itself."""
    initialize_with(outer, (RouterLinear, TopNGating, Experts, Expert, GEGLU, RMSNorm))
    # in evaluation, torch's own layers compute with the parameters of parts that they know, unless these say otherwise
    if isinstance(outer, nn.TransformerEncoderLayer):
        outer.activation_relu_or_gelu = 0
    if isinstance(outer, nn.TransformerEncoder):
        outer.use_nested_tensor = False


def swapped(model: nn.Module) -> dict[str, MoE | SparseMoEBlock]:
    """The sparse layers that stand in place of feed-forwards, by the names of these."""
    return {name: module.moe for name, module in model.named_modules() if isinstance(module, SparseFeedForward)}


def _in_place_of(feed_forward: FeedForward, moe: MoE | SparseMoEBlock) -> SparseFeedForward:
    """The layer, as the module was: on its device, in its dtype and mode."""
    if not isinstance(moe, MoE | SparseMoEBlock):
        raise ValueError(f"make must return an MoE or a SparseMoEBlock, got {type(moe).__name__}")
    module = feed_forward.module
    layer = SparseFeedForward(moe, str(feed_forward))
    refuse_misfit(feed_forward, layer.dim)
    layer.train(module.training)
    like = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), None)
    return layer if like is None else layer.to(device=like.device, dtype=like.dtype)
