"""The feature network of ADD's discriminator, against the hidden states that transformers gives."""

import sys
import types

import pytest
import torch
from fastdistill.training.features import EMBEDDING, Features, build_features, spread
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from fastdistill.models import bundled_networks

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
}
MEAN, STD = (0.5, 0.25, 0.5), (0.25, 0.5, 0.5)
FAMILIES = {
    "ViT": (lambda: ViTModel(ViTConfig(**SMALL), add_pooling_layer=False), 1),
    "DINOv2": (lambda: Dinov2Model(Dinov2Config(**SMALL)), 1),
    "DINOv2 with registers": (lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL)), 5),
    "DINOv3": (lambda: DINOv3ViTModel(DINOv3ViTConfig(**SMALL, num_register_tokens=2)), 3),
    "CLIP": (lambda: CLIPVisionModel(CLIPVisionConfig(**SMALL)), 1),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def network(family, dtype=torch.float64):
    """Random, positions and tokens too, which some families start at zero; and how many tokens stand in front."""
    build, prefix = FAMILIES[family]
    vit = build().to(dtype)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vit, prefix


def expected(vit, prefix, images):
    """Straight from transformers: hidden states, readout added, and the normed class token."""
    pixels = ((images + 1) / 2 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    output = vit(pixel_values=pixels, output_hidden_states=True)
    tokens = [(state[:, prefix:] + state[:, :1]).transpose(1, 2) for state in output.hidden_states]
    clip = isinstance(vit, CLIPVisionModel)
    return tokens, output.pooler_output if clip else output.last_hidden_state[:, 0]


@every_family
def test_tokens_are_the_hidden_states_with_the_class_token_added(family):
    vit, prefix = network(family)
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    features = build_features(vit, layers=(EMBEDDING, 0, 2), mean=MEAN, std=STD)
    tokens, embedding = features(images)
    states, wanted = expected(vit.eval(), prefix, images)
    for layer, found in zip((EMBEDDING, 0, 2), tokens):
        assert found.shape == (2, 16, 16)
        torch.testing.assert_close(found, states[layer + 1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(embedding, wanted, rtol=1e-9, atol=1e-9)
    assert features.widths == (16, 16, 16)
    assert features.width == 16


@every_family
def test_gradients_reach_the_images_as_through_transformers_itself_and_nothing_else(family):
    vit, prefix = network(family)
    features = build_features(vit, mean=MEAN, std=STD).train()
    images = (torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1).requires_grad_()
    tokens, embedding = features(images)
    weights = [torch.randn_like(t) for t in (*tokens, embedding)]
    found = torch.autograd.grad(sum((w * t).sum() for w, t in zip(weights, (*tokens, embedding))), images)[0]
    states, wanted = expected(vit, prefix, images)
    outputs = (*(states[layer + 1] for layer in features.layers), wanted)
    exact = torch.autograd.grad(sum((w * t).sum() for w, t in zip(weights, outputs)), images)[0]
    assert found.abs().max() > 1e-3
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-10)
    assert not any(parameter.requires_grad for parameter in features.parameters())


def test_nothing_in_it_changes_and_it_stays_in_evaluation_mode():
    vit = ViTModel(ViTConfig(**SMALL, hidden_dropout_prob=0.5), add_pooling_layer=False)
    features = build_features(vit, mean=MEAN, std=STD).train()
    assert not any(module.training for module in features.modules())
    before = {name: value.clone() for name, value in features.state_dict().items()}
    images = torch.rand(2, 3, 16, 16)
    first, again = features(images), features(images)
    assert torch.equal(first.embedding, again.embedding)
    assert all(torch.equal(a, b) for a, b in zip(first.tokens, again.tokens))
    assert all(torch.equal(value, before[name]) for name, value in features.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in vit.modules())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_no_block_is_computed_again_in_the_backward_pass():
    vit = ViTModel(ViTConfig(**SMALL), add_pooling_layer=False)
    vit.train().gradient_checkpointing_enable()
    features = build_features(vit, mean=MEAN, std=STD).train()
    calls = []
    vit.get_submodule("layers.1").register_forward_pre_hook(lambda *_: calls.append(1))
    features(torch.rand(2, 3, 16, 16, requires_grad=True)).embedding.sum().backward()
    assert len(calls) == 1


def test_layers_spread_over_the_depth_as_in_the_paper():
    assert spread(12) == (EMBEDDING, 2, 5, 8, 11)
    assert spread(6) == (EMBEDDING, 0, 2, 3, 5)
    assert spread(2) == (EMBEDDING, 0, 1)


def test_other_sizes_are_resized_to_the_networks_and_a_constant_stays_one():
    features = build_features(network("ViT", torch.float32)[0], mean=MEAN, std=STD)
    for side in (8, 40):
        image = torch.tensor([0.5, -0.5, 1.0]).view(1, 3, 1, 1).expand(2, 3, side, side)
        small = torch.tensor([0.5, -0.5, 1.0]).view(1, 3, 1, 1).expand(2, 3, 16, 16)
        torch.testing.assert_close(features.pixels(image), features.pixels(small))
    ramp = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32)
    shown = features.pixels(ramp)[0, 0, 8]
    assert torch.all(shown.diff() > 0)


def test_a_size_of_its_own_interpolates_the_positions():
    vit, prefix = network("ViT")
    images = torch.rand(2, 3, 24, 24, dtype=torch.float64) * 2 - 1
    tokens, _ = build_features(vit, layers=(2,), size=24, mean=MEAN, std=STD)(images)
    pixels = ((images + 1) / 2 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    state = vit(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[3]
    assert tokens[0].shape == (2, 16, 36)
    torch.testing.assert_close(tokens[0], (state[:, prefix:] + state[:, :1]).transpose(1, 2))


def test_statistics_and_size_of_the_image_processor_beside_the_weights_are_used(tmp_path):
    vit, _ = network("DINOv2", torch.float32)
    vit.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mean: no image processor"):
        build_features(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.25, 0.5], "image_std": [0.25, 0.5, 0.5], "do_center_crop": true,'
        ' "size": {"shortest_edge": 20}, "crop_size": {"height": 12, "width": 12}}'
    )
    features = build_features(tmp_path)
    assert features.size == 12
    images = torch.rand(2, 3, 12, 12) * 2 - 1
    given = build_features(vit, size=12, mean=MEAN, std=STD)
    torch.testing.assert_close(features(images).embedding, given(images).embedding)


def test_a_head_and_the_other_half_of_clip_are_left_aside(tmp_path):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    classifier = ViTForImageClassification(ViTConfig(**SMALL))
    found = build_features(classifier, mean=MEAN, std=STD)(images)
    torch.testing.assert_close(found.embedding, build_features(classifier.vit, mean=MEAN, std=STD)(images).embedding)

    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=SMALL, projection_dim=8)).eval()
    clip.save_pretrained(tmp_path)
    for features in (build_features(source, mean=MEAN, std=STD) for source in (tmp_path, clip)):
        tokens, embedding = expected_of(clip.vision_model, features, images)
        found = features(images)
        torch.testing.assert_close(found.tokens[-1], tokens)
        torch.testing.assert_close(found.embedding, embedding)


