"""FID: what reaches the network, whose weights are asked for, and what is said without torch-fidelity."""

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from fastdistill.metrics import FrechetStatistics, fid, frechet_distance, inception_statistics


def features(images):
    """A stand-in of Inception: uint8 (B, 3, H, W) to (B, 6)."""
    assert images.dtype == torch.uint8
    assert images.shape[1] == 3
    return torch.cat([images.float().mean(dim=(2, 3)), images.float().std(dim=(2, 3))], dim=1)


class Code:
    """What a file that is more than weights does to who unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return self.path.touch, ()


@pytest.fixture
def sets():
    generator = torch.Generator().manual_seed(0)
    draw = lambda high: torch.randint(0, high, (20, 3, 8, 8), dtype=torch.uint8, generator=generator)  # noqa: E731
    return draw(256), draw(200)


def test_it_is_the_frechet_distance_of_the_features_of_the_8_bit_images(sets):
    real, fake = sets
    expected = frechet_distance(features(real), features(fake))
    assert fid(real, fake, features, batch_size=7) == pytest.approx(expected, rel=1e-9)
    assert fid(real / 255, fake.permute(0, 2, 3, 1).numpy(), features) == pytest.approx(expected, rel=1e-9)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in fake]
    assert fid(iter(real.split(6)), pictures, features) == pytest.approx(expected, rel=1e-9)
    assert fid(real, real, features) == pytest.approx(0, abs=1e-8)


def test_statistics_stand_in_for_images(sets, tmp_path):
    real, fake = sets
    inception_statistics(real, features).save(tmp_path / "real.npz")
    statistics = FrechetStatistics.load(tmp_path / "real.npz")
    assert fid(statistics, fake, features) == pytest.approx(fid(real, fake, features), rel=1e-9)
    assert fid(statistics, statistics, "no network is needed") == pytest.approx(0, abs=1e-8)


def test_a_file_is_given_to_torch_fidelitys_network(sets, tmp_path, monkeypatch):
    asked = []

    class FeatureExtractorInceptionV3(torch.nn.Module):
        """As torch-fidelity's: loads its file, takes uint8, returns a tuple of the features asked for."""

        def __init__(self, name, features_list, feature_extractor_weights_path=None, **kwargs):
            super().__init__()
            asked.append((name, features_list))
            self.scale = torch.nn.Parameter(torch.empty(()))
            self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

        def forward(self, images):
            return (features(images) * self.scale,)

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FeatureExtractorInceptionV3
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.save({"scale": torch.tensor(2.0)}, tmp_path / "inception.pth")
    real, fake = sets
    distance = fid(real, fake, tmp_path / "inception.pth")
    assert distance == pytest.approx(4 * fid(real, fake, features), rel=1e-6)
    assert asked == [("inception-v3-compat", ["2048"])]  # loaded once for both sets

    with pytest.raises(FileNotFoundError, match=r"there is no file .*missing\.pth"):
        fid(real, fake, tmp_path / "missing.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "empty.pth").write_text("")
    torch.save(Code(tmp_path / "was-run"), tmp_path / "code.pth")
    for name in ("other.pth", "text.pth", "empty.pth", "code.pth"):
        with pytest.raises(ValueError, match=rf"{name} holds no weights of torch-fidelity's Inception"):
            fid(real, fake, str(tmp_path / name))
    assert not (tmp_path / "was-run").exists()


def test_without_torch_fidelity_a_file_is_refused_with_the_extra_that_helps(sets, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"pip install 'fastdistill\[fid\]'"):
        fid(*sets, "inception.pth")


def test_pictures_of_two_sizes_are_named():
    pictures = [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))]
    with pytest.raises(ValueError, match=r"sizes \(8, 8\), \(8, 9\); needed one size"):
        fid(pictures, np.zeros((2, 8, 8, 3), dtype=np.uint8), features)
