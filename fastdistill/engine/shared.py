"""A tensor that is made on one CUDA stream and read on others, as threads do that share a cache."""

from __future__ import annotations

import torch
from torch import Tensor


class Shared:
    """Keeps a tensor made on the current stream; on a CPU nothing but the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._made = None
        if tensor.is_cuda:
            self._made = torch.cuda.Event()
            self._made.record(torch.cuda.current_stream(tensor.device))

    def get(self) -> Tensor:
        """The tensor, for use on the current stream: after it was made, and before its memory is used again."""
        if self._made is not None:
            stream = torch.cuda.current_stream(self._tensor.device)
            stream.wait_event(self._made)
            self._tensor.record_stream(stream)
        return self._tensor
