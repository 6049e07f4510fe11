"""Two UNets in series: what stands at the seam, who learns, and that diffusers can save, open and run them."""

import copy

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig

from fastdistill.models import load_pipeline
from fastdistill.models.architectures import build_networks, find_architecture, unet_inputs
from fastdistill.models.stacked import SEAM, StackedUNet
from fastdistill.nn import FusedAttnProcessor, patch, unpatch

TINY = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
}
CONVOLUTIONS = ("first.conv_out", "second.conv_in")


@pytest.fixture
def unet():
    model = UNet2DConditionModel(**TINY).double().eval()
    # A new network's weights are so alike that a swapped norm would not show.
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
    return model


@pytest.fixture
def inputs():
    return torch.randn(2, 4, 8, 6, dtype=torch.float64), torch.tensor([999, 250]), torch.randn(2, 5, 12).double()


def run_by_hand(unet, x, t, text):
    """A UNet without its input convolution and its head: features to features."""
    time = unet.time_embedding(unet.time_proj(t).to(x.dtype))
    skips = [x]
    for block in unet.down_blocks:
        context = {"encoder_hidden_states": text} if hasattr(block, "attentions") else {}
        x, more = block(hidden_states=x, temb=time, **context)
        skips += more
    x = unet.mid_block(x, time, encoder_hidden_states=text)
    for block in unet.up_blocks:
        context = {"encoder_hidden_states": text} if hasattr(block, "attentions") else {}
        last = len(block.resnets)
        x = block(hidden_states=x, temb=time, res_hidden_states_tuple=tuple(skips[-last:]), **context)
        skips = skips[:-last]
    return x


def head(unet, x):
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))


