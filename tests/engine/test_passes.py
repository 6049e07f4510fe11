"""Each pass is exact: in float64, on real diffusers networks with random weights, nothing changes but the way there."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

from fastdistill.engine import PASSES
from fastdistill.engine.components import take_apart
from fastdistill.engine.images import decode
from fastdistill.engine.passes import apply_passes, check_switches, fused_group_norm_silu
from fastdistill.engine.passes.fold_timestep import fold
from fastdistill.engine.unet import time_embedding, unet_forward

from .conftest import TEXT_WIDTH, build_unet, build_vae

EXACT = 1e-10  # relative, in float64
NETWORK_PASSES = ("fused_group_norm_silu", "fold_timestep", "direct_attention", "channels_last")
EVERY_PASS = (*NETWORK_PASSES, "cross_attention_cache")
UNETS = {
    "like SD 1.5": {},
    "like SD 2.1": {"use_linear_projection": True, "upcast_attention": True, "attention_head_dim": (4, 8)},
    "without attention outside the middle": {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    },
}


def parts_of(make_pipeline, passes=(), **networks):
    """Components in float64, the named passes applied, and the reports."""
    networks = {name: network.double() for name, network in networks.items()}
    parts = take_apart(make_pipeline(**networks), own=True).to(torch.device("cpu"), torch.float64)
    return parts, apply_passes(parts, check_switches(passes))


def predict(parts, x, timestep, context):
    if parts.folded_blocks is not None:
        time = fold(parts.unet, parts.folded_blocks, timestep)
    else:
        time = time_embedding(parts.unet, timestep, len(x), x.dtype)
    if parts.context is not None:
        context = parts.context(context.split(1))
    return unet_forward(parts.unet, x, time, context)


def relative_error(actual, exact):
    return ((actual - exact).abs().max() / exact.abs().max()).item()


def unet_inputs(batch=2, height=8, width=8):
    x = torch.randn(batch, 4, height, width, dtype=torch.float64)
    return x, torch.randn(batch, 7, TEXT_WIDTH, dtype=torch.float64)


CACHED = ("direct_attention", "cross_attention_cache")


@pytest.mark.parametrize("passes", [(), *((name,) for name in NETWORK_PASSES), CACHED, EVERY_PASS], ids="+".join)
@pytest.mark.parametrize("architecture", UNETS)
@torch.no_grad()
def test_the_unet_computes_the_same_with_each_pass_and_with_all(make_pipeline, architecture, passes):
    unet = build_unet(**UNETS[architecture]).double()
    parts, _ = parts_of(make_pipeline, passes, unet=copy.deepcopy(unet))
    x, context = unet_inputs()
    for timestep in (torch.tensor(999), torch.tensor(249), torch.tensor(333.25)):
        exact = unet(x, timestep, context).sample
        assert relative_error(predict(parts, x, timestep, context), exact) < EXACT


@pytest.mark.parametrize("passes", [(), EVERY_PASS], ids="+".join)
@pytest.mark.parametrize(("height", "width"), [(7, 9), (6, 4), (5, 8)])
@torch.no_grad()
def test_latents_that_do_not_halve_evenly_are_upsampled_to_the_size_of_their_skip(make_pipeline, height, width, passes):
    unet = build_unet().double()
    parts, _ = parts_of(make_pipeline, passes, unet=copy.deepcopy(unet))
    x, context = unet_inputs(1, height, width)
    exact = unet(x, torch.tensor(500), context).sample
    assert relative_error(predict(parts, x, torch.tensor(500), context), exact) < EXACT


@pytest.mark.parametrize("passes", [(), *((name,) for name in NETWORK_PASSES), NETWORK_PASSES], ids="+".join)
@torch.no_grad()
def test_the_vae_decodes_the_same_with_each_pass_and_with_all(make_pipeline, passes):
    vae = build_vae().double()
    parts, _ = parts_of(make_pipeline, passes, vae=copy.deepcopy(vae))
    latents = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    exact = (vae.decode(latents).sample * 0.5 + 0.5).clamp(0, 1)
    assert ((exact > 0) & (exact < 1)).double().mean() > 0.2  # not all of it is clamped away
    assert (decode(parts, latents) - exact).abs().max() < EXACT


@pytest.mark.parametrize(
    "parameter",
    [
        "resnets.0.conv1.bias",
        "resnets.0.time_emb_proj.weight",
        "resnets.0.norm2.weight",
        "resnets.0.norm1.bias",
        "attentions.0.transformer_blocks.0.attn2.to_v.weight",
    ],
)
@torch.no_grad()
def test_the_comparison_sees_one_wrong_number(make_pipeline, parameter):
    unet = build_unet().double()
    parts, _ = parts_of(make_pipeline, EVERY_PASS, unet=copy.deepcopy(unet))
    unet.mid_block.get_parameter(parameter).view(-1)[0] += 0.1
    x, context = unet_inputs()
    exact = unet(x, torch.tensor(999), context).sample
    assert relative_error(predict(parts, x, torch.tensor(999), context), exact) > 1e3 * EXACT


@torch.no_grad()
def test_without_folding_the_time_embedding_is_added_inside_the_fused_norm(make_pipeline):
    parts, _ = parts_of(make_pipeline, ["fused_group_norm_silu"])
    seen = []
    for module in parts.unet.modules():
        if type(module).__name__ == "BoundGroupNormSiLU":
            module.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs) > 1 and inputs[1] is not None))
    x, context = unet_inputs()
    predict(parts, x, torch.tensor(999), context)
    assert sum(seen) == sum(type(module).__name__ == "ResidualBlock" for module in parts.unet.modules())


@torch.no_grad()
def test_channels_last_reaches_every_convolution_and_the_output(make_pipeline):
    parts, _ = parts_of(make_pipeline, ["channels_last", "direct_attention"])
    layouts = []
    for module in (*parts.unet.modules(), *parts.decoder.modules()):
        if isinstance(module, torch.nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
            module.register_forward_hook(
                lambda *call: layouts.append(call[-1].is_contiguous(memory_format=torch.channels_last))
            )
    x, context = unet_inputs()
    predict(parts, x, torch.tensor(999), context)
    decode(parts, x)
    assert len(layouts) > 30
    assert all(layouts)


def test_stable_diffusion_has_61_norms_of_which_45_are_followed_by_silu():
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    norms = [module for module in unet.modules() if type(module) is torch.nn.GroupNorm]

    class Parts:
        networks = {"UNet": unet}  # noqa: RUF012

    report = fused_group_norm_silu.apply(Parts)
    assert len(norms) == 61
    assert not report.left
    assert report.changed == {
        "GroupNorm + SiLU of residual blocks in the UNet": 22,
        "time embedding + GroupNorm + SiLU of residual blocks in the UNet": 22,
        "GroupNorm + SiLU before the last convolution of the UNet": 1,
        "GroupNorm before attention in the UNet": 16,
    }
    assert not [module for module in unet.modules() if type(module) is torch.nn.GroupNorm]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"resnet_time_scale_shift": "scale_shift"}, "time_embedding_norm='scale_shift'"),
        ({"act_fn": "gelu"}, "its activation is GELU, not SiLU"),
    ],
)
@torch.no_grad()
def test_what_a_pass_cannot_do_is_left_as_it_is_and_reported(make_pipeline, change, reason):
    unet = build_unet(**change).double()
    parts, reports = parts_of(make_pipeline, NETWORK_PASSES, unet=copy.deepcopy(unet))
    by_name = {report.name: report for report in reports}
    assert any(reason in left for left in by_name["fused_group_norm_silu"].left)
    assert not by_name["fold_timestep"].applied
    assert reason in str(by_name["fold_timestep"])
    x, context = unet_inputs()
    exact = unet(x, torch.tensor(999), context).sample
    assert relative_error(predict(parts, x, torch.tensor(999), context), exact) < EXACT


@torch.no_grad()
def test_attention_with_another_processor_is_left_as_it_is_and_reported(make_pipeline):
    unet = build_unet().double()
    unet.set_attn_processor(AttnProcessor())
    parts, reports = parts_of(make_pipeline, NETWORK_PASSES, unet=copy.deepcopy(unet))
    assert "its processor is AttnProcessor" in str(reports[list(PASSES).index("direct_attention")])
    x, context = unet_inputs()
    exact = unet(x, torch.tensor(999), context).sample
    assert relative_error(predict(parts, x, torch.tensor(999), context), exact) < EXACT


def test_reports_count_what_was_changed(make_pipeline):
    _, reports = parts_of(make_pipeline, None)
    by_name = {report.name: report for report in reports}
    blocks, transformers = 12, 6  # UNet: 2 x 2 down, 2 in the middle, 2 x 3 up; attention in one of two levels
    assert all(report.applied and not report.left for report in reports)
    assert (
        by_name["fold_timestep"].changed["time projection folded into a convolution's bias, once per timestep"]
        == blocks
    )
    assert by_name["direct_attention"].changed["cross-attention with one product for k, v in the UNet"] == transformers
    cached = by_name["cross_attention_cache"].changed
    assert cached["cross-attention with keys and values from one product for all"] == transformers
    assert by_name["fused_group_norm_silu"].changed["GroupNorm before attention in the VAE decoder"] == 1


def test_every_pass_can_be_switched_by_name():
    assert check_switches(None) == dict.fromkeys(PASSES, True)
    assert check_switches(["fold_scales"]) == {name: name == "fold_scales" for name in PASSES}
    assert check_switches({"fold_scales": False}) == {name: name != "fold_scales" for name in PASSES}


def test_a_pass_that_is_switched_off_says_so_and_changes_nothing(make_pipeline):
    parts, reports = parts_of(make_pipeline, ())
    assert [str(report) for report in reports] == [f"{name}: not applied\n  not: switched off" for name in PASSES]
    assert parts.folded_blocks is None
    assert not parts.fold_scales
    assert parts.prompt_cache == 0
    assert parts.context is None


@pytest.mark.parametrize("passes", [["fold_everything"], {"fold_everything": False}])
def test_an_unknown_pass_lists_the_known_ones(passes):
    with pytest.raises(ValueError, match="'fold_everything'; known: fused_group_norm_silu, fold_timestep"):
        check_switches(passes)


@pytest.mark.parametrize("passes", ["fold_scales", 3, {"fold_scales": 1}])
def test_switches_of_another_kind_are_refused(passes):
    with pytest.raises(ValueError, match="passes"):
        check_switches(passes)
