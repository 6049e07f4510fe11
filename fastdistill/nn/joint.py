"""Linear layers that read one input, as one matrix product over weights that lie side by side in memory.

Nothing is kept beside the layers' own parameters. `join` moves them into one piece of memory; at each call the joint
matrix is found anew as the memory of the parameters of that moment, or not at all, where one has been moved away
(`.to()`, `.data = …`, `load_state_dict(assign=True)`) or replaced. So there are no joint weights that could be stale:
what changes a parameter changes the joint matrix, and what ends the neighbourhood ends the joint product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Linear, Parameter

from fastdistill.nn.known_blocks import is_plain
from fastdistill.ops._autograd import needed

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def join_projections(model: torch.nn.Module) -> int:
    """Move the projections of each diffusers `Attention` in `model` that read one input side by side in memory.

    Queries, keys and values where all have one input width, else keys and values. The parameters stay the objects they
    are, with their values; state dicts, optimisers and saved files do not change. `fastdistill.nn.patch` does this, and
    does it again when a patched model is moved or copied; a model with `set_attn_processor(FusedAttnProcessor())` alone
    needs this call, once it is where it will run. Tensors that shared memory with a parameter (`weight.data`, a state
    dict) no longer do, as after `model.to(…)`.

    Not while another thread runs the model or after a CUDA graph has recorded it: addresses change.

    Returns:
        How many of them have projections that lie side by side now.
    """
    from diffusers.models.attention_processor import Attention

    return sum(join(module) for module in model.modules() if isinstance(module, Attention))


def join(attention: torch.nn.Module) -> bool:
    """`join_projections` of one `Attention`."""
    layers = _of_one_input(attention)
    if not layers:
        return False
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    if not _can_be_moved(weights) or not (_all_none(biases) or _can_be_moved(biases)):
        return side_by_side(weights) is not None
    for parameters in (weights, biases):
        if not _all_none(parameters):
            with torch.inference_mode(False), torch.no_grad():
                parts = torch.cat(parameters).split([len(parameter) for parameter in parameters])
                for parameter, part in zip(parameters, parts):
                    parameter.data = part
    return True


def separate(attention: torch.nn.Module) -> None:
    """Give every projection memory of its own again."""
    layers = _of_one_input(attention)
    for parameters in ([layer.weight for layer in layers], [layer.bias for layer in layers]):
        if parameters and side_by_side(parameters) is not None and _own_their_memory(parameters):
            with torch.inference_mode(False), torch.no_grad():
                for parameter in parameters:
                    parameter.data = parameter.detach().clone()


def linears(x: Tensor, layers: Sequence[torch.nn.Module]) -> tuple[Tensor, ...]:
    """`layer(x)` of each, (..., out) from x (..., in): by `products` where all are plain linear layers."""
    if not all(is_plain(layer, Linear) for layer in layers):
        return tuple(layer(x) for layer in layers)
    return products(x, [layer.weight for layer in layers], [layer.bias for layer in layers])


def products(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """`F.linear(x, weight, bias)` of each pair, as views of one product where they lie side by side.

    Differentiable as often as needed.
    """
    stacked = _stacked(x, weights, biases)
    if stacked is None:
        return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases))
    parameters = weights if _all_none(biases) else [*weights, *biases]
    if torch.is_grad_enabled() and (x.requires_grad or any(parameter.requires_grad for parameter in parameters)):
        y = _JointLinear.apply(x, stacked, len(weights), *parameters)
    else:
        y = F.linear(x, *stacked)
    return y.split([len(weight) for weight in weights], dim=-1)


def side_by_side(parameters: Sequence[Tensor | None]) -> Tensor | None:
    """The memory of several parameters as one tensor, stacked along their first dimension; None where each does not
    begin where the one before it ends."""
    first = parameters[0]
    if type(first) is not Parameter:  # nor a subclass: sharded and quantised weights are no plain memory
        return None
    dtype, inner, rows, address = first.dtype, first.shape[1:], 0, first.data_ptr()
    for each in parameters:
        if (
            type(each) is not Parameter
            or each.data_ptr() != address
            or each.dtype != dtype
            or each.shape[1:] != inner
            or not each.is_contiguous()
        ):
            return None
        rows += each.shape[0]
        address += each.nbytes
    offset = first.storage_offset()
    room = first.untyped_storage().nbytes() // first.element_size() - offset
    size = (rows, *inner)
    if len(parameters) == 1 or rows * inner.numel() > room:
        return None
    return first.detach().as_strided(size, first.stride(), offset)


def _stacked(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple | None:
    """The weights as one matrix and the biases as one vector (or None); None where they are not to be used so."""
    # A compiler sees no addresses. Autocast keeps the copy it makes of a parameter, but not that of a view.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled(x.device.type):
        return None
    weight = side_by_side(weights)
    if weight is None:
        return None
    if _all_none(biases):
        return weight, None
    bias = side_by_side(biases)
    return None if bias is None else (weight, bias)


class _JointLinear(torch.autograd.Function):
    """One product forward, one for the gradient of x and one for those of the weights. The parameters are its inputs
    and what it saves, so that a change between forward and backward is an error, as it is with `F.linear`."""

    @staticmethod
    def forward(ctx, x, stacked, count, *parameters):
        weights = parameters[:count]
        ctx.rows, ctx.shape = [len(weight) for weight in weights], x.shape
        needs_x, needs_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[3 : 3 + count])
        ctx.save_for_backward(x if needs_weights else None, *(weights if needs_x else [None] * count))
        return F.linear(x, *stacked)

    @staticmethod
    def backward(ctx, grad_y):
        x, *weights = ctx.saved_tensors
        needs_x, _, _, *needs = ctx.needs_input_grad
        count, rows = len(weights), grad_y.reshape(-1, grad_y.shape[-1])
        grad_x, grads = None, [None] * len(needs)
        if needs_x:
            # Under create_graph the gradient must lead to each parameter, which the view does not.
            weight = None if torch.is_grad_enabled() else side_by_side(weights)
            grad_x = (rows @ (torch.cat(weights) if weight is None else weight)).reshape(ctx.shape)
        if any(needs[:count]):
            grads[:count] = (rows.t() @ x.reshape(-1, x.shape[-1])).split(ctx.rows)
        if any(needs[count:]):
            grads[count:] = rows.sum(0).split(ctx.rows)
        return grad_x, None, None, *needed(grads, needs)


def _of_one_input(attention: torch.nn.Module) -> tuple[Linear, ...]:
    layers = tuple(getattr(attention, name, None) for name in ("to_q", "to_k", "to_v"))
    if not all(type(layer) is Linear for layer in layers):
        return ()
    q, k, v = layers
    return layers if q.in_features == k.in_features == v.in_features else (k, v) * (k.in_features == v.in_features)


def _all_none(parameters: Sequence[Tensor | None]) -> bool:
    return all(parameter is None for parameter in parameters)


def _can_be_moved(parameters: Sequence[Tensor | None]) -> bool:
    """Whether each is a plain parameter that has its memory to itself: a part of something larger (a flat buffer of all
    parameters, say) has an owner who would not know."""
    first = parameters[0]
    return len(set(map(id, parameters))) == len(parameters) and all(
        type(each) is Parameter
        and each.dtype == first.dtype
        and each.dtype in _DTYPES
        and each.device == first.device
        and each.device.type != "meta"
        and not each.is_inference()
        and _own_their_memory([each])
        for each in parameters
    )


def _own_their_memory(parameters: Sequence[Parameter]) -> bool:
    """Whether these parameters, which lie in one storage, are all that is in it."""
    return parameters[0].untyped_storage().nbytes() == sum(parameter.nbytes for parameter in parameters)
