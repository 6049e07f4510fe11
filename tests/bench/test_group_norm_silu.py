"""The cases of group_norm_silu are the sites of the real architectures, and its inputs are what they say."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from fastdistill.bench.benchmark import UnknownName
from fastdistill.bench.group_norm_silu import BENCHMARK, eager

CPU = torch.device("cpu")


def sites(model, run):
    """The input shapes of the GroupNorms that a SiLU follows: all but those of attention blocks."""
    shapes = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.GroupNorm) and "attentions" not in name:
            module.register_forward_pre_hook(lambda _, args: shapes.add(tuple(args[0].shape[1:])))
    run(model)
    return shapes


def unet(size, context, **config):
    """One transformer layer per block: the depth changes no convolution."""
    with torch.device("meta"):
        model = UNet2DConditionModel(cross_attention_dim=context, **config)
        extra = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
        arguments = (torch.zeros(1, 4, size, size), torch.zeros(1), torch.zeros(1, 77, context))
        return sites(model, lambda m: m(*arguments, added_cond_kwargs=extra))


def vae():
    channels = (128, 256, 512, 512)
    with torch.device("meta"):
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=channels,
            layers_per_block=2,
        )
        return sites(model, lambda m: m.decode(torch.zeros(1, 4, 64, 64)))


ARCHITECTURES = {
    "sd15": lambda: unet(64, 768, attention_head_dim=8),
    "sdxl": lambda: unet(
        128,
        2048,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    "vae": vae,
}


@pytest.mark.parametrize("suite", ARCHITECTURES)
def test_a_suite_holds_the_sites_of_its_architecture(suite):
    assert {case.shape for case in BENCHMARK.select_cases([suite])} == ARCHITECTURES[suite]()


def test_a_shape_of_two_suites_is_one_case():
    cases = BENCHMARK.select_cases(["unet"])
    assert len({case.shape for case in cases}) == len(cases)
    assert next(case for case in cases if case.name == "320x64x64").suites == ("sd15", "sdxl")


def test_names_select_suites_shapes_and_all_in_the_files_order():
    assert [case.name for case in BENCHMARK.select_cases(["2560x8x8", "1280x8x8"])] == ["1280x8x8", "2560x8x8"]
    assert BENCHMARK.select_cases(None) == BENCHMARK.cases
    with pytest.raises(UnknownName, match=r"'sd3'.*known suites: unet, sd15, sdxl, vae; known shapes: 320x64x64"):
        BENCHMARK.select_cases(["sd3"])


@pytest.mark.parametrize("layout", BENCHMARK.layouts)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_random_in_the_layout_and_dtype_asked_for(layout, dtype):
    case = BENCHMARK.select_cases(["1280x8x8"])[0]
    inputs, others = (BENCHMARK.setup(case, dtype, layout, CPU) for _ in range(2))
    x = inputs.tensors["x"]
    assert x.shape == (1, 1280, 8, 8)
    assert all(t.dtype == dtype for t in (*inputs.tensors.values(), *inputs.grad_outputs.values()))
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert x.is_contiguous(memory_format=memory_format)
    assert inputs.grad_outputs["y"].is_contiguous(memory_format=memory_format)
    assert not torch.equal(x, others.tensors["x"])
    assert x.float().flatten(2).std(dim=2).min() > 0.2


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_a_provider_computes_what_the_baseline_does(name):
    case = BENCHMARK.select_cases(["1280x8x8"])[0]
    inputs = BENCHMARK.setup(case, torch.float32, "contiguous", CPU)
    (provider,) = BENCHMARK.select_providers([name])
    assert provider.missing(inputs) == []
    arguments = {**inputs.tensors, **inputs.constants}
    assert torch.allclose(provider.prepare(inputs)(**arguments), eager(**arguments), atol=1e-5)


def test_a_backend_that_cannot_serve_gives_the_registrys_reason():
    case = BENCHMARK.select_cases(["1280x8x8"])[0]
    (provider,) = BENCHMARK.select_providers(["cuda"])
    reasons = provider.missing(BENCHMARK.setup(case, torch.float32, "contiguous", CPU))
    assert "needs a CUDA tensor, got cpu" in reasons


def test_the_kernels_are_measured_unasked_and_all_on_request():
    assert [provider.name for provider in BENCHMARK.select_providers(None)] == ["cuda", "triton", "cpu"]
    names = [provider.name for provider in BENCHMARK.select_providers(["all"])]
    assert names == ["cuda", "triton", "cpu", "reference", "torch", "torch.other_layout", "torch.compile", "liger"]


@pytest.mark.parametrize("layout", BENCHMARK.layouts)
def test_the_other_layout_has_the_same_values(layout):
    case = BENCHMARK.select_cases(["1280x8x8"])[0]
    inputs = BENCHMARK.setup(case, torch.float32, layout, CPU)
    (provider,) = BENCHMARK.select_providers(["torch.other_layout"])
    adapted = provider.adapt(inputs)
    for mine, theirs in (
        (adapted.tensors["x"], inputs.tensors["x"]),
        (adapted.grad_outputs["y"], inputs.grad_outputs["y"]),
    ):
        assert mine.stride() != theirs.stride()
        assert torch.equal(mine, theirs)


def test_the_cost_counts_each_input_and_result_once():
    case = BENCHMARK.select_cases(["1280x8x8"])[0]
    size, channels = 1280 * 8 * 8, 1280
    forward, backward, full = (BENCHMARK.cost(case, torch.bfloat16, mode) for mode in ("forward", "backward", "full"))
    assert forward.bytes == 2 * (2 * size + 2 * channels)  # x, y; weight, bias
    assert backward.bytes == 2 * (3 * size + 4 * channels)  # grad_y, x, grad_x; weight, bias and their gradients
    assert full.bytes == forward.bytes + backward.bytes
    assert full.flops == forward.flops + backward.flops > size
    assert BENCHMARK.cost(case, torch.float32, "forward").bytes == 2 * forward.bytes
