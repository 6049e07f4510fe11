"""`fastdistill metrics`: the figures of the functions, of what lies on disk."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fastdistill.cli import app
from fastdistill.metrics import frechet_distance, precision_recall, sliced_wasserstein
from fastdistill.metrics.compare import read_features


def run(*arguments):
    return CliRunner().invoke(app, ["metrics", *map(str, arguments)])


@pytest.fixture
def features(tmp_path):
    generator = np.random.default_rng(0)
    real, fake = generator.normal(size=(30, 4)), generator.normal(size=(20, 4)) + 0.5
    np.save(tmp_path / "real.npy", real.astype(np.float32))
    np.savez(tmp_path / "fake.npz", features=fake, labels=np.zeros(20))
    return real.astype(np.float32), fake


def test_features_in_files_have_the_figures_of_the_functions(tmp_path, features):
    result = run(tmp_path / "real.npy", tmp_path / "fake.npz", "--json", "--k", 2)
    assert result.exit_code == 0
    precision, recall = precision_recall(*features, 2)
    assert json.loads(result.stdout) == {
        "real": 30,
        "fake": 20,
        "features": 4,
        "frechet_distance": pytest.approx(frechet_distance(*features)),
        "precision": pytest.approx(precision),
        "recall": pytest.approx(recall),
        "sliced_wasserstein": pytest.approx(sliced_wasserstein(*features)),
    }
    lines = run(tmp_path / "real.npy", tmp_path / "real.npy").stdout
    assert "frechet distance    0.0000" in lines
    assert "precision           1.0000" in lines


def test_pictures_are_averaged_over_areas_of_any_size_and_mode(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "within").mkdir(parents=True)
    pixels = np.kron(np.array([[20, 235], [51, 102]]), np.ones((6, 6), dtype=int))
    pixels = (pixels + 20 * (-1) ** np.arange(12)).astype(np.uint8)  # stripes of that mean
    Image.fromarray(pixels).save(folder / "a.PNG")
    Image.fromarray(pixels[::3, ::3]).convert("RGBA").save(folder / "b.webp", lossless=True)
    (folder / "notes.txt").write_text("no picture")
    expected = np.repeat(np.array([20, 235, 51, 102]) / 127.5 - 1, 3)  # each pixel's three channels
    np.testing.assert_allclose(read_features(folder, size=2), [expected, expected], atol=1e-12)
    assert read_features(folder).shape == (2, 8 * 8 * 3)


def test_what_cannot_be_compared_is_one_line_that_names_it(tmp_path, features):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"\x89PNG broken")
    (tmp_path / "features.txt").write_text("1 2")
    (tmp_path / "damaged.npz").write_bytes(b"PK damaged")
    np.save(tmp_path / "pickled.npy", np.array([print], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "two.npz", a=np.zeros((5, 4)), b=np.zeros((5, 4)))
    np.save(tmp_path / "narrow.npy", np.zeros((5, 3)))
    np.save(tmp_path / "few.npy", np.zeros((3, 4)))
    for name, message in {
        "missing": "there is no such file or folder",
        "empty": "no pictures in this folder",
        "broken": "a.png: not a picture that can be read",
        "features.txt": "needed a folder of pictures, or features",
        "damaged.npz": "damaged.npz: ",
        "pickled.npy": "Object arrays cannot be loaded",
        "two.npz": "holds a, b; needed one array, or one named features",
        "narrow.npy": "narrow.npy: 3; needed the same",
        "few.npy": "few.npy: 3 samples; needed 4 or more",
    }.items():
        result = run(tmp_path / "real.npy", tmp_path / name)
        assert result.exit_code == 2, name
        assert message in result.stderr, result.stderr
        assert result.stderr.count("\n") == 1
