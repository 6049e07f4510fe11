"""The LPIPS module: the public package's numbers, names and conventions, with random networks in place of VGG16."""

import sys

import pytest
import torch
from fastdistill.training.activations import SavedTensors
from safetensors.torch import save_file
from torch import nn

from fastdistill.losses import LPIPS, lpips_distance
from fastdistill.losses._vgg16 import STAGES, VGG16Features
from fastdistill.losses.lpips import SCALE, SHIFT

CHANNELS = (4, 6)


class Small(nn.Module):
    """Two stages of random features, like VGG16's; the dropout shows whether it was put into eval mode."""

    def __init__(self):
        super().__init__()
        first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        second = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Dropout())
        self.stages = nn.ModuleList([first, second])

    def forward(self, images):
        first = self.stages[0](images)
        return [first, self.stages[1](first)]


@pytest.fixture
def backbone():
    return Small()


def images(batch=2, size=8):
    return 2 * torch.rand(batch, 3, size, size) - 1


def heads(channels=CHANNELS):
    return [torch.rand(1, c, 1, 1) for c in channels]


def public_names(weights):
    return {f"lin{i}.model.1.weight": w for i, w in enumerate(weights)}


def by_hand(network, weights, x, y):
    """The public package, line by line."""
    shift, scale = torch.tensor(SHIFT).view(1, 3, 1, 1), torch.tensor(SCALE).view(1, 3, 1, 1)
    total = 0
    for f, g, w in zip(network((x - shift) / scale), network((y - shift) / scale), weights):
        f = f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10)
        g = g / (g.square().sum(1, keepdim=True).sqrt() + 1e-10)
        total = total + torch.nn.functional.conv2d((f - g) ** 2, w).mean((2, 3)).flatten()
    return total


def test_the_distance_is_the_public_package_s(backbone):
    weights, x, y = heads(), images(), images()
    metric = LPIPS(backbone, weights)
    torch.testing.assert_close(metric(x, y), by_hand(backbone, weights, x, y))
    assert torch.equal(metric(x, x), torch.zeros(2))


def test_images_in_0_to_1_are_brought_to_minus_1_to_1(backbone):
    weights, x, y = heads(), images(), images()
    expected = LPIPS(backbone, weights)(x, y)
    torch.testing.assert_close(LPIPS(backbone, weights, normalize=True)((x + 1) / 2, (y + 1) / 2), expected)


def test_a_backbone_that_scales_its_own_images_gets_them_as_they_are(backbone):
    x, y, weights = images(), images(), heads()
    expected = lpips_distance(backbone.eval()(x), backbone(y), weights)
    assert torch.equal(LPIPS(backbone, weights, scale=False)(x, y), expected)


def test_without_weights_every_channel_counts_1(backbone):
    x, y = images(), images()
    ones = [torch.ones(c) for c in CHANNELS]
    assert torch.equal(LPIPS(backbone)(x, y), LPIPS(backbone, ones)(x, y))


def test_a_function_that_returns_one_tensor_is_a_backbone():
    x, y = images(), images()
    assert LPIPS(lambda image: image * 2)(x, y).shape == (2,)


def test_gradients_reach_the_images_and_nothing_else(backbone):
    metric, x, y = LPIPS(backbone, heads()), images().requires_grad_(), images().requires_grad_()
    metric(x, y).sum().backward()
    assert x.grad.abs().sum() > 0
    assert y.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in metric.parameters())


@pytest.mark.parametrize("side", ["x", "y"])
def test_no_grad_keeps_one_side_out_of_the_graph(backbone, side):
    weights, pair = heads(), {"x": images().requires_grad_(), "y": images().requires_grad_()}
    LPIPS(backbone, weights, no_grad=side)(**pair).sum().backward()
    (other,) = {"x", "y"} - {side}
    assert pair[side].grad is None
    exact = {name: t.detach().requires_grad_() for name, t in pair.items()}
    by_hand(backbone, weights, **exact).sum().backward()
    torch.testing.assert_close(pair[other].grad, exact[other].grad, rtol=1e-4, atol=1e-7)


def test_the_backbone_stays_frozen_in_eval_mode(backbone):
    metric = LPIPS(backbone.train(), heads()).train()
    assert metric.training
    assert not any(module.training for module in backbone.modules())


def test_heads_can_be_trained(backbone):
    metric = LPIPS(backbone, heads())
    for head in metric.heads:
        head.requires_grad_()
    metric(images(), images()).sum().backward()
    assert all(head.grad.shape == head.shape and head.grad.abs().sum() > 0 for head in metric.heads)


def test_checkpointing_gives_the_same_gradient_and_keeps_less(backbone):
    weights, x, y = heads(), images(size=16), images(size=16)
    gradients, kept = [], []
    for checkpoint in (False, True):
        metric, leaf = LPIPS(backbone, weights, checkpoint=checkpoint), x.clone().requires_grad_()
        with SavedTensors([*metric.parameters(), *metric.buffers()]) as saved:
            distance = metric(leaf, y).sum()
        distance.backward()
        gradients.append(leaf.grad)
        kept.append(saved.nbytes)
    assert torch.equal(*gradients)
    assert kept[1] < kept[0]