def expected_of(vision, features, images):
    output = vision(pixel_values=features.pixels(images), output_hidden_states=True)
    state = output.hidden_states[-1]
    return (state[:, 1:] + state[:, :1]).transpose(1, 2), output.pooler_output


def test_the_bundled_network_sees_digits_as_plain_transformers_does():
    from transformers import AutoModel

    from fastdistill.models.digits.data import load_digits

    images = load_digits().images[:4].expand(-1, 3, -1, -1)
    features = build_features("digits-vit")
    tokens, embedding = features(images)
    plain = AutoModel.from_pretrained(bundled_networks()["digits-vit"])
    output = plain(pixel_values=images, output_hidden_states=True)
    assert [t.shape for t in tokens] == [(4, 64, 64)] * 5
    torch.testing.assert_close(embedding, output.last_hidden_state[:, 0])
    torch.testing.assert_close(tokens[-1], (output.hidden_states[-1][:, 1:] + output.hidden_states[-1][:, :1]).mT)


def test_a_user_may_give_a_module_that_already_makes_features():
    class Own(nn.Module):
        widths, width = (3,), 3

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, images):
            scaled = images.flatten(2) * self.scale[:, None]
            return Features((scaled,), scaled.mean(dim=2))

    features = build_features(Own())
    assert not features.training
    assert not features.scale.requires_grad
    assert features(torch.ones(2, 3, 4, 4)).tokens[0].shape == (2, 3, 16)
    with pytest.raises(ValueError, match="size: not for a module"):
        build_features(Own(), size=8)


