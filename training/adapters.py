"""Roles that share one frozen base: each is a set of LoRA adapters (Hu et al., arXiv 2106.09685) in the same network.

A teacher, a student and a fake score of full size hold three networks and two sets of gradients and moments; here the
base is held once, and each role that trains adds only its adapters, a few per cent of it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION_AND_FEED_FORWARD = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")


class SharedBase:
    """A network in which roles live as adapters.

    Args:
        network: a diffusers UNet, or any module with linear or convolution layers; it is frozen here, its layers get
            adapters in place, and it may be used as before through `role(None)`.
        rank: of every adapter.
        alpha: adapters add `alpha / rank` times their product; `rank` unless given, so that the factor is 1.
        target_modules: endings of the names of the layers that get adapters.

    Raises:
        ImportError: peft is not installed.
        ValueError: a rank below 1, or no layer of these names (peft's error names them).
    """

    def __init__(
        self,
        network: nn.Module,
        rank: int,
        *,
        alpha: float | None = None,
        target_modules: Sequence[str] = ATTENTION_AND_FEED_FORWARD,
    ) -> None:
        try:
            import peft
        except ImportError as error:
            raise ImportError('roles as adapters need peft: pip install "fastdistill[train]"') from error
        if rank < 1:
            raise ValueError(f"rank must be 1 or more; got {rank}")
        self.network = network.requires_grad_(False)
        self._config = peft.LoraConfig(
            r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=list(target_modules)
        )
        self._names = 0
        self._active: str | None = None

    def role(self, name: str | None) -> AdapterRole:
        """The network with a new adapter, which starts as the base; with None the base itself, without any."""
        return AdapterRole(self, name and self.add(name))

    def add(self, name: str) -> str:
        """A new adapter; the name that it has in the network."""
        from peft import inject_adapter_in_model

        self._names += 1
        unique = f"{name}_{self._names}"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are the point
            inject_adapter_in_model(self._config, self.network, adapter_name=unique)
        self._freeze()
        return unique

    def adapter(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter by their names in the network, without the adapter's own."""
        mark = f".{name}."
        return {key.replace(mark, "."): p for key, p in self.network.named_parameters() if mark in key}

    @contextmanager
    def active(self, name: str | None) -> Iterator[None]:
        """Within, the network has this adapter and no other; with None, none."""
        before = self._active
        self._activate(name)
        try:
            yield
        finally:
            self._activate(before)

    def _activate(self, name: str | None) -> None:
        if name == self._active:
            return
        # peft's set_adapter and enable_adapters also set requires_grad, which is the trainer's to say.
        for layer in self._layers():
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]
        self._active = name

    def _layers(self) -> Iterator[Any]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        return (layer for layer in self.network.modules() if isinstance(layer, BaseTunerLayer))

    def _freeze(self) -> None:
        """A new adapter comes active, and with the others set frozen: neither is peft's to say here."""
        self._active = ""
        self._activate(None)

    def checkpoint(self, function: Any, *args: Any) -> Any:
        """For `enable_gradient_checkpointing`: the second forward, in the backward pass, has the first one's adapter.

        By then another role may have been called.
        """
        name = self._active

        def run(*args: Any) -> Any:
            with self.active(name):
                return function(*args)

        return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False)


class AdapterRole(nn.Module):
    """A shared base as one role sees it: called as the network, with parameters that are the adapter's alone.

    So whatever trains, averages or saves a role, sees only what is its own. A deep copy is another adapter of the same
    base, with equal weights.
    """

    def __init__(self, base: SharedBase, name: str | None) -> None:
        super().__init__()
        self._base, self._name = base, name
        own = {} if name is None else base.adapter(name)
        # "/" for ".", which names of parameters may not have.
        self.adapter = nn.ParameterDict({key.replace(".", "/"): p for key, p in own.items()})
        self.adapter.requires_grad_(name is not None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._base.active(self._name):
            return self._base.network(*args, **kwargs)

    @property
    def config(self) -> Any:
        """Of the network."""
        return self._base.network.config

    @property
    def mid_block(self) -> nn.Module:
        """Of the network, where the head of DMD2's discriminator looks."""
        return self._base.network.mid_block

    def train(self, mode: bool = True) -> AdapterRole:
        """The base stays in evaluation mode: it is everybody's."""
        self.training = mode
        return self

    def merged(self) -> nn.Module:
        """A network of its own, without adapters: the base's weights with this adapter's product added, in float32.

        Named and shaped as the base was, so that it is saved and opened as any other.
        """
        with self._base.active(self._name):
            network = copy.deepcopy(self._base.network)
        from peft.tuners.tuners_utils import BaseTunerLayer

        for path, layer in list(network.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                if self._name is not None:
                    layer.merge(adapter_names=[self._name])
                parent, _, last = path.rpartition(".")
                setattr(network.get_submodule(parent), last, layer.get_base_layer())
        return network.requires_grad_(True)

    def __deepcopy__(self, memo: dict) -> AdapterRole:
        other = self._base.role("copy" if self._name is not None else None)
        other.load_state_dict(self.state_dict())
        memo[id(self)] = other
        return other


def adapter_state(role: AdapterRole) -> dict[str, Tensor]:
    """The adapter under diffusers' and peft's names, as `save_lora_weights` writes it."""
    return {key.replace("/", "."): p.detach() for key, p in role.adapter.items()}
