"""Modules that own no weights, and run a sub-network with slices of its teacher's weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from litgpt.config import Config
from litgpt.model import Block
from torch import nn
from torch.func import functional_call

from litgpt_whittle.index_plan import ParamSlice, take_along
from litgpt_whittle.meta import meta_modules
from litgpt_whittle.student_block import student_block
from litgpt_whittle.subnet import LAYER_SETTINGS, SubNet
from litgpt_whittle.windows import WindowMasks, vectorize_windows

M = TypeVar("M", bound=nn.Module)

Weights = dict[str, torch.Tensor]

MAX_KEPT = 256
"""Maximum number of modules without weights that a super-network caches, the most recently used"""


class EmptyModules:
    """Cache of the meta-device modules in which a super-network runs its candidates.

    Weights are passed at each call, so that all layers and candidates of one structure and size share a module.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, Any] = {}
        self._masks = WindowMasks()

    def get(self, key: Hashable, build: Callable[[], M]) -> M:
        """Return the module that was built for a key, or build it."""
        module = self._kept.pop(key, None)
        if module is None:
            with meta_modules():
                module = build().eval()
        self._kept[key] = module  # now the most recently used
        if len(self._kept) > MAX_KEPT:
            del self._kept[next(iter(self._kept))]
        return module

    def block(self, subnet: SubNet, index: int) -> Block:
        """Return a block for a sub-network's layer `index`."""
        teacher, layer = subnet.teacher, subnet.layers[index]
        settings = tuple(values[layer] for name in LAYER_SETTINGS if (values := getattr(teacher, name)) is not None)
        key = len(subnet.n_embd), subnet.head_cut.dims.tobytes(), subnet.layer(index).sizes, settings
        return self.get(key, lambda: vectorize_windows(student_block(subnet, index), self._masks))


class Running:
    """A sub-network's module that runs in place of a teacher module, with slices of that module's weights.

    Args:
        module: The sub-network's module, on the meta device.
        slices: Slices of the teacher module's parameters.
        constants: Tensors that are not sliced from the teacher.
        in_place: If true, add gradients in place to the `grad` of the teacher's parameters.
        idle: Names of the teacher module's submodules whose unused weights get zero gradients.
    """

    def __init__(
        self,
        module: nn.Module,
        slices: Mapping[str, ParamSlice],
        constants: Weights,
        in_place: bool = False,
        idle: Collection[str] = (),
    ) -> None:
        self.module, self.idle = module, idle
        self.in_place = in_place
        self.slices = slices
        self.constants = constants
        self.weights: Weights | None = None

    def __call__(self, owner: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        weights = self._take(owner) if self.weights is None else self.weights
        if self.idle:
            unused = [weight for name in self.idle for weight in owner.get_submodule(name).parameters()]
            args = (_PassOn.apply(args[0], *unused), *args[1:])
        return functional_call(self.module, weights | self.constants, args, kwargs)

    @torch.no_grad()
    def materialize(self, owner: nn.Module, most: int) -> int:
        """Slice the weights once for all calls, unless gathered weights (copies, not views) exceed `most` bytes.

        Returns:
            Bytes of the gathered weights; 0 if the weights are sliced in every forward pass.
        """
        indexed = [take for take in self.slices.values() if any(not isinstance(i, slice) for i in take.index)]
        n_bytes = sum(take.numel() for take in indexed) * next(owner.parameters()).element_size()
        if n_bytes > most:
            return 0
        self.weights = {name: weight.detach() for name, weight in self._take(owner).items()}
        return n_bytes

    def _take(self, owner: nn.Module) -> Weights:
        # looked up in each forward, since wrappers (FSDP2) replace the parameters
        return {name: self._part(take, tensor_of(owner, take.name)) for name, take in self.slices.items()}

    def _part(self, take: ParamSlice, tensor: torch.Tensor) -> torch.Tensor:
        return _TakeInPlace.apply(tensor, take) if self.in_place and tensor.requires_grad else take(tensor)


def tensor_of(module: nn.Module, name: str) -> torch.Tensor:
    """Return a parameter or buffer by its full name, without listing all of the module's tensors."""
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


class _TakeInPlace(torch.autograd.Function):
    """Slice of a leaf tensor whose gradient is accumulated in place in the leaf's gradient.

    Autograd's slicing would allocate a gradient of the leaf's full size for every slice before adding them.
    """

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, take: ParamSlice) -> torch.Tensor:
        ctx.leaf, ctx.take = leaf, take
        return take(leaf)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None]:
        ctx.take.add_into(ctx.leaf.grad, grad)
        return None, None


class Lookup(nn.Embedding):
    """The teacher's embedding, which selects scattered channels after the lookup.

    Only the rows of the given tokens are then copied, not the whole matrix.
    """

    channels: torch.Tensor
    """Indices of the channels, passed at each call"""

    def __init__(self, teacher: Config) -> None:
        super().__init__(teacher.padded_vocab_size, teacher.n_embd)
        self.register_buffer("channels", torch.empty(0, dtype=torch.long), persistent=False)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return take_along(super().forward(idx), -1, self.channels)


class Delegate(nn.Module):
    """Calls a block of the super-network from within the sub-network's model, without owning its weights.

    Args:
        blocks: Any dropped blocks, which return the hidden states unchanged, then the block to call.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        # in tuples, they are not registered as submodules
        *before, block = blocks
        self.before, self.block, self.behind = tuple(before), (block,), ()

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        for block in self.before:
            x = block(x)
        x = self.block[0](x, *args, **kwargs)
        for block in self.behind:
            x = block(x)
        return x


def pass_on(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return x unchanged, as the forward pass of a dropped block, whose weights get zero gradients."""
    return _PassOn.apply(x, *block.parameters())


class _PassOn(torch.autograd.Function):
    """Identity with zero gradients for the unused weights."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        ctx.weights = [(weight.shape, weight.dtype, weight.device) for weight in weights]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.weights)
        return grad, *zeros
