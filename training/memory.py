"""How much memory tensors take while something runs, counted op by op: on any device, and with fake tensors on none.

Under fake tensors (`torch._subclasses.FakeTensorMode`) an update of a full SDXL takes seconds and no memory: every op
says what it would allocate, nothing is computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """Use as a context: counts every storage that an op makes within it, until nothing refers to it any more.

    What an op allocates for itself alone, a convolution's workspace for example, is not seen.

    Attributes:
        now, peak: bytes of tensors, at this moment and at most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[UntypedStorage]] = {}

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were there before."""
        for t in tensors:
            self._count(t)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = self.compute(function, args, kwargs or {})
        if isinstance(made, Tensor):
            self._count(made)
            return made
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return made

    def compute(self, function: Any, args: tuple, kwargs: dict) -> Any:
        """What the op makes."""
        return function(*args, **kwargs)

    def _count(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def forget(_: object) -> None:
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.ref(storage, forget)
        self.now += size
        if self.now > self.peak:
            self.rose(t)

    def rose(self, t: Tensor) -> None:
        """There is more than ever before, since `t` was made."""
        self.peak = self.now