@torch.no_grad()
def test_features_go_straight_through_the_seam_and_are_the_seconds_first_skip(unet, inputs):
    x, t, text = inputs
    features = run_by_hand(unet, unet.conv_in(x), t, text)
    expected = head(unet, run_by_hand(unet, features, t, text))
    torch.testing.assert_close(StackedUNet.from_unet(unet)(x, t, text).sample, expected, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_normalised_features_pass_when_only_the_convolutions_are_removed(unet, inputs):
    x, t, text = inputs
    features = unet.conv_act(unet.conv_norm_out(run_by_hand(unet, unet.conv_in(x), t, text)))
    expected = head(unet, run_by_hand(unet, features, t, text))
    stacked = StackedUNet.from_unet(unet, removed=CONVOLUTIONS)
    torch.testing.assert_close(stacked(x, t, text)[0], expected, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_with_nothing_removed_it_is_the_unet_after_the_unet(unet, inputs):
    x, t, text = inputs
    expected = unet(unet(x, t, text).sample, t, text).sample
    stacked = StackedUNet.from_unet(unet, removed=())
    torch.testing.assert_close(stacked(x, t, text, return_dict=False)[0], expected, rtol=1e-10, atol=1e-12)


def test_both_halves_learn_and_neither_changes_the_unet_that_they_come_from(unet, inputs):
    before = copy.deepcopy(unet.state_dict())
    stacked = StackedUNet.from_unet(unet).train()
    stacked(*inputs).sample.square().mean().backward()
    for name, weight in stacked.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 0, name
    torch.optim.SGD(stacked.parameters(), lr=1.0).step()
    for name, weight in unet.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert not torch.equal(stacked.first.conv_in.weight, unet.conv_in.weight)
    assert not torch.equal(
        stacked.first.mid_block.resnets[0].conv1.weight, stacked.second.mid_block.resnets[0].conv1.weight
    )


def test_gradient_checkpointing_changes_no_gradient(unet, inputs):
    stacked = StackedUNet.from_unet(unet).train()
    stacked(*inputs).sample.square().mean().backward()
    plain = {name: weight.grad.clone() for name, weight in stacked.named_parameters()}
    stacked.zero_grad()
    stacked.enable_gradient_checkpointing()
    assert stacked.first.mid_block.gradient_checkpointing
    assert stacked.second.up_blocks[0].gradient_checkpointing
    stacked(*inputs).sample.square().mean().backward()
    for name, weight in stacked.named_parameters():
        torch.testing.assert_close(weight.grad, plain[name], rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("removed", [SEAM, CONVOLUTIONS, ()])
def test_what_is_saved_opens_again_the_same(unet, inputs, tmp_path, removed):
    stacked = StackedUNet.from_unet(unet, removed=removed)
    stacked.save_pretrained(tmp_path)
    opened, report = StackedUNet.from_pretrained(tmp_path, output_loading_info=True, torch_dtype=torch.float64)
    assert not any(report.values())
    assert opened.config.removed == list(removed)
    assert (opened.config.in_channels, opened.config.sample_size, opened.config.cross_attention_dim) == (4, 8, 12)
    torch.testing.assert_close(opened(*inputs).sample, stacked(*inputs).sample, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_a_pipeline_samples_with_it_and_its_folder_opens_again(tmp_path):
    pipeline = load_pipeline("digits-teacher")
    pipeline.unet = StackedUNet.from_unet(pipeline.unet)
    pipeline.save_pretrained(tmp_path)
    options = {"num_inference_steps": 1, "guidance_scale": 2.0, "output_type": "np"}
    expected = pipeline("a seven", generator=torch.Generator().manual_seed(0), **options).images
    for opened in (load_pipeline(tmp_path), DiffusionPipeline.from_pretrained(tmp_path)):
        assert isinstance(opened.unet, StackedUNet)
        images = opened("a seven", generator=torch.Generator().manual_seed(0), **options).images
        assert abs(images - expected).max() < 1e-5


@torch.no_grad()
def test_the_fused_ops_and_other_attention_processors_fit_into_both_halves(unet, inputs):
    stacked = StackedUNet.from_unet(unet).float()
    inputs = tuple(tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs)
    expected = stacked(*inputs).sample
    report = patch(stacked)
    single = patch(copy.deepcopy(unet))
    head = "GroupNorm + SiLU before the last convolution"
    assert report.changed == {what: count * (1 if what == head else 2) for what, count in single.changed.items()}
    torch.testing.assert_close(stacked(*inputs).sample, expected, rtol=1e-4, atol=1e-4)
    unpatch(stacked)
    stacked.set_attn_processor(FusedAttnProcessor())
    assert len(stacked.attn_processors) == 2 * len(unet.attn_processors)
    assert all(isinstance(processor, FusedAttnProcessor) for processor in stacked.attn_processors.values())
    torch.testing.assert_close(stacked(*inputs).sample, expected, rtol=1e-4, atol=1e-4)


def test_adapters_can_be_added_and_alone_be_trained(unet, inputs):
    stacked = StackedUNet.from_unet(unet).requires_grad_(False)
    stacked.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    stacked(*inputs).sample.mean().backward()
    trained = {name for name, weight in stacked.named_parameters() if weight.grad is not None}
    assert {name.partition(".")[0] for name in trained} == {"first", "second"}
    assert all("lora" in name for name in trained)


@pytest.mark.parametrize(("name", "millions"), [("sd15", 1719), ("sdxl", 5135)])
def test_the_published_size_is_reached_without_any_memory(name, millions):
    """InstaFlow-1.7B is this of Stable Diffusion 1.5."""
    with torch.device("meta"):
        unet = build_networks(find_architecture(name), torch.float32, ["unet"])["unet"]
        inputs = unet_inputs(name, batch=1, resolution=64, dtype=torch.float32)
    random_state = torch.get_rng_state()
    stacked = StackedUNet.from_unet(unet)
    assert torch.equal(torch.get_rng_state(), random_state)
    count = sum(weight.numel() for weight in stacked.parameters())
    removed = (unet.conv_norm_out, unet.conv_out, unet.conv_in)
    seam = sum(weight.numel() for module in removed for weight in module.parameters())
    assert count == 2 * sum(weight.numel() for weight in unet.parameters()) - seam
    assert round(count / 1e6) == millions
    assert stacked(**inputs).sample.shape == (1, 4, 8, 8)


def test_dtype_device_and_mode_are_the_unets(unet):
    half = unet.half().train()
    half.conv_norm_out.float()
    stacked = StackedUNet.from_unet(half)
    assert stacked.training
    assert stacked.second.conv_norm_out.weight.dtype == torch.float32
    assert stacked.second.conv_out.weight.dtype == torch.float16
    assert all(weight.requires_grad for weight in stacked.parameters())


@pytest.mark.parametrize(
    ("removed", "changes", "message"),
    [
        (("first.mid_block",), {}, "'first.mid_block' is not at the seam"),
        (("first.conv_out",), {}, "go or stay together"),
        ((*CONVOLUTIONS, "first.conv_act"), {}, "go or stay together"),
        ((), {"in_channels": 9}, "takes 9 channels, first.conv_out gives 4"),
        (SEAM, {"center_input_sample": True}, "center_input_sample=True"),
    ],
)
def test_a_seam_that_cannot_be_is_refused_by_name(removed, changes, message):
    with pytest.raises(ValueError, match=message):
        StackedUNet(removed, **{**TINY, **changes})


def test_an_inpainting_unet_can_be_stacked_through_its_features():
    stacked = StackedUNet(**{**TINY, "in_channels": 9})
    out = stacked(torch.randn(1, 9, 8, 8), 3, torch.randn(1, 5, 12)).sample
    assert out.shape == (1, 4, 8, 8)
    assert stacked.config.in_channels == 9


def test_what_is_no_plain_unet_is_refused_by_name(unet):
    with pytest.raises(TypeError, match=r"Linear; needed a diffusers.UNet2DConditionModel"):
        StackedUNet.from_unet(torch.nn.Linear(2, 2))
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="merge or remove adapters first"):
        StackedUNet.from_unet(unet)


def test_control_residuals_are_refused_by_name(unet, inputs):
    with pytest.raises(ValueError, match="mid_block_additional_residual: two UNets"):
        StackedUNet.from_unet(unet)(*inputs, mid_block_additional_residual=torch.zeros(1))
