"""Networks of which each process holds a part: FSDP2 (Zhao et al., arXiv 2304.11277; `torch.distributed.fsdp`).

Parameters, gradients, optimiser states and averages are split over the processes; a block is whole only while it
computes. What is small, or of no known structure, stays whole on every process.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from fastdistill.optim.shards import is_sharded

from .adapters import AdapterRole
from .world import World


@dataclass(frozen=True)
class Sharded:
    """A network that is sharded, in place.

    Attributes:
        network: called as before, by all processes at once.
        outline: a copy of what it was before, its parameters without memory.
        keeps_root: what belongs to no block stays whole after the first pass. So it is where nothing changes; else it
            would not see the next update.
    """

    network: nn.Module
    outline: nn.Module
    keeps_root: bool

    def whole(self) -> nn.Module:
        """An ordinary copy of the network as it is now, whole in every process. All processes call this."""
        values = {name: _full(value) for name, value in self.network.state_dict().items()}
        network = copy.deepcopy(self.outline)
        for name, p in self.outline.named_parameters():  # in the memory order that it had
            values[name] = torch.empty_like(p, device=values[name].device, requires_grad=False).copy_(values[name])
        network.load_state_dict(values, assign=True)
        return network.train(self.network.training)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within, the network is whole in every process, and one of them can call it alone.

        All processes enter and leave together.
        """
        blocks = _sharded_modules(self.network)
        for block in blocks:
            block.set_reshard_after_forward(False, recurse=False)
            block.unshard()
        try:
            yield
        finally:
            for block in blocks:
                block.reshard()
                block.set_reshard_after_forward(block is not self.network or not self.keeps_root, recurse=False)
            self.network.reset_iter_state()

    def end_iteration(self) -> None:
        """FSDP keeps a list of all forward passes until a backward pass, which a frozen network may never have."""
        if self.keeps_root:
            self.network.reset_iter_state()


def shard(network: nn.Module, world: World, *, precision: str = "float32", changes: bool = True) -> Sharded:
    """Split a network over all processes, in place; its parameters become DTensors.

    The units that are gathered for their computation are those that the network's authors want kept together
    (diffusers' and transformers' `_no_split_modules`): transformer blocks, resnets, and what an up block has beside
    them. They are large enough to fill the wires, and small enough for one or two to be whole at a time, while one up
    block of SDXL holds almost half of its parameters. What is left goes with the network itself.

    Args:
        network: whole, and the same, in every process. `blocks_of` says whether it can be sharded. FSDP makes its
            parameters contiguous.
        precision: "bfloat16" gathers what trains in bfloat16, as autocast would read it; gradients are averaged, and
            kept, in float32.
        changes: False of a network that never will: what belongs to no block is gathered once.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    outline = _outline(network)
    for p in network.parameters():
        p.data = p.data.contiguous()
    mesh = init_device_mesh(next(network.parameters()).device.type, (world.size,))
    low = precision == "bfloat16" and any(p.requires_grad for p in network.parameters())
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if low else None
    options = {"mesh": mesh, "mp_policy": policy or MixedPrecisionPolicy()}
    for block in blocks_of(network):
        fully_shard(block, reshard_after_forward=True, **options)
    fully_shard(network, reshard_after_forward=changes, **options)
    for name in getattr(network, "forward_methods", ()):
        register_fsdp_forward_method(network, name)
    # FSDP notes dtypes of what requires a gradient at its first pass, which may be in another role's turn.
    fully_shard.state(network)._lazy_init()
    return Sharded(network, outline, keeps_root=not changes)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The units of `shard`, inner ones first; none where the network names none, and cannot be sharded."""
    names = {name for module in network.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    inner = [module for module in network.modules() if module is not network and type(module).__name__ in names]
    return inner[::-1]


def shard_roles(
    roles: Mapping[str, nn.Module], trained: list[str], world: World, *, sharding: str, precision: str
) -> dict[str, Sharded]:
    """Shard the networks that train, and the frozen ones of the student's class: its teacher.

    Others stay whole: discriminators, whose penalties need second derivatives, which FSDP has not; features; decoders.

    Args:
        trained: the roles that train, the student first.
        sharding: "none" does nothing, and so does one process alone.

    Raises:
        ValueError: roles that are adapters of one base, or a student that names no blocks.
    """
    if sharding == "none" or world.size == 1:
        return {}
    student = roles[trained[0]]
    for role in trained:
        if isinstance(roles[role], AdapterRole):
            raise ValueError(
                f'sharding "full" splits networks that train as a whole, and {role} is an adapter of a shared base, '
                'which stays whole: needed sharding "none", or roles "full"'
            )
    if not blocks_of(student):
        raise ValueError(
            f'sharding "full": {type(student).__name__} names no blocks to split it by; needed a class with '
            '`_no_split_modules = ["NameOfABlock"]`, or sharding "none"'
        )
    kind = type(student)
    chosen = [role for role, n in roles.items() if blocks_of(n) and (role in trained or type(n) is kind)]
    found, seen = {}, set()
    for role in chosen:
        if id(roles[role]) not in seen:
            seen.add(id(roles[role]))
            found[role] = shard(roles[role], world, precision=precision, changes=role in trained)
    return found


@contextmanager
def gathered(networks: Iterable[Sharded]) -> Iterator[None]:
    """All of them, as `Sharded.gathered`."""
    with ExitStack() as stack:
        for network in networks:
            stack.enter_context(network.gathered())
        yield


def _sharded_modules(network: nn.Module) -> list[nn.Module]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in network.modules() if isinstance(module, FSDPModule)]


def _outline(network: nn.Module) -> nn.Module:
    memo = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in network.parameters()
    }
    return copy.deepcopy(network, memo)


def _full(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if is_sharded(value) else value.detach().clone()
