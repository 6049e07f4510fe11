"""The cases of the transformer block's ops are the sites of the real architectures; their costs and inputs."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from fastdistill.bench import geglu, layer_norm

CPU = torch.device("cpu")
OPS = {"layer_norm": layer_norm, "geglu": geglu}

SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# (latent size, context width, configuration): SD 2.1 has the channels of SD 1.5 and other heads.
ARCHITECTURES = {
    "sd15": [(64, 768, {"attention_head_dim": 8}), (64, 1024, {"attention_head_dim": (5, 10, 20, 20)})],
    "sdxl": [(128, 2048, SDXL)],
}


def sites(size, context, config):
    """Input shapes of every LayerNorm, and output shapes of every GEGLU's linear layer, of one forward pass."""
    found = {"layer_norm": set(), "geglu": set()}
    with torch.device("meta"):
        model = UNet2DConditionModel(cross_attention_dim=context, **config)
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.register_forward_pre_hook(lambda _, args: found["layer_norm"].add(tuple(args[0].shape[1:])))
            if isinstance(module, GEGLU):
                module.proj.register_forward_hook(lambda *call: found["geglu"].add(tuple(call[2].shape[1:])))
        extra = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
        model(torch.zeros(1, 4, size, size), torch.zeros(1), torch.zeros(1, 77, context), added_cond_kwargs=extra)
    return found


@pytest.mark.parametrize("suite", ARCHITECTURES)
def test_a_suite_holds_the_sites_of_its_architectures(suite):
    for architecture in ARCHITECTURES[suite]:
        found = sites(*architecture)
        for op, module in OPS.items():
            assert {case.shape for case in module.BENCHMARK.select_cases([suite])} == found[op]


def test_a_vae_has_no_transformer_blocks():
    assert all("vae" not in module.BENCHMARK.suites for module in OPS.values())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_random_and_have_the_dtype_asked_for(op, dtype):
    benchmark = OPS[op].BENCHMARK
    for case in benchmark.cases:
        if case.shape[0] == 64:
            inputs, others = (benchmark.setup(case, dtype, "contiguous", CPU) for _ in range(2))
            tensors = [*inputs.tensors.values(), *inputs.grad_outputs.values()]
            assert {t.dtype for t in tensors} == {dtype}
            assert inputs.tensors["x"].shape == (1, *case.shape)
            assert inputs.tensors["x"].float().std() > 0.5
            assert not torch.equal(inputs.tensors["x"], others.tensors["x"])


@pytest.mark.parametrize("op", OPS)
def test_the_reference_computes_what_the_baseline_does(op):
    benchmark = OPS[op].BENCHMARK
    reference, torchs = benchmark.select_providers(["reference", "torch"])
    for case in benchmark.cases:
        if case.shape[0] == 64:
            inputs = benchmark.setup(case, torch.float32, "contiguous", CPU)
            arguments = {**inputs.tensors, **inputs.constants}
            ours, theirs = (each.prepare(inputs)(**arguments) for each in (reference, torchs))
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
            outputs = ours if isinstance(ours, tuple) else (ours,)
            assert [t.shape for t in outputs] == [t.shape for t in inputs.grad_outputs.values()]


def bytes_of(op, name, mode, dtype=torch.bfloat16):
    (case,) = OPS[op].BENCHMARK.select_cases([name])
    return OPS[op].BENCHMARK.cost(case, dtype, mode).bytes


def test_layer_norm_moves_its_tensors_once():
    size, channels = 256 * 1280, 1280
    assert bytes_of("layer_norm", "256x1280", "forward") == 2 * (2 * size + 2 * channels)
    assert bytes_of("layer_norm", "256x1280", "backward") == 2 * (3 * size + 3 * channels)


def test_a_residual_adds_its_own_read_and_the_sums_write_and_one_read_backward():
    size = 256 * 1280
    for mode, more in (("forward", 2), ("backward", 1), ("full", 3)):
        added = bytes_of("layer_norm", "256x1280+residual", mode) - bytes_of("layer_norm", "256x1280", mode)
        assert added == 2 * more * size


def test_geglu_reads_two_halves_and_writes_one():
    half = 256 * 5120
    assert bytes_of("geglu", "256x10240", "forward", torch.float32) == 4 * 3 * half
    assert bytes_of("geglu", "256x10240", "backward", torch.float32) == 4 * 5 * half
