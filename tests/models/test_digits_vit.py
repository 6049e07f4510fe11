"""The feature network of the digits: what ships, and the command that makes it."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForImageClassification

from fastdistill.models import ModelError, bundled_models, bundled_networks, resolve_model
from fastdistill.models.digits.__main__ import main
from fastdistill.models.digits.train_vit import augment, held_out_accuracy, train_vit


@pytest.fixture(scope="module")
def folder():
    return bundled_networks()["digits-vit"]


def silent(line):
    pass


def weights_of(network):
    return torch.cat([p.flatten() for p in network.parameters()])


def test_plain_transformers_opens_it_in_float32(folder):
    backbone = AutoModel.from_pretrained(folder)
    classifier = AutoModelForImageClassification.from_pretrained(folder)
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    whole, half = classifier.vit(image).last_hidden_state, backbone(image).last_hidden_state
    assert half.shape == (1, 65, 64)
    torch.testing.assert_close(whole, half)


def test_it_recognises_digits_of_writers_it_never_saw_as_its_card_says(folder):
    found = held_out_accuracy(AutoModelForImageClassification.from_pretrained(folder))
    assert found > 0.9
    card = (folder / "README.md").read_text("utf-8")
    stated = float(card.split("it recognises ")[1].split(" %")[0])
    assert stated == pytest.approx(100 * found, abs=0.5)  # printed before the weights became float16


def test_it_is_small_in_16_bit_and_its_card_states_data_licence_and_command(folder):
    files = [file for file in folder.iterdir() if file.is_file()]
    assert {file.name for file in files} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert sum(file.stat().st_size for file in files) < 1e6
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        names = list(weights.keys())
        assert {weights.get_slice(name).get_dtype() for name in names} == {"F16"}
    assert "vit.encoder.layer.0.attention.attention.query.weight" in names  # what transformers 4 and 5 both read
    card = (folder / "README.md").read_text("utf-8")
    for needed in (
        "# digits-vit",
        "Alpaydin",
        "Kaynak",
        "CC BY 4.0",
        "Apache-2.0",
        "## Training",
        "## Limits",
        "--seed 0",
    ):
        assert needed in card


def test_it_is_no_pipeline_and_is_refused_as_one_by_name():
    assert "digits-vit" not in bundled_models()
    with pytest.raises(ModelError, match="digits-vit: a network alone; needed a pipeline: digits-add, digits-dmd"):
        resolve_model("digits-vit")


def test_the_command_writes_what_was_trained_and_prints_its_accuracy(tmp_path, capsys):
    out = tmp_path / "made" / "vit"
    assert main(["vit", "--out", str(out), "--seed", "1", "--steps", "2"]) == 0
    printed = capsys.readouterr().out
    trained, again, other = (train_vit(2, seed, silent) for seed in (1, 1, 2))
    assert f"accuracy on 252 held-out digits {held_out_accuracy(trained):.3f}" in printed
    opened = AutoModelForImageClassification.from_pretrained(out)
    torch.testing.assert_close(weights_of(opened), weights_of(trained), rtol=1e-3, atol=1e-6)  # float16 on disk
    assert torch.equal(weights_of(trained), weights_of(again))
    assert not torch.equal(weights_of(trained), weights_of(other))
    assert list(out.parent.iterdir()) == [out]  # nothing half-written stays beside it


def test_a_folder_of_something_else_is_refused_before_any_training(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    assert main(["vit", "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "not a vision transformer folder" in captured.err
    assert captured.out == ""
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_augmentation_moves_and_covers_each_image_in_its_own_way_and_adds_no_ink():
    images = torch.full((64, 1, 32, 32), -1.0)
    images[:, :, 12:20, 12:20] = 1.0
    found = augment(images, torch.Generator().manual_seed(0))
    assert torch.equal(found, augment(images, torch.Generator().manual_seed(0)))
    assert found.min() >= -1
    assert found.max() <= 1
    ink = (found + 1).sum(dim=(1, 2, 3)) / (images + 1).sum(dim=(1, 2, 3))
    assert ink.max() < 1.35  # scaled up by 10 % a side, and a border
    assert (ink < 0.7).sum() > 3  # some are covered in part
    assert (ink > 0.8).sum() > 20
    centres = torch.einsum("nchw,w->n", found + 1, torch.arange(32.0)) / (found + 1).sum(dim=(1, 2, 3)).clamp(min=1)
    assert centres[ink > 0.8].std() > 1
