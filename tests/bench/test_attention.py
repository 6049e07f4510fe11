"""The cases of attention are the sites of the real architectures; costs, inputs, the exact result, named kernels."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from fastdistill.bench import attention
from fastdistill.bench.attention import BENCHMARK
from fastdistill.bench.benchmark import Case
from fastdistill.bench.modes import MODES
from fastdistill.bench.runner import Selection, run
from transformers import ViTConfig, ViTModel

from tests.bench.test_sites import SDXL

CPU = torch.device("cpu")
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def unet(latent, context, **config):
    model = UNet2DConditionModel(cross_attention_dim=context, **config)
    extra = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
    text = torch.zeros(1, 77, context)
    return lambda: model(torch.zeros(1, 4, latent, latent), torch.zeros(1), text, added_cond_kwargs=extra)


def vae(latent):
    model = AutoencoderKL(**VAE)
    return lambda: model.decode(torch.zeros(1, 4, latent, latent))


def vit(patch):
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_hidden_layers": 2}
    config = ViTConfig(patch_size=patch, attn_implementation="sdpa", **sizes)
    model = ViTModel(config, add_pooling_layer=False)
    return lambda: model(torch.zeros(1, 3, 224, 224))


ARCHITECTURES = {
    "sd15": [lambda: unet(64, 768, attention_head_dim=8)],
    "sd21": [lambda: unet(64, 1024, attention_head_dim=(5, 10, 20, 20))],
    "sdxl512": [lambda: unet(64, 2048, **SDXL)],
    "sdxl1024": [lambda: unet(128, 2048, **SDXL)],
    "vae": [lambda: vae(64), lambda: vae(128)],
    "vit": [lambda: vit(16), lambda: vit(14)],
}


@pytest.mark.parametrize("suite", ARCHITECTURES)
def test_a_suite_holds_the_sites_of_its_architectures(suite, monkeypatch):
    found = set()

    def recorded(q, k, v, *args, **kwargs):
        found.add((q.shape[1], q.shape[2], k.shape[2], q.shape[3]))
        return torch.empty_like(q)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    with torch.device("meta"):
        for architecture in ARCHITECTURES[suite]:
            architecture()()
    assert {case.shape for case in BENCHMARK.cases if suite in case.suites} == found


def test_every_suite_is_held_against_an_architecture():
    assert set(BENCHMARK.suites) == set(ARCHITECTURES)


@pytest.mark.parametrize("limit", [1 << 24, 40, 7], ids=["at once", "head by head", "query by query"])
def test_the_exact_result_comes_in_pieces_of_any_size(limit, monkeypatch):
    monkeypatch.setattr(attention, "_EXACT_WEIGHTS", limit)
    inputs = BENCHMARK.setup(Case((3, 6, 5, 8), ()), torch.float64, "tokens", CPU)
    found = MODES["full"](BENCHMARK.baseline.prepare(inputs), inputs).tensors()
    plain = MODES["full"](_plain, inputs).tensors()
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], tensor)


def _plain(q, k, v):
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v


def test_no_piece_of_the_exact_result_exceeds_its_limit(monkeypatch):
    monkeypatch.setattr(attention, "_EXACT_WEIGHTS", 64)
    sizes = []
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, dim: sizes.append(x.numel()) or softmax(x, dim))
    inputs = BENCHMARK.setup(Case((3, 50, 11, 8), ()), torch.float64, "tokens", CPU)
    MODES["full"](BENCHMARK.baseline.prepare(inputs), inputs).tensors()
    assert max(sizes) <= 64
    assert sum(sizes) == 2 * 3 * 50 * 11  # once forward, once more backward


def cost_of(name, mode, dtype=torch.bfloat16):
    (case,) = BENCHMARK.select_cases([name])
    return BENCHMARK.cost(case, dtype, mode)


def test_two_products_forward_and_five_backward_are_counted():
    product = 2 * 8 * 1024 * 77 * 80
    assert [cost_of("8x1024x77x80", mode).flops for mode in ("forward", "backward", "full")] == [
        2 * product,
        5 * product,
        7 * product,
    ]


def test_tensors_are_moved_once():
    queries, keys, rows = 8 * 1024 * 80, 8 * 77 * 80, 8 * 1024
    assert cost_of("8x1024x77x80", "forward").bytes == 2 * (2 * queries + 2 * keys)
    assert cost_of("8x1024x77x80", "backward").bytes == 2 * (4 * queries + 4 * keys) + 4 * rows
    assert cost_of("8x1024x77x80", "full").bytes == 2 * (6 * queries + 6 * keys) + 2 * 4 * rows
    assert cost_of("8x1024x77x80", "forward", torch.float32).bytes == 4 * (2 * queries + 2 * keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_random_and_lie_as_projections_write_them(dtype):
    (case,) = BENCHMARK.select_cases(["8x64x77x160"])
    inputs, others = (BENCHMARK.setup(case, dtype, "tokens", CPU) for _ in range(2))
    assert {name: tuple(t.shape) for name, t in inputs.tensors.items()} == {
        "q": (1, 8, 64, 160),
        "k": (1, 8, 77, 160),
        "v": (1, 8, 77, 160),
    }
    for t in (*inputs.tensors.values(), *inputs.grad_outputs.values()):
        assert t.dtype == dtype
        assert t.transpose(1, 2).is_contiguous()
    assert not torch.equal(inputs.tensors["q"], others.tensors["q"])


def test_rows_name_the_kernel_that_ran():
    case = Case((2, 12, 9, 40), ("tiny",))
    chosen = BENCHMARK.select_providers(["sdpa", "sdpa:math", "sdpa:cudnn", "reference"])
    selection = Selection(BENCHMARK, (case,), chosen, ("full",), ("float32", "bfloat16"), ("tokens",), pairs=2)
    rows = {(row.key.dtype, row.key.provider): row for row in run(selection)}
    for dtype in ("float32", "bfloat16"):
        assert rows[dtype, "sdpa"].note == f"torch's flash kernel for CPUs, torch {torch.__version__}"
        assert rows[dtype, "sdpa:math"].note.startswith("torch's math kernel for CPUs")
        assert rows[dtype, "sdpa:cudnn"].missing == "needs a CUDA tensor, got cpu"
        assert rows[dtype, "reference"].note == ""
        assert {rows[dtype, name].status for name in ("sdpa", "sdpa:math", "reference")} == {"ok"}
