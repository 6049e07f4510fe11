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
    are, with their values; state dicts, optimisers and saved files do not change. `fastdistill.nn.patch` does this
    except on a CPU, where one product was measured to be no faster than three, and does it again when a patched model
    is moved or copied; a model with `set_attn_processor(FusedAttnProcessor())` alone needs this call, once it is where
    it will run. Tensors that shared memory with a parameter (`weight.data`, a state dict) no longer do, as after
    `model.to(…)`.

    Not while another thread runs the model or after a CUDA graph has recorded it: addresses change.

    Returns:
        How many of them have projections that lie side by side now.
    """
    from diffusers.models.attention_processor import Attention

    return sum(join(module) for module in model.modules() if isinstance(module, Attention))


def join_where_it_pays(attention: torch.nn.Module) -> None:
    """`join` of an `Attention` that is not on a CPU."""
    parameter = next(attention.parameters(), None)
    if parameter is not None and _pays(parameter.device):
        join(attention)


def _pays(device: torch.device) -> bool:
    return device.type != "cpu"


def join(attention: torch.nn.Module) -> bool:
    """`join_projections` of one `Attention`."""
    layers = _of_one_input(attention)
    if not layers:
        return False
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    groups = [weights] if _all_none(biases) else [weights, biases]
    apart = [parameters for parameters in groups if side_by_side(parameters) is None]
    if not all(map(_can_be_moved, apart)):
        return False
    for parameters in apart:
        with torch.inference_mode(False), torch.no_grad():
            parts = torch.cat(parameters).split([len(parameter) for parameter in parameters])
            for parameter, part in zip(parameters, parts):
                parameter.data = part
    return True


def separate(attention: torch.nn.Module) -> None:
    """Give the projections of an `Attention` that was joined memory of their own again."""
    for layer in (attention.to_q, attention.to_k, attention.to_v):
        layer = getattr(layer, "base_layer", layer)  # within a LoRA layer
        for parameter in layer.parameters(recurse=False):
            if type(parameter) is Parameter and not _owns_its_memory(parameter):
                with torch.inference_mode(False), torch.no_grad():
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
    stacked = _stacked(weights, biases)
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
    if type(first) is not Parameter or len(parameters) < 2:
        return None
    dtype, shape, rows, end = first.dtype, first.shape, 0, first.data_ptr()
    for each in parameters:
        # No subclass: sharded and quantised weights are no plain memory.
        if type(each) is not Parameter or each.data_ptr() != end or each.dtype != dtype or not each.is_contiguous():
            return None
        if each.shape != shape and each.shape[1:] != shape[1:]:
            return None
        rows += len(each)
        end += each.nbytes
    offset, storage = first.storage_offset(), first.untyped_storage()
    # Behind the end of a storage another may begin by chance.
    if end - first.data_ptr() > storage.nbytes() - offset * first.element_size():
        return None
    return first.detach().as_strided((rows, *shape[1:]), first.stride(), offset)


def _stacked(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple | None:
    """The weights as one matrix and the biases as one vector (or None); None where they are not to be used so."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # they see no addresses
        return None
    weight = side_by_side(weights)
    # Autocast keeps the copy it makes of a parameter, but not that of a view.
    if weight is None or torch.is_autocast_enabled(weight.device.type):
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
        and _owns_its_memory(each)
        for each in parameters
    )


def _owns_its_memory(parameter: Parameter) -> bool:
    return parameter.untyped_storage().nbytes() == parameter.nbytes
