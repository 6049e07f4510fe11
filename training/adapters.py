"""Roles that share one frozen base: each is a set of LoRA adapters (Hu et al., arXiv 2106.09685) in the same network.

A teacher, a student and a fake score of full size hold three networks and two sets of gradients and moments; here the
base is held once, and each role that trains adds only its adapters, a few per cent of it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

LAYERS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"),
)
"""Those that get adapters: of attention, feed-forward, and residual blocks, as in LCM-LoRA (arXiv 2311.05556)."""


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
        target_modules: Sequence[str] = LAYERS,
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
        self._layers: list[Any] = []
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
        for p in self.adapter(unique).values():
            p.data = p.data.float()  # peft takes the base's dtype; what trains is float32
        self._freeze()
        return unique

    def base_parameters(self) -> list[nn.Parameter]:
        """Those of the network itself, whatever adapters it has."""
        own = {id(p) for layer in self._layers for p in layer.get_base_layer().parameters()}
        adapted = {id(p) for layer in self._layers for p in layer.parameters()} - own
        return [p for p in self.network.parameters() if id(p) not in adapted]

    def cast(self, dtype: torch.dtype) -> None:
        """The network's own weights to a dtype, in place; adapters stay float32, and it computes under autocast."""
        for p in self.base_parameters():
            p.data = p.data.to(dtype)

    def autocast(self) -> AbstractContextManager:
        """What a pass needs whose base and adapters differ in dtype, where the caller did not see to it."""
        p = next(self.network.parameters())
        mixed = p.dtype in (torch.bfloat16, torch.float16) and not torch.is_autocast_enabled(p.device.type)
        return torch.autocast(p.device.type, p.dtype) if mixed else nullcontext()

    def remove(self) -> nn.Module:
        """The network without any adapter, as it was given. Roles of this base are of no use any more."""
        _without_adapters(self.network)
        self._layers = []
        self.network.__dict__.pop("peft_config", None)
        return self.network

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
        for layer in self._layers:
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]
        self._active = name

    def _freeze(self) -> None:
        """A new adapter comes active, and with the others set frozen: neither is peft's to say here."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        # Looked for once: they are switched at every pass.
        self._layers = [layer for layer in self.network.modules() if isinstance(layer, BaseTunerLayer)]
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

    So whatever trains, averages or saves a role, sees only what is its own; everything else of a network is the base's.
    A deep copy is another adapter of the same base, with equal weights: a teacher that is the base itself is copied as
    any other teacher, and the copy trains.
    """

    def __init__(self, base: SharedBase, name: str | None) -> None:
        super().__init__()
        self._base, self._name = base, name
        own = {} if name is None else base.adapter(name)
        # "/" for ".", which names of parameters may not have.
        self.adapter = nn.ParameterDict({key.replace(".", "/"): p for key, p in own.items()})
        self.adapter.requires_grad_(name is not None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._base.active(self._name), self._base.autocast():
            return self._base.network(*args, **kwargs)

    @property
    def base(self) -> SharedBase:
        """Which this role shares with others."""
        return self._base

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
        _without_adapters(network.float(), merge=self._name)
        network.__dict__.pop("peft_config", None)
        return network.requires_grad_(True)

    def __getattr__(self, name: str) -> Any:
        """What the network has beside: its blocks, dtype, device."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattribute__("_base").network, name)

    def __deepcopy__(self, memo: dict) -> AdapterRole:
        """Another adapter, with equal weights: of the base itself one that starts as the base."""
        other = self._base.role("copy")
        if self._name is not None:
            other.load_state_dict(self.state_dict())
        memo[id(self)] = other
        return other


def _without_adapters(network: nn.Module, merge: str | None = None) -> None:
    """Every layer as it was before it got adapters; with the weights of the adapter `merge` added."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, layer in list(network.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            if merge is not None:
                layer.merge(adapter_names=[merge])
            parent, _, last = path.rpartition(".")
            setattr(network.get_submodule(parent), last, layer.get_base_layer())


def plain(network: nn.Module) -> nn.Module:
    """A network that stands alone: a role's adapters merged into a copy of their base; any other as it is."""
    return network.merged() if isinstance(network, AdapterRole) else network
