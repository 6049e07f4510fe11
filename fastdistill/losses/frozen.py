"""Forward passes that leave no trace in a network: for a penalty that must see the same network several times."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm


@contextlib.contextmanager
def frozen_state(network: object = None) -> Iterator[None]:
    """Within it, forward passes change no buffer and iterate no spectral norm, and all see the same ones.

    Running statistics of BatchNorm, the vectors of both spectral norms of `torch.nn.utils`, and any other buffer are
    as before when it ends; a network in training mode otherwise computes what it does in training. What a module keeps
    outside its buffers is its own.

    Args:
        network: an `nn.Module` (or a method of one) whose modules are held from the beginning. Any other module is held
            from its first call on, so that a plain function may call several. One that a compiled network calls inside
            itself is seen only if it is part of `network`.
    """
    held: set[nn.Module] = set()
    owner = threading.get_ident()

    with contextlib.ExitStack() as undo:

        def hold(module: nn.Module) -> None:
            if module in held:
                return
            held.add(module)
            for norm in _spectral_norms(module):
                undo.callback(setattr, norm, "n_power_iterations", norm.n_power_iterations)
                norm.n_power_iterations = 0
            # Clones, not only restored values: what a graph has saved of them is not changed by the next forward pass.
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    undo.callback(module._buffers.__setitem__, name, buffer)
                    module._buffers[name] = buffer.clone()

        root = getattr(network, "__self__", network)
        if isinstance(root, nn.Module):
            for module in root.modules():
                hold(module)
        hook = register_module_forward_pre_hook(
            lambda module, _: hold(module) if threading.get_ident() == owner else None
        )
        undo.callback(hook.remove)
        yield


class SameRandomness:
    """`begin()` in front of each of several forward passes lets all of them draw the same numbers from torch's default
    generators, the CPU's and that of the device. After the last one they stand where it has left them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device if device.type == "cuda" else None
        self.cpu = torch.get_rng_state()
        self.gpu = torch.cuda.get_rng_state(device) if self.device else None

    def begin(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.device:
            torch.cuda.set_rng_state(self.gpu, self.device)


def _spectral_norms(module: nn.Module) -> list:
    if isinstance(module, _SpectralNorm):
        return [module]
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]
