"""patch and unpatch on small networks with every structure of the published ones."""

import copy
import functools
import math

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock

from fastdistill.models.architectures import build_networks, find_architecture, unet_inputs
from fastdistill.nn import GroupNormSiLU, LayerNorm, patch, unpatch

SMALL = {"norm_num_groups": 4, "layers_per_block": 1}


def sd_unet(**changes):
    config = {
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
    }
    return UNet2DConditionModel(**SMALL, **{**config, **changes})


def sdxl_unet():
    return sd_unet(
        use_linear_projection=True,
        transformer_layers_per_block=(2, 1),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )


def unet_call(unet, dtype=torch.float32, layout=torch.contiguous_format):
    torch.manual_seed(1)
    conditions = {"text_embeds": torch.randn(2, 8).to(dtype), "time_ids": torch.randn(2, 6).to(dtype)}
    x = torch.randn(2, 4, 8, 8).to(dtype).to(memory_format=layout)
    return unet(x, torch.tensor([3, 700]), torch.randn(2, 5, 12).to(dtype), added_cond_kwargs=conditions).sample


def vae():
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
    )


def vae_call(model, dtype=torch.float32, layout=torch.contiguous_format):
    torch.manual_seed(1)
    return model(torch.randn(2, 3, 8, 8).to(dtype).to(memory_format=layout)).sample


MODELS = {"sd": (sd_unet, unet_call), "sdxl": (sdxl_unet, unet_call), "vae": (vae, vae_call)}
every_model = pytest.mark.parametrize(("make", "call"), MODELS.values(), ids=MODELS)
both_ways = pytest.mark.parametrize("recompute", [False, True], ids=["patched", "recomputed"])


def result_and_gradients(model, call, **settings):
    model.zero_grad()
    y = call(model, **settings)
    y.square().sum().backward()
    return {"y": y.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def assert_same_numbers(ours, exact, torchs):
    """Of each tensor the error is at most that of the plain model in the same dtype, four times over.

    Errors are lengths, over all values of a tensor: of a few values in a row of some fifty roundings one error is large
    by chance. So is that of a small tensor as a whole, so the plain model's error over all is allowed beside it.
    """

    def error(name, found):
        return (found[name].double() - exact[name]).norm().item()

    lengths = {name: value.norm().item() for name, value in exact.items()}
    overall = math.hypot(*(error(name, torchs) for name in exact)) / math.hypot(*lengths.values())
    for name in exact:
        allowed = 4 * (error(name, torchs) + overall * lengths[name]) + 1e-6
        assert error(name, ours) <= allowed, f"{name}: error {error(name, ours)}, allowed {allowed}"


def exact_numbers(model, call, **settings):
    return result_and_gradients(copy.deepcopy(model).double(), functools.partial(call, dtype=torch.float64), **settings)


@every_model
@both_ways
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_a_patched_model_computes_the_same_with_the_same_gradients(make, call, recompute, layout):
    model = make().train().to(memory_format=layout)
    plain = result_and_gradients(model, call, layout=layout)
    exact = exact_numbers(model, call, layout=layout)
    patch(model, recompute=recompute)
    assert_same_numbers(result_and_gradients(model, call, layout=layout), exact, plain)


@every_model
@both_ways
def test_unpatch_restores_exactly(make, call, recompute):
    model = make()
    before = {name: (type(m), dict(m.__dict__), list(m._modules)) for name, m in model.named_modules()}
    state, plain = {k: v.clone() for k, v in model.state_dict().items()}, call(model)
    parameters = [id(p) for p in model.parameters()]
    patch(model, recompute=recompute)
    assert any(type(m) is not before[name][0] for name, m in model.named_modules())
    assert list(model.state_dict()) == list(state)
    assert [id(p) for p in model.parameters()] == parameters
    assert unpatch(model) > 0
    assert {name: (type(m), dict(m.__dict__), list(m._modules)) for name, m in model.named_modules()} == before
    assert torch.equal(call(model), plain)
    assert unpatch(model) == 0


@every_model
def test_nothing_that_could_be_fused_is_left(make, call):
    model = make()
    patch(model)
    norms = [m for m in model.modules() if isinstance(m, (torch.nn.GroupNorm, torch.nn.LayerNorm))]
    assert norms
    assert all(isinstance(norm, (GroupNormSiLU, LayerNorm)) for norm in norms)


def test_the_report_counts_what_was_changed_and_says_what_was_left_and_why():
    report = patch(sd_unet(resnet_time_scale_shift="scale_shift"))
    assert report.changed["GEGLU"] == 4
    assert report.changed["transformer block: 3 LayerNorm"] == 4
    ((left, count),) = report.left.items()
    assert count == 8
    assert "scale_shift" in left
    assert f"left: 8 x {left}" in str(report)
    assert str(patch(torch.nn.Linear(2, 2))) == "nothing was changed"


def test_only_the_ops_asked_for_are_used():
    model = sd_unet()
    assert list(patch(model, ["geglu"]).changed) == ["GEGLU"]
    assert not any(isinstance(m, (GroupNormSiLU, LayerNorm)) for m in model.modules())
    patch(model, "layer_norm")  # restores the GEGLU first
    assert {type(m).__name__ for m in model.modules() if hasattr(type(m), "replaces")} == {
        "PatchedLayerNorm",
        "PatchedTransformerBlock",
    }


def test_unknown_ops_and_things_that_are_no_model_are_refused():
    model = sd_unet()
    with pytest.raises(
        ValueError, match="ops: unknown op 'convolution'; known: group_norm_silu, layer_norm, geglu, attention"
    ):
        patch(model, ["geglu", "convolution"])
    assert unpatch(model) == 0
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        patch("sd15")


@both_ways
def test_hooks_on_the_modules_still_run(recompute):
    model = sd_unet()
    block = next(m for m in model.modules() if isinstance(m, BasicTransformerBlock))
    resnet = model.down_blocks[0].resnets[0]
    hooked = [
        resnet.norm1,
        resnet.conv2,
        block.norm3,
        block.attn1.to_q,
        block.ff.net[0],
        block.ff.net[2],
        model.conv_out,
    ]
    seen = []
    for module in hooked:
        module.register_forward_hook(lambda module, *_: seen.append(module))
    plain = unet_call(model)
    seen.clear()
    patch(model, recompute=recompute)
    torch.testing.assert_close(unet_call(model), plain)
    assert [seen.count(module) for module in hooked] == [1] * len(hooked)


@both_ways
def test_replaced_layers_are_called_as_the_modules_they_are(recompute):
    class Doubled(torch.nn.Module):
        """As a LoRA layer does: another module around the layer."""

        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return 2 * self.layer(x)

    model = sd_unet()
    block = next(m for m in model.modules() if isinstance(m, BasicTransformerBlock))
    resnet = model.down_blocks[0].resnets[0]
    resnet.conv1, block.attn1.to_v, block.ff.net[2] = map(Doubled, (resnet.conv1, block.attn1.to_v, block.ff.net[2]))
    plain = unet_call(model)
    patch(model, recompute=recompute)
    torch.testing.assert_close(unet_call(model), plain)


@both_ways
def test_a_deep_copy_is_patched_and_independent(recompute):
    model = sd_unet()
    plain = unet_call(model)
    patch(model, recompute=recompute)
    copied = copy.deepcopy(model)
    torch.nn.init.zeros_(model.conv_norm_out.weight)
    torch.testing.assert_close(unet_call(copied), plain)
    assert unpatch(copied) > 0
    torch.testing.assert_close(unet_call(copied), plain)


@both_ways
def test_dropout_in_training_drops(recompute):
    model = sd_unet(dropout=0.5).train()
    patch(model, recompute=recompute)
    torch.manual_seed(0)
    outputs = [model(torch.ones(1, 4, 8, 8), 3, torch.ones(1, 5, 12)).sample for _ in range(2)]
    assert not torch.equal(*outputs)
    model.eval()
    assert torch.equal(*(model(torch.ones(1, 4, 8, 8), 3, torch.ones(1, 5, 12)).sample for _ in range(2)))


@both_ways
def test_attention_masks_and_chunked_feed_forwards_work(recompute):
    model = sd_unet()
    mask = torch.tensor([[1, 1, 0, 0, 0]])
    arguments = (torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 12))
    plain = model(*arguments, encoder_attention_mask=mask).sample
    patch(model, recompute=recompute)
    torch.testing.assert_close(model(*arguments, encoder_attention_mask=mask).sample, plain)
    for block in model.modules():
        if isinstance(block, BasicTransformerBlock):
            block.set_chunk_feed_forward(2, dim=1)
    torch.testing.assert_close(model(*arguments, encoder_attention_mask=mask).sample, plain)


