"""FusedAttnProcessor on diffusers' Attention."""

import copy
import warnings

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from peft import LoraConfig

from fastdistill.nn import FusedAttnProcessor, joint, patch, unpatch
from tests.nn.test_patch import sd_unet, unet_call

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


# ---- beside what others put into a model -----------------------------------------------------------------------------


def ip_adapter_call(unet, mask=None):
    torch.manual_seed(1)
    x, text, image = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12), [torch.randn(2, 1, 3, 12)]
    given = {} if mask is None else {"cross_attention_kwargs": {"ip_adapter_masks": mask}}
    # As the UNet's own projection of image embeddings would give it to every block.
    unet.encoder_hid_proj = None
    unet.process_encoder_hidden_states = lambda *_, **__: (text, image)
    return unet(x, 3, text, **given).sample


def with_ip_adapter(unet):
    """As `load_ip_adapter` does: a processor of its own for every cross-attention, each with weights."""
    processors = dict(unet.attn_processors)
    for name in processors:
        if name.endswith("attn2.processor"):
            width = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            processors[name] = IPAdapterAttnProcessor2_0(width, 12, num_tokens=(3,), scale=0.5)
    unet.set_attn_processor(processors)
    return unet


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_an_ip_adapter_stays_and_works_in_a_patched_model(masked, recompute):
    unet = with_ip_adapter(sd_unet())
    mask = [torch.ones(1, 1, 8, 8).tril()] if masked else None
    plain = ip_adapter_call(unet, mask)
    report = patch(unet, recompute=recompute)
    assert report.left["attention: its processor is IPAdapterAttnProcessor2_0"] == 4
    torch.testing.assert_close(ip_adapter_call(unet, mask), plain, rtol=1e-4, atol=1e-5)
    for processor in unet.attn_processors.values():
        if isinstance(processor, IPAdapterAttnProcessor2_0):
            processor.scale = [2.0]
    assert not torch.allclose(ip_adapter_call(unet, mask), plain, atol=1e-3)


@pytest.mark.parametrize("recompute", [False, True])
def test_an_ip_adapter_put_into_a_patched_model_works(recompute):
    unet = sd_unet()
    plain = with_ip_adapter(copy.deepcopy(unet))
    patch(unet, recompute=recompute)
    with_ip_adapter(unet)
    state = {name: value for name, value in plain.state_dict().items() if "processor" in name}
    unet.load_state_dict(state, strict=False)
    torch.testing.assert_close(ip_adapter_call(unet), ip_adapter_call(plain), rtol=1e-4, atol=1e-5)
    unpatch(unet)
    assert sum(isinstance(p, IPAdapterAttnProcessor2_0) for p in unet.attn_processors.values()) == 4


class OnlyText(AttnProcessor2_0):
    """A fallback that knows pairs of text and image states, and masks."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **given):
        if isinstance(encoder_hidden_states, tuple):
            encoder_hidden_states = encoder_hidden_states[0]
        self.given = given
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def test_pairs_and_masks_of_an_ip_adapter_reach_the_fallback():
    attn, (x, context) = KINDS["cross"](), inputs("cross")
    plain = attn(x, context)
    fallback = OnlyText()
    attn.set_processor(FusedAttnProcessor(fallback))
    with pytest.warns(UserWarning, match="OnlyText serves, because encoder_hidden_states is a tuple"):
        assert torch.equal(attn(x, (context, [context])), plain)
    with pytest.warns(UserWarning, match="because IP-Adapter masks are given"):
        assert torch.equal(attn(x, context, ip_adapter_masks=[context]), plain)
    assert fallback.given["ip_adapter_masks"][0] is context


def test_a_fallback_with_parameters_is_refused():
    with pytest.raises(TypeError, match="fallback: IPAdapterAttnProcessor2_0 is a module, whose parameters"):
        FusedAttnProcessor(IPAdapterAttnProcessor2_0(16, 12))


def test_processors_can_be_set_one_by_one():
    unet = sd_unet()
    plain = unet_call(unet)
    ours = FusedAttnProcessor()
    processors = {name: ours if "attn1" in name else p for name, p in unet.attn_processors.items()}
    unet.set_attn_processor(processors)
    torch.testing.assert_close(unet_call(unet), plain, rtol=1e-4, atol=1e-5)
    assert {name: p is ours for name, p in unet.attn_processors.items()} == {
        name: "attn1" in name for name in unet.attn_processors
    }


# ---- LoRA ------------------------------------------------------------------------------------------------------------


def add_lora(unet, name, seed, targets=("to_q", "to_v", "to_out.0")):
    unet.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=list(targets)), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in unet.named_parameters():
            if f"lora_B.{name}" in key:  # zeros at first
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            elif f"lora_A.{name}" in key:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


LORA_STEPS = {
    "add": lambda unet: add_lora(unet, "one", 1),
    "add a second": lambda unet: add_lora(unet, "two", 2, ("to_k", "to_v")),
    "both, scaled": lambda unet: unet.set_adapters(["one", "two"], [0.3, 2.0]),
    "the second alone": lambda unet: unet.set_adapters(["two"], [1.0]),
    "disable": lambda unet: unet.disable_adapters(),
    "enable": lambda unet: unet.enable_adapters(),
    "fuse": lambda unet: unet.fuse_lora(lora_scale=0.5),
    "unfuse": lambda unet: unet.unfuse_lora(),
    "fuse safely": lambda unet: unet.fuse_lora(safe_fusing=True),
    "unfuse again": lambda unet: unet.unfuse_lora(),
    "delete one": lambda unet: unet.delete_adapters("two"),
    "unload": lambda unet: unet.unload_lora(),
}


SAME_SCALE = ("fuse", "fuse safely")  # unfuse_lora leaves the scale that fuse_lora set


@pytest.mark.parametrize("recompute", [False, True], ids=["patched", "recomputed"])
def test_every_state_of_lora_adapters_is_that_of_the_plain_model(recompute, monkeypatch):
    monkeypatch.setattr(joint, "_pays", lambda device: True)  # as on a GPU
    torch.manual_seed(0)
    plain = sd_unet().double()
    unet = copy.deepcopy(plain)
    patch(unet, recompute=recompute)
    outputs = {"nothing": unet_call(plain, torch.float64)}
    for step, act in LORA_STEPS.items():
        act(plain)
        act(unet)
        outputs[step] = unet_call(plain, torch.float64)
        torch.testing.assert_close(unet_call(unet, torch.float64), outputs[step], rtol=1e-9, atol=1e-9, msg=step)

    def same(one, other):
        return torch.allclose(outputs[one], outputs[other], rtol=1e-6, atol=1e-6)

    for one, other in (("nothing", "disable"), ("nothing", "unload"), ("the second alone", "enable"), SAME_SCALE):
        assert same(one, other)
    distinct = ("nothing", "add", "both, scaled", "the second alone", "fuse")
    assert not any(same(a, b) for i, a in enumerate(distinct) for b in distinct[i + 1 :])


def test_a_lora_trains_in_a_patched_model_as_in_a_plain_one():
    plain = sd_unet().double()
    unet = copy.deepcopy(plain)
    patch(unet)
    gradients = []
    for model in (plain, unet):
        add_lora(model, "one", 1)
        unet_call(model, torch.float64).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if "lora" in name})
    assert gradients[0]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-8, atol=1e-8)
