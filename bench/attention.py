"""attention against `F.scaled_dot_product_attention`, on the layers of UNets, VAEs and vision transformers."""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastdistill.ops import attention, attention_sdpa

from . import attention_tiles, providers
from .benchmark import Benchmark, Case, Inputs, Provider, cases
from .roofline import Cost, pointwise

OP = "attention"
TEXT_TOKENS = 77


def _self_and_text(*levels: tuple[int, int, int]) -> tuple[tuple[int, ...], ...]:
    """(heads, queries, keys, head dim) of the transformer blocks of a UNet, from (heads, tokens, head dim)."""
    return tuple((heads, n, m, width) for heads, n, width in levels for m in (n, TEXT_TOKENS))


# (heads, queries, keys, head dim). Stable Diffusion 1.5 and 2.1 at 512 px, SDXL at 512 and 1024 px, the middle of the
# VAE at 512 and 1024 px, ViT-S with patches of 16 and 14 at 224 px.
SITES = {
    "sd15": _self_and_text((8, 4096, 40), (8, 1024, 80), (8, 256, 160), (8, 64, 160)),
    "sd21": _self_and_text((5, 4096, 64), (10, 1024, 64), (20, 256, 64), (20, 64, 64)),
    "sdxl512": _self_and_text((10, 1024, 64), (20, 256, 64)),
    "sdxl1024": _self_and_text((10, 4096, 64), (20, 1024, 64)),
    "vae": ((1, 4096, 4096, 512), (1, 16384, 16384, 512)),
    "vit": ((6, 197, 197, 64), (6, 257, 257, 64)),
}

# Float64 weights held at a time where an exact result is computed: 128 MiB.
_EXACT_WEIGHTS = 1 << 24
# Of a forward pass, where errors alone are computed on a CPU: every site but the VAE's at 1024 px.
_CPU_FLOPS = 1 << 36


def cost(case: Case, dtype: torch.dtype, mode: str) -> Cost:
    """Two products of matrices forward, five backward; what a softmax costs beside them is left out. Forward reads q,
    k, v and writes o; backward reads these and grad_o and writes three gradients; the float32 log-sum-exp of each row
    is written once and read once."""
    heads, queries, keys, width = case.shape
    of_queries, of_keys = heads * queries * width, heads * keys * width
    log_sum_exp = heads * queries * 4 // dtype.itemsize
    values = {
        "forward": 2 * of_queries + 2 * of_keys + (log_sum_exp if mode == "full" else 0),
        "backward": 4 * of_queries + 4 * of_keys + log_sum_exp,
    }
    product = 2 * heads * queries * keys * width
    return pointwise(mode, dtype, values, {"forward": 2 * product, "backward": 5 * product})


def setup(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> Inputs:
    """Batch 1; q, k and v as linear layers write them, (1, tokens, heads * head dim). Their logits have a deviation of
    about 2: the weights of a trained layer are not uniform."""
    heads, queries, keys, width = case.shape

    def activation(tokens: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(1, tokens, heads, width, device=device)).to(dtype).transpose(1, 2)

    tensors = {"q": activation(queries, 2.0), "k": activation(keys), "v": activation(keys)}
    return Inputs(tensors, {"o": activation(queries)})


def smaller(case: Case, interpreted: bool) -> Case:
    """Part of the queries with all keys, where there are too many for a CPU; in the interpreter part of both, and one
    head. A result of attention depends on one head, and a query's on no other query."""
    heads, queries, keys, width = case.shape
    if interpreted:
        return dataclasses.replace(case, shape=(1, min(queries, 33), min(keys, 97), width))
    while 4 * heads * queries * keys * width > _CPU_FLOPS:
        queries //= 2
    return dataclasses.replace(case, shape=(heads, queries, keys, width))


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What a diffusers model calls. In float64, where torch may store all weights, the exact result piece by piece."""
    return exact(q, k, v) if q.dtype == torch.float64 else F.scaled_dot_product_attention(q, k, v)


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q kᵀ / sqrt(D)) v, a few heads and queries at a time, whose weights the backward computes again."""
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    some_heads = max(1, _EXACT_WEIGHTS // (queries * keys))
    some_queries = max(1, _EXACT_WEIGHTS // keys)

    def piece(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ k.mT * width**-0.5, dim=-1) @ v

    done = [
        torch.cat([checkpoint(piece, part, k, v, use_reentrant=False) for part in q.split(some_queries, 1)], 1)
        for q, k, v in zip(*(t.split(some_heads) for t in flat))
    ]
    return torch.cat(done).unflatten(0, (batch, heads))


def _named(provider: Provider) -> Provider:
    """Torch's kernels are not this package's work, and their rows say which of them they are about."""
    if provider.name not in attention_sdpa.NAMES:
        return provider

    def remark(inputs: Inputs) -> str:
        return attention_sdpa.describe(provider.name, **inputs.tensors)

    return dataclasses.replace(provider, remark=remark, peer=True)


_TORCH = dataclasses.replace(
    providers.eager("torch", eager), remark=lambda inputs: attention_sdpa.describe("sdpa", **inputs.tensors)
)

BENCHMARK = Benchmark(
    op=OP,
    cases=cases(SITES),
    layouts=("tokens",),
    setup=setup,
    cost=cost,
    baseline=_TORCH,
    providers=(
        *map(_named, providers.backends(OP, attention)),
        _TORCH,  # against itself: how far two identical functions scatter here
        providers.compiled("torch.compile", F.scaled_dot_product_attention),
    ),
    default=providers.kernel_names(OP),
    suite_aliases={
        "unet": ("sd15", "sd21", "sdxl512", "sdxl1024"),
        "sdxl": ("sdxl512", "sdxl1024"),
    },
    smaller=smaller,
    tilings=functools.partial(attention_tiles.tilings, cost),
)