@both_ways
def test_works_under_autocast_with_float32_weights(recompute):
    model = sd_unet()

    def call(model):
        with torch.autocast("cpu", torch.bfloat16):
            return unet_call(model)

    plain = result_and_gradients(model, call)
    exact = exact_numbers(model, unet_call)
    patch(model, recompute=recompute)
    assert_same_numbers(result_and_gradients(model, call), exact, plain)


@both_ways
def test_works_with_gradient_checkpointing(recompute):
    model = sd_unet().train()
    plain = result_and_gradients(model, unet_call)
    patch(model, recompute=recompute)
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(result_and_gradients(model, unet_call), plain, rtol=1e-3, atol=1e-3)


@both_ways
def test_compiles(recompute):
    model = sd_unet()
    plain = result_and_gradients(model, unet_call)
    patch(model, recompute=recompute)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(result_and_gradients(model, lambda _: unet_call(compiled)), plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_every_published_unet_is_patched_whole(name):
    with torch.device("meta"):
        model = build_networks(find_architecture(name), torch.float32, ["unet"])["unet"]
    report = patch(model, recompute=True)
    assert not report.left
    blocks = sum(isinstance(m, BasicTransformerBlock) for m in model.modules())
    assert report.changed["transformer block: 3 LayerNorm + projections, recomputed"] == blocks
    assert report.changed["GEGLU + linear layer, recomputed"] == blocks


def test_inputs_of_an_unknown_architecture_or_size_are_refused():
    with pytest.raises(ValueError, match="unknown architecture 'sd3'"):
        unet_inputs("sd3", 1, 512, torch.float32)
    with pytest.raises(ValueError, match="resolution=500: must be a positive multiple of 8 pixels"):
        unet_inputs("sd15", 1, 500, torch.float32)
