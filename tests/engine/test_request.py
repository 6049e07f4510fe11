"""Bad calls: each is refused before anything is computed, naming the argument, what was given and what is needed."""

import pytest
import torch

from fastdistill.engine import OneStepPipeline
from fastdistill.engine.request import check_device, check_request


@pytest.fixture(scope="module")
def pipe(diffusers_pipeline):
    """A pipeline whose networks cannot be called."""
    pipe = OneStepPipeline(diffusers_pipeline, device="cpu")

    def refuse(*_):
        raise AssertionError("something was computed")

    for network in (pipe._parts.unet.conv_in, pipe._parts.decoder, pipe._parts.text_encoder):
        network.register_forward_pre_hook(refuse)
    return pipe


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "prompts must hold at least one prompt; got an empty list"),
        ({"prompts": ""}, r"prompts\[0\] must say something; got ''"),
        ({"prompts": ["three", " \n"]}, r"prompts\[1\] must say something; got ' \\n'"),
        ({"prompts": ["three", None]}, r"prompts\[1\] must be a string; got None"),
        ({"prompts": 7}, "prompts must be a string or a list of strings; got int"),
        ({"steps": 0}, "steps must be an integer of at least 1; got 0"),
        ({"steps": 1.0}, "steps must be an integer of at least 1; got 1.0"),
        ({"steps": True}, "steps must be an integer of at least 1; got True"),
        ({"steps": 1001}, "steps=1001: DDIMScheduler"),
        ({"seed": "0"}, "seed must be an integer or a list of integers; got '0'"),
        ({"seed": 1.5}, "seed must be an integer or a list of integers; got 1.5"),
        ({"seed": None}, "seed must be an integer or a list of integers; got None"),
        ({"seed": [1, 2]}, "seed must be one integer or one per prompt, 1; got a list of 2"),
        ({"seed": [True]}, "seed must be an integer or a list of integers"),
        ({"seed": 2**64}, r"seed must be in -2\*\*63..2\*\*64-1; got 18446744073709551616"),
        ({"output": "jpg"}, "output must be one of pil, np, pt; got 'jpg'"),
        ({"guidance_scale": "7"}, "guidance_scale must be a finite number"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ({"negative_prompt": "two"}, "negative_prompt needs guidance_scale > 1"),
        ({"negative_prompt": ["two", "one"], "guidance_scale": 2}, "one entry per prompt, 1; got 2"),
        ({"negative_prompt": 3, "guidance_scale": 2}, "negative_prompt must be a string or a list of strings; got 3"),
        ({"size": 15}, "size must be positive multiples of 2 pixels .*; got 15"),
        ({"size": 0}, "size must be positive multiples of 2"),
        ({"size": (16, 16, 3)}, r"size must be an integer or \(height, width\) in pixels"),
        ({"size": "large"}, r"size must be an integer or \(height, width\) in pixels; got 'large'"),
    ],
)
def test_a_bad_call_is_refused_before_anything_is_computed(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompts": "three", **arguments})


@pytest.mark.parametrize("argument", ["prompts", "negative_prompt"])
def test_a_prompt_longer_than_the_encoder_reads_is_not_cut_but_refused(pipe, argument):
    arguments = {"prompts": "three", "guidance_scale": 2.0, argument: " ".join(["three"] * 23)}
    with pytest.raises(ValueError, match=rf"{argument}: 'three three .*\.\.\.' is 25 tokens long .* reads at most 24"):
        pipe(**arguments)


def checked(prompts, **changes):
    arguments = {"seed": 0, "steps": 1, "guidance_scale": 0, "output": "pil", "size": None, "negative_prompt": None}
    return check_request(prompts, **{**arguments, **changes}, default_size=(64, 32), size_multiple=8)


def test_a_good_call_is_spelled_out():
    request = checked(["a", "b"], seed=4, guidance_scale=2, size=16)
    assert request.seeds == (4, 5)
    assert request.negative_prompts == ("", "")
    assert (request.height, request.width) == (16, 16)
    assert (checked("a").height, checked("a").width) == (64, 32)


@pytest.mark.parametrize("scale", [-1, 0, 0.5, 1, 1.0])
def test_guidance_of_one_or_less_is_off(scale):
    assert checked("a", guidance_scale=scale).guidance is None


def test_the_default_device_is_one_that_is_there():
    assert check_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert check_device("cpu:0") == torch.device("cpu")
