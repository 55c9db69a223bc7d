"""Live tensor storage: the peak of one instrumented step, and private memory."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# TorchDispatchMode and tree_leaves are private names of torch 2.13, used here only: there is no
# public way to see every tensor that an operation makes.


class LiveStorage(TorchDispatchMode):
    """Counts the bytes of tensor storage made inside it and still alive, and their peak.

    `base_bytes`: what was alive before (parameters, gradients, optimizer state).
    """

    def __init__(self, *, base_bytes: int) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = base_bytes
        self._known: set[int] = set()

    @classmethod
    def above(cls, resident: list[torch.Tensor]) -> LiveStorage:
        """Counts what is made beside `resident`, whose views and updates in place are no new."""
        counter = cls(base_bytes=sum(tensor.nbytes for tensor in resident))
        counter._known |= {tensor.untyped_storage().data_ptr() for tensor in resident}
        return counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        tensor = getattr(tensor, "_local_tensor", tensor)  # a DTensor has no storage of its own
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or address in self._known:
            return
        self._known.add(address)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._gone, address, size)

    def _gone(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live_bytes -= size


def private_bytes() -> int | None:
    """Memory of this process that no other shares (USS), where the system tells; else None."""
    rollup = Path("/proc/self/smaps_rollup")
    if not rollup.is_file():
        return None
    total = 0
    for line in rollup.read_text().splitlines():
        if line.startswith(("Private_Clean:", "Private_Dirty:")):
            total += int(line.split()[1]) * 1024
    return total