# ---- weights from outside -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dict", "vectors", "safetensors", "pth", "without dropout"])
def test_heads_come_in_every_public_form(backbone, tmp_path, form):
    weights, x, y = heads(), images(), images()
    state, options = public_names(weights), {}
    if form == "vectors":
        state = [w.flatten() for w in weights]
    elif form == "safetensors":
        save_file(state, tmp_path / "vgg.safetensors")
        state = tmp_path / "vgg.safetensors"
    elif form == "pth":
        torch.save(state, tmp_path / "vgg.pth")
        state, options = str(tmp_path / "vgg.pth"), {"allow_pickle": True}
    elif form == "without dropout":
        state = {name.replace("model.1", "model.0"): w for name, w in state.items()} | {"net.x": torch.ones(1)}
    assert torch.equal(LPIPS(backbone, state, **options)(x, y), LPIPS(backbone, weights)(x, y))


def test_the_state_dict_has_the_public_names_and_loads_public_heads(backbone):
    metric, weights, x, y = LPIPS(backbone, heads()), heads(), images(), images()
    names = [name for name in metric.state_dict() if not name.startswith("backbone.")]
    assert names == list(public_names(weights))
    assert not metric.load_state_dict(public_names(weights), strict=False).unexpected_keys
    torch.testing.assert_close(metric(x, y), by_hand(backbone, weights, x, y))


def vgg_state(spelling):
    torch.manual_seed(3)
    network = VGG16Features()
    return {
        spelling(stage, index) + kind: value.detach().half()
        for index, convolution in network._convolutions.items()
        for kind, value in convolution.named_parameters()
        for stage in [sum(index >= first for first in (0, 4, 9, 16, 23))]
    }


def test_vgg16_loads_from_a_file_under_either_public_spelling(tmp_path):
    x, y, distances = images(1, 16), images(1, 16), []
    for spelling in (lambda _, index: f"features.{index}.", lambda stage, index: f"net.slice{stage}.{index}."):
        save_file(vgg_state(spelling) | {"classifier.0.weight": torch.ones(1)}, tmp_path / "vgg16.safetensors")
        metric = LPIPS(tmp_path / "vgg16.safetensors", heads([widths[-1] for widths in STAGES]), checkpoint=True)
        for head in metric.heads:
            head.data.fill_(0.5)
        distances.append(metric(x, y))
    assert torch.equal(*distances)
    assert distances[0].item() > 0
    features = metric.backbone(x)
    assert [tuple(f.shape[1:]) for f in features] == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2), (512, 1, 1)]


def test_vgg16_has_torchvision_s_indices():
    convolutions = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]  # of torchvision.models.vgg16().features
    assert list(VGG16Features()._convolutions) == convolutions


# ---- what cannot be used --------------------------------------------------------------------------------------------


def test_without_torchvision_the_error_names_the_alternatives(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ImportError, match=r"pip install torchvision.*\.safetensors file.*features\.N\.weight"):
        LPIPS("vgg16")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3,), {}, TypeError, "backbone: expected a module or function .* got int"),
        (("no/such/file.safetensors",), {}, FileNotFoundError, "backbone: no file 'no/such/file.safetensors'"),
        ((Small(), "no/such.pth"), {}, FileNotFoundError, "weights: no file"),
        (
            (Small(), {"conv.weight": torch.ones(1)}),
            {},
            ValueError,
            r"weights: .*lin0\.model\.1\.weight.*got conv\.weight",
        ),
        ((Small(), {"lin1.model.1.weight": torch.ones(1, 4, 1, 1)}), {}, ValueError, "weights: .* without a gap"),
        (
            (Small(), [torch.ones(4, 1)]),
            {},
            ValueError,
            r"weights\[0\]: expected \(C,\) or \(1, C, 1, 1\), got \(4, 1\)",
        ),
        ((Small(), [1.0]), {}, TypeError, r"weights\[0\]: expected a tensor, got float"),
        ((Small(), []), {}, ValueError, "weights: needs at least one layer"),
        ((Small(),), {"no_grad": "target"}, ValueError, 'no_grad: expected "x", "y" or None, got \'target\''),
        ((lambda x: [x],), {"checkpoint": True}, ValueError, "checkpoint: function has no `stages`"),
    ],
)
def test_what_cannot_be_used_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        LPIPS(*arguments, **options)


def test_a_pickle_is_opened_only_when_asked_for(tmp_path, backbone):
    torch.save(public_names(heads()), tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match=r"weights: 'vgg\.pth' is not a \.safetensors file\. allow_pickle=True"):
        LPIPS(backbone, tmp_path / "vgg.pth")


def test_an_incomplete_vgg16_is_named(tmp_path):
    state = vgg_state(lambda _, index: f"features.{index}.")
    del state["features.14.bias"]
    save_file(state, tmp_path / "vgg16.safetensors")
    with pytest.raises(ValueError, match=r"backbone: the state dict of VGG16 lacks features\.14\.bias"):
        LPIPS(tmp_path / "vgg16.safetensors")


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (torch.ones(2, 3, 8, 8), torch.ones(1, 3, 8, 8), ValueError, "y: expected the shape of x"),
        (torch.ones(2, 1, 8, 8), torch.ones(2, 1, 8, 8), ValueError, r"x: expected \(B, 3, H, W\) images"),
        (
            torch.ones(2, 3, 8, 8).int(),
            torch.ones(2, 3, 8, 8),
            TypeError,
            "x: expected a floating tensor, got torch.int32",
        ),
    ],
)
def test_bad_images_are_named(backbone, x, y, error, message):
    with pytest.raises(error, match=message):
        LPIPS(backbone)(x, y)


def test_heads_for_other_layers_are_named(backbone):
    with pytest.raises(ValueError, match="backbone: returned 2 layers of features for 1 heads"):
        LPIPS(backbone, [torch.ones(4)])(images(), images())
    with pytest.raises(ValueError, match=r"weights\[1\]: expected \(6,\)"):
        LPIPS(backbone, [torch.ones(4), torch.ones(5)])(images(), images())
