"""FusedAttnProcessor on diffusers' Attention."""

import warnings

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from fastdistill.nn import FusedAttnProcessor, patch, unpatch
from tests.nn.test_patch import sd_unet

KINDS = {
    "self": lambda: Attention(query_dim=16, heads=2, dim_head=8),
    "cross": lambda: Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=8),
    "with biases": lambda: Attention(query_dim=16, heads=2, dim_head=8, bias=True),
    # The VAE's middle block: an image with its norm and residual.
    "image": lambda: Attention(
        query_dim=16,
        heads=1,
        dim_head=16,
        norm_num_groups=4,
        residual_connection=True,
        bias=True,
        _from_deprecated_attn_block=True,
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def inputs(kind, dtype=torch.float32):
    if kind == "image":
        return (torch.randn(2, 16, 4, 6).to(dtype),)
    x = torch.randn(2, 9, 16).to(dtype)
    return (x, torch.randn(2, 5, 12).to(dtype)) if kind == "cross" else (x,)


def result_and_gradients(attn, tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = attn(*leaves)
    torch.manual_seed(1)
    return y.detach(), torch.autograd.grad(y, [*leaves, *attn.parameters()], torch.randn_like(y))


@every_kind
@pytest.mark.parametrize("rescale", [1.0, 2.0])
def test_computes_what_diffusers_does_with_the_same_gradients(kind, rescale):
    attn, tensors = KINDS[kind](), inputs(kind)
    attn.rescale_output_factor = rescale
    plain = result_and_gradients(attn, tensors)
    attn.set_processor(FusedAttnProcessor())
    torch.testing.assert_close(result_and_gradients(attn, tensors), plain, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(attn(*tensors), plain[0], rtol=1e-4, atol=1e-5)


@every_kind
def test_is_exact_in_float64(kind):
    attn, tensors = KINDS[kind]().double(), inputs(kind, torch.float64)
    plain = result_and_gradients(attn, tensors)
    attn.set_processor(FusedAttnProcessor())
    torch.testing.assert_close(result_and_gradients(attn, tensors), plain, rtol=1e-12, atol=1e-12)


class Wrapped(torch.nn.Module):
    """As a LoRA layer does: another module around the layer, with a scale that may change."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.scale = layer, 2.0

    def forward(self, x):
        return self.scale * self.layer(x)


def test_replaced_layers_are_called_and_their_changes_seen():
    attn, tensors = KINDS["cross"](), inputs("cross")
    attn.to_v = Wrapped(attn.to_v)
    attn.set_processor(FusedAttnProcessor())
    for scale in (2.0, 3.0):
        attn.to_v.scale = scale
        torch.testing.assert_close(attn(*tensors), AttnProcessor2_0()(attn, *tensors), rtol=1e-4, atol=1e-5)


def test_what_it_does_not_know_it_hands_back_and_says_so_once():
    attn, (x, context) = KINDS["cross"](), inputs("cross")
    mask = torch.zeros(2, 1, 5)
    mask[:, :, 3:] = -10000.0
    plain = attn(x, context, attention_mask=mask)
    attn.set_processor(FusedAttnProcessor())
    with pytest.warns(UserWarning, match="AttnProcessor2_0 serves, because an attention mask is given"):
        assert torch.equal(attn(x, context, attention_mask=mask), plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attn(x, context, attention_mask=mask)


def test_unpatch_gives_the_old_processors_back_but_not_over_a_later_choice():
    unet = sd_unet()
    before = unet.attn_processors
    patch(unet, ["attention"])
    assert all(isinstance(p, FusedAttnProcessor) for p in unet.attn_processors.values())
    unpatch(unet)
    assert all(p is before[name] for name, p in unet.attn_processors.items())
    patch(unet, ["attention"])
    own = AttnProcessor2_0()
    unet.set_attn_processor(own)
    unpatch(unet)
    assert all(p is own for p in unet.attn_processors.values())


def test_other_processors_are_left_with_the_reason():
    class Own(AttnProcessor2_0):
        pass

    unet = sd_unet()
    unet.set_attn_processor(Own())
    report = patch(unet, ["attention"])
    assert report.changed == {}
    assert report.left == {"attention: its processor is Own": 8}
