"""Updates at their real size: built here small, through the same code; measured where there is a GPU."""

import json

import pytest
import torch
from fastdistill.bench import real_size
from fastdistill.bench.real_size import measure, report, saved_vit
from fastdistill.bench.training import CASES
from fastdistill.training import build_features
from rich.console import Console
from typer.testing import CliRunner

every_method = pytest.mark.parametrize("method", CASES)

TINY_VIT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


@every_method
def test_an_update_of_each_method_runs_through_the_code_of_the_real_size(method):
    figures = measure(method, "sd15-tiny", vit=TINY_VIT, precision="float32", updates=1, device="cpu")
    assert figures.finite
    assert set(figures.turns) == set(CASES[method].roles)
    assert figures.seconds == pytest.approx(sum(figures.turns.values()))
    assert figures.resolution == 64
    assert figures.peak_bytes is None
    assert figures.parameters["student"] > 10_000
    console = Console(record=True, width=200)
    console.print(report([figures]))
    assert f"{method}" in console.export_text()


def test_the_features_are_read_from_a_folder_as_a_users_would_be():
    with saved_vit(TINY_VIT) as folder:
        features = build_features(folder)
    assert features.size == 16
    assert features.widths == (16,) * 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dmd3",), "'dmd3' is unknown; known: dmd, dmd2"),
        (("--architecture", "sd9"), "'sd9' is unknown; known: sd15"),
        (("--precision", "int4"), "precision must be one of"),
    ],
)
def test_bad_options_are_refused_before_anything_is_built(arguments, message):
    result = CliRunner().invoke(real_size.app, arguments)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.gpu
@every_method
def test_a_real_update_of_stable_diffusion_1_5_fits_and_is_finite(method, tmp_path):
    out = tmp_path / "figures.json"
    result = CliRunner().invoke(real_size.app, [method, "--batch", "2", "--updates", "1", "--out", str(out)])
    assert result.exit_code == 0, result.output
    (figures,) = json.loads(out.read_text())["updates"]
    assert figures["parameters"]["student"] == 859_520_964
    assert 16 * 859_520_964 < figures["peak_bytes"] < torch.cuda.get_device_properties(0).total_memory
