"""Count the memory of tensors, also of those that have shapes but no data."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Tracks the current and peak memory of all live tensors that are created while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __enter__(self) -> LiveBytes:
        # FSDP frees gathered parameters by `resize_`, which bypasses the dispatcher
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = self._resize(storage, size)
            self._note(storage)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*args)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor):
                self._note(_own(made).untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        """Record the current size of a storage, until it is freed."""
        key, n_bytes = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key)
        self.now += n_bytes - self._sizes.get(key, 0)
        self._sizes[key] = n_bytes
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def n_bytes(tensors: Iterable[Any]) -> int:
    """Return the bytes of tensors; memory that tensors share, such as a block's sharded gradients, counts once."""
    storages = [_own(tensor).untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a sharded tensor; other tensors unchanged."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
