"""Models by name or path, and one clear line for each thing that can be wrong with a folder."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from fastdistill.models import ModelError, bundled_models, load_pipeline, resolve_model


@pytest.fixture
def broken(tmp_path):
    """A copy of the bundled teacher, for a test to break."""
    return shutil.copytree(bundled_models()["digits-teacher"], tmp_path / "model")


def refusal(call, *arguments):
    with pytest.raises(ModelError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_bundled_names_resolve_to_their_folders():
    models = bundled_models()
    assert "digits-teacher" in models
    for name, folder in models.items():
        assert resolve_model(name) == folder


def test_a_folder_resolves_to_itself(broken):
    assert resolve_model(broken) == broken
    assert resolve_model(str(broken)) == broken


def test_importing_the_models_is_light():
    code = "import sys, fastdistill.models; print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_pipeline_loads_in_one_dtype_without_a_word(capfd, recwarn):
    pipeline = load_pipeline("digits-teacher")
    dtypes = {p.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder) for p in part.parameters()}
    assert dtypes == {torch.float32}
    assert capfd.readouterr() == ("", "")
    assert [str(warning.message) for warning in recwarn] == []


def test_a_pipeline_loads_in_the_dtype_that_is_asked_for():
    pipeline = load_pipeline("digits-teacher", dtype=torch.bfloat16)
    dtypes = {p.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder) for p in part.parameters()}
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("name", ["no-such-model", "", "digits teacher", "x" * 5000, "a\0b", "~nobody-here/model"])
def test_an_unknown_name_lists_the_known_ones(name):
    message = refusal(resolve_model, name)
    assert repr(name) in message
    for known in bundled_models():
        assert known in message


def test_a_file_is_not_a_model(tmp_path):
    file = tmp_path / "weights.safetensors"
    file.touch()
    assert "weights.safetensors: a file" in refusal(resolve_model, file)


def test_a_folder_without_an_index_is_no_pipeline(broken):
    (broken / "model_index.json").unlink()
    assert "no model_index.json" in refusal(resolve_model, broken)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_broken_index_is_named(broken, content):
    (broken / "model_index.json").write_text(content)
    assert "model_index.json" in refusal(resolve_model, broken)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component_is_named(broken, component):
    shutil.rmtree(broken / component)
    assert f"component '{component}' is missing" in refusal(resolve_model, broken)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_component_without_weights_is_named(broken, component):
    next((broken / component).glob("*.safetensors")).unlink()
    assert f"component '{component}' has no weight file" in refusal(load_pipeline, broken)


def test_a_component_without_configuration_is_named(broken):
    (broken / "unet" / "config.json").unlink()
    assert "component 'unet' has no configuration" in refusal(load_pipeline, broken)


def test_a_bad_configuration_is_named(broken):
    (broken / "vae" / "config.json").write_text('{"act_fn": ')
    message = refusal(load_pipeline, broken)
    assert "vae" in message
    assert "config.json: unreadable JSON" in message


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_truncated_weight_file_is_named(broken, component, keep):
    weights = next((broken / component).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:keep])
    message = refusal(load_pipeline, broken)
    assert weights.name in message
    assert "truncated" in message


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_weights_that_lack_a_tensor_are_refused(broken, component):
    from safetensors.torch import load_file, save_file

    weights = next((broken / component).glob("*.safetensors"))
    tensors = load_file(weights)
    gone = next(name for name in sorted(tensors) if name.endswith("weight"))
    del tensors[gone]
    save_file(tensors, weights, metadata={"format": "pt"})
    assert component in refusal(load_pipeline, broken)


def test_weights_of_another_size_are_refused(broken):
    config = json.loads((broken / "unet" / "config.json").read_text())
    config["block_out_channels"] = [64, 64]
    (broken / "unet" / "config.json").write_text(json.dumps(config))
    assert "cannot open it" in refusal(load_pipeline, broken)


def test_an_unknown_component_class_is_refused(broken):
    index = json.loads((broken / "model_index.json").read_text())
    index["unet"] = ["diffusers", "UNetThatNeverWas"]
    (broken / "model_index.json").write_text(json.dumps(index))
    assert "UNetThatNeverWas" in refusal(load_pipeline, broken)
