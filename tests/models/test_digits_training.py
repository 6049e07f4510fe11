"""The training commands: a pipeline folder from nothing, the same one for the same seed, nothing else overwritten."""

import pytest
import torch
from diffusers import DiffusionPipeline

from fastdistill.models import load_pipeline
from fastdistill.models.digits import train_teacher as teacher_module
from fastdistill.models.digits.__main__ import main
from fastdistill.models.digits.data import load_digits
from fastdistill.models.digits.sampling import balanced_labels
from fastdistill.models.digits.train_teacher import train_teacher
from fastdistill.models.digits.train_vae import centre_latents, decode, encode, train_vae


def silent(line):
    pass


@pytest.fixture(scope="module")
def vae():
    return train_vae(steps=12, seed=3, log=silent)


def weights_of(pipeline):
    return torch.cat([p.flatten() for part in (pipeline.unet, pipeline.text_encoder) for p in part.parameters()])


def test_the_command_writes_a_folder_that_opens_and_holds_what_was_trained(tmp_path, capsys):
    out = tmp_path / "made" / "teacher"
    assert main(["teacher", "--out", str(out), "--seed", "1", "--vae-steps", "2", "--steps", "2"]) == 0
    assert "saved" in capsys.readouterr().out
    pipeline = load_pipeline(out)
    plain = DiffusionPipeline.from_pretrained(out)  # no dtype given: the folder alone must make it one
    assert plain("seven", num_inference_steps=1, guidance_scale=1.0).images[0].size == (32, 32)
    assert list(out.parent.iterdir()) == [out]  # nothing half-written stays beside it
    trained = train_teacher(train_vae(2, 1, silent), 2, 1, silent)
    torch.testing.assert_close(weights_of(pipeline), weights_of(trained), rtol=1e-3, atol=1e-6)  # float16 on disk


def test_training_repeats_for_a_seed_and_differs_for_another(vae):
    first, again, other = (weights_of(train_teacher(vae, 3, seed, silent)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_autoencoder_learns(vae):
    images = load_digits().images[:100]
    error = (decode(vae, encode(vae, images)) - images).square().mean()
    start = train_vae(steps=1, seed=3, log=silent)
    assert error < 0.8 * (decode(start, encode(start, images)) - images).square().mean()


def test_reports_come_at_their_steps_with_figures(vae, monkeypatch):
    monkeypatch.setattr(teacher_module, "balanced_labels", lambda per_digit: balanced_labels(2))  # 20 images are quick
    lines, saved = [], []
    train_teacher(vae, 2, 0, lines.append, report_every=2, on_report=saved.append)
    assert [line.split(" FD")[0] for line in lines if "accuracy" in line] == ["teacher step 1"]
    assert len(saved) == 1


def test_centring_the_latents_leaves_the_decoded_images(vae):
    images = load_digits().images[:64]
    before = decode(vae, encode(vae, images))
    vae.quant_conv.bias[:4] += torch.tensor([1.0, -2.0, 0.5, 3.0])  # the same latents with other means ...
    vae.post_quant_conv.bias -= vae.post_quant_conv.weight[:, :, 0, 0] @ torch.tensor([1.0, -2.0, 0.5, 3.0])
    centre_latents(vae, images)
    latents = encode(vae, images)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert latents.std() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(decode(vae, latents), before, rtol=0, atol=1e-4)


def test_a_folder_of_something_else_is_refused_before_any_training(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    assert main(["teacher", "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "not a pipeline folder" in captured.err
    assert captured.out == ""
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_an_unknown_model_to_evaluate_is_one_line(capsys):
    assert main(["evaluate", "--models", "no-such-model"]) == 2
    error = capsys.readouterr().err
    assert "no-such-model" in error
    assert error.count("\n") == 1


def test_zero_steps_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["teacher", "--out", str(tmp_path / "x"), "--steps", "0"])
    assert "needed 1 or more" in capsys.readouterr().err
