"""Architectures without weights: the published sizes, small ones of the same structure, and those of folders."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdistill.models import ModelError, build, bundled_models, resolve_architecture
from fastdistill.models.architectures import ARCHITECTURES, build_networks, find_architecture, unet_inputs

FAMILIES = ("sd15", "sd21", "sdxl")

CLIP_L, OPEN_CLIP_H, OPEN_CLIP_BIG_G = 123_060_480, 340_387_840, 694_659_840
SD15 = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": CLIP_L}
SD21 = {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": OPEN_CLIP_H}
SDXL = {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": CLIP_L, "text_encoder_2": OPEN_CLIP_BIG_G}


def networks_of(name, dtype=torch.float32):
    with torch.device("meta"):
        return build_networks(find_architecture(name), dtype)


def sizes(networks):
    return {name: sum(weight.numel() for weight in network.parameters()) for name, network in networks.items()}


@pytest.mark.parametrize(("name", "counts"), [("sd15", SD15), ("sd21", SD21), ("sdxl", SDXL)])
def test_under_fake_tensors_the_networks_have_the_published_numbers_of_parameters(name, counts):
    with FakeTensorMode():
        networks = build_networks(find_architecture(name), torch.bfloat16)
    assert sizes(networks) == counts
    assert {weight.dtype for network in networks.values() for weight in network.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "resolution", "predicts", "text", "pooled"),
    [
        ("sd15", 512, "epsilon", (77, 768), None),
        ("sd21", 512, "epsilon", (77, 1024), None),
        ("sdxl", 1024, "epsilon", (77, 2048), 1280),
        ("sd-turbo", 512, "epsilon", (77, 1024), None),
        ("sdxl-turbo", 512, "epsilon", (77, 2048), 1280),
        ("sd15-tiny", 64, "epsilon", (77, 24), None),
        ("sdxl-tiny", 128, "epsilon", (77, 64), 40),
        ("digits-teacher", 32, "v_prediction", (24, 64), None),
    ],
)
def test_the_sizes_that_training_needs_follow_from_the_configuration(name, resolution, predicts, text, pooled):
    architecture = resolve_architecture(name)
    assert architecture.resolution == (resolution, resolution)
    assert architecture.prediction_type == predicts
    assert (architecture.text_tokens, architecture.text_width) == text
    assert architecture.pooled_width == pooled
    assert architecture.is_sdxl == (pooled is not None)


@pytest.mark.parametrize(("turbo", "base"), [("sd-turbo", "sd21"), ("sdxl-turbo", "sdxl")])
def test_turbo_models_are_their_bases_at_512_pixels(turbo, base):
    turbo, base = find_architecture(turbo), find_architecture(base)
    unet = replace(base.networks["unet"], config={**base.networks["unet"].config, "sample_size": 64})
    assert turbo.networks == {**base.networks, "unet": unet}
    assert turbo.tokenizers == base.tokenizers


@pytest.mark.parametrize("name", [f"{family}-tiny" for family in FAMILIES])
def test_the_inputs_of_a_unet_fit_it(name):
    with torch.device("meta"):
        unet = build_networks(find_architecture(name), torch.float32, ["unet"])["unet"]
        inputs = unet_inputs(name, batch=2, resolution=64, dtype=torch.float32)
        with torch.no_grad():
            assert unet(**inputs).sample.shape == inputs["sample"].shape == (2, 4, 8, 8)


def structure(network):
    """What each layer is and does, widths left out; of layers in a stack the first stands for all."""
    layers = {}
    for name, module in network.named_modules():
        facts = [type(module).__name__]
        facts += [getattr(module, key, None) for key in ("kernel_size", "stride", "padding", "eps")]
        facts += [getattr(module, "bias", None) is None]
        layers.setdefault(re.sub(r"(transformer_blocks|encoder\.layers)\.\d+", r"\1.*", name), facts)
    return layers


@pytest.mark.parametrize("name", FAMILIES)
def test_a_small_one_has_every_layer_of_the_large_one(name):
    large, small = networks_of(name), networks_of(f"{name}-tiny")
    for part in large:
        assert structure(small[part]) == structure(large[part]), part
    # The one number of SD 1.5's configuration is that of the heads on every level.
    for heads in ([block.attn1.heads for block in blocks_of(each["unet"])] for each in (large, small)):
        assert (len(set(heads)) == 1) == (name == "sd15")


def blocks_of(unet):
    return [module for module in unet.modules() if type(module).__name__ == "BasicTransformerBlock"]


def test_the_depths_of_a_small_sdxl_differ_by_level():
    unet = networks_of("sdxl-tiny")["unet"]
    depths = [len(block.attentions[0].transformer_blocks) for block in (*unet.down_blocks[1:], unet.mid_block)]
    assert depths == [2, 3, 3]
    assert not hasattr(unet.down_blocks[0], "attentions")


def test_building_draws_nothing_and_leaves_torchs_defaults():
    before = torch.get_rng_state()
    build_networks(find_architecture("sdxl-tiny"), torch.float16)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("name", "first"), [("sd2.1", "sd21"), ("SDXL", "sdxl"), ("sdxlturbo", "sdxl-turbo"), ("sd15_tiny", "sd15-tiny")]
)
def test_an_unknown_name_is_answered_with_the_nearest_first(name, first):
    with pytest.raises(ModelError, match=f"unknown architecture '{name}'; known: {first}, ") as caught:
        find_architecture(name)
    assert all(known in str(caught.value) for known in ARCHITECTURES)
    with pytest.raises(ModelError, match=f"no folder, no bundled model, nor one of {first}, "):
        resolve_architecture(name)


@pytest.fixture
def folder(tmp_path):
    """A folder with the configurations of a small SDXL, and no weights."""
    pipeline = build("sdxl-tiny", device="meta")
    pipeline.save_config(tmp_path)
    for name, part in pipeline.components.items():
        if hasattr(part, "save_config"):
            part.save_config(tmp_path / name)
        elif hasattr(part, "config"):
            part.config.save_pretrained(tmp_path / name)
    assert not list(tmp_path.rglob("*.safetensors"))
    return tmp_path


def test_a_folder_needs_no_weights(folder):
    read, named = resolve_architecture(folder), find_architecture("sdxl-tiny")
    with torch.device("meta"):
        assert sizes(build_networks(read, torch.float32)) == sizes(networks_of("sdxl-tiny"))
    for fact in ("pipeline", "prediction_type", "sample_shape", "resolution", "text_tokens", "text_width"):
        assert getattr(read, fact) == getattr(named, fact), fact
    assert read.pooled_width == 40
    assert read.name == folder.name


def edit(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


def drop_index_entry(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "vae"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), "no model_index.json in this folder"),
        (drop_index_entry, "model_index.json lists no vae"),
        (lambda f: shutil.rmtree(f / "unet"), "unet/config.json: missing; model_index.json lists unet"),
        (lambda f: (f / "vae/config.json").write_text("{"), "vae/config.json: unreadable JSON"),
        (lambda f: (f / "vae/config.json").write_text("[1]"), "vae/config.json: needed a JSON object"),
        (
            lambda f: edit(f / "model_index.json", unet=["diffusers", "UNet1DModel"]),
            "unet is a UNet1DModel; needed UNet2D",
        ),
        (
            lambda f: edit(f / "model_index.json", scheduler=["mine", "Odd"]),
            "scheduler is a Odd of mine; needed one of",
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_in_a_line(folder, damage, message):
    damage(folder)
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        resolve_architecture(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("unet", {"down_block_types": ["NoSuchBlock"] * 3}),
        ("unet", {"block_out_channels": [16, 32]}),
        ("text_encoder", {"hidden_size": 25}),
    ],
)
def test_settings_that_make_no_network_name_folder_and_part(folder, part, changes):
    edit(folder / part / "config.json", **changes)
    with pytest.raises(ModelError, match=f"{folder.name}: {part} cannot be built: ") as caught:
        build_networks(resolve_architecture(folder), torch.float32)
    assert "\n" not in str(caught.value)
    assert torch.get_default_dtype() == torch.float32


def test_a_unet_without_a_size_says_so_when_it_is_asked(folder):
    edit(folder / "unet" / "config.json", sample_size=None)
    with pytest.raises(ModelError, match="the UNet's configuration has no sample_size"):
        resolve_architecture(folder).resolution  # noqa: B018


@pytest.mark.parametrize("name", bundled_models())
def test_bundled_models_are_architectures_too(name):
    assert set(sizes(build_networks(resolve_architecture(name), torch.float32))) == {"unet", "vae", "text_encoder"}