class FakeTimm(nn.Module):
    """What is used of timm's VisionTransformer: blocks, prefix tokens, features, and the facts of its weights."""

    num_prefix_tokens, num_features = 2, 8

    def __init__(self):
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, 8, 8), "mean": MEAN, "std": STD}
        self.patch_embed = nn.Conv2d(3, 8, 4, 4)
        self.prefix = nn.Parameter(torch.randn(1, 2, 8))
        self.blocks = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.norm = nn.LayerNorm(8)

    def forward_features(self, x):
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        return self.norm(self.blocks(torch.cat([self.prefix.expand(len(x), -1, -1), patches], dim=1)))


def test_a_network_of_timm_is_read_through_its_blocks(monkeypatch):
    vit, asked = FakeTimm(), []
    timm = types.ModuleType("timm")
    timm.create_model = lambda name, pretrained: asked.append((name, pretrained)) or vit
    monkeypatch.setitem(sys.modules, "timm", timm)
    features = build_features("timm:vit_small_patch16_224.dino", layers=(EMBEDDING, 1))
    assert asked == [("vit_small_patch16_224.dino", True)]
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    tokens, embedding = features(images)
    patches = vit.patch_embed(features.pixels(images)).flatten(2)
    start = vit.prefix[:, 0].expand(2, -1)
    torch.testing.assert_close(tokens[0], patches + start[..., None])
    after = vit.blocks(torch.cat([start[:, None], patches.transpose(1, 2)], dim=1))
    torch.testing.assert_close(tokens[1], (after[:, 1:] + after[:, :1]).transpose(1, 2))
    torch.testing.assert_close(embedding, vit.norm(after[:, 0]))


def test_a_missing_timm_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r'"timm:x" needs timm.*fastdistill\[features\]'):
        build_features("timm:x")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_features(network("ViT")[0], mean=MEAN), "std: no image processor"),
        (lambda: build_features(network("ViT")[0], layers=(3,), mean=MEAN, std=STD), r"layers: \[3\].* -1 to 2"),
        (lambda: build_features(network("ViT")[0], layers=(0, 0), mean=MEAN, std=STD), "different numbers"),
        (lambda: build_features(network("ViT")[0], mean=(0.5,), std=STD), "mean: .*three numbers"),
        (lambda: build_features(nn.Linear(2, 2)), "a Linear; needed a vision transformer"),
        (lambda: build_features(SiglipVisionModel(SiglipVisionConfig(**SMALL))), "no class token"),
        (lambda: build_features("no-such-folder/at-all/here"), "no-such-folder"),
        (lambda: build_features("digits-vit")(torch.zeros(2, 1, 32, 32)), r"images: \(2, 1, 32, 32\)"),
    ],
)
def test_bad_input_is_named_with_what_is_needed(call, message):
    with pytest.raises(ValueError, match=message):
        call()
