"""CUDA graphs: their logic on a stand-in that runs anywhere, and the same on a GPU where there is one."""

import threading

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler

from fastdistill.engine import OneStepPipeline
from fastdistill.engine.graph import GraphCache

from . import fake_cuda
from .test_sampling import SD

PROMPTS = ["a handwritten seven", "three"]
CALLS = [
    {"prompts": PROMPTS, "seed": 0},
    {"prompts": PROMPTS[::-1], "seed": 9},
    {"prompts": PROMPTS, "seed": 2, "steps": 3},
    {"prompts": PROMPTS, "seed": 3, "steps": 3},
    {"prompts": PROMPTS, "seed": 2, "guidance_scale": 2.0},
    {"prompts": PROMPTS, "seed": 2, "guidance_scale": 7.0},
    {"prompts": PROMPTS[0], "seed": 2},
    {"prompts": PROMPTS[0], "seed": 2, "size": (16, 24)},
    {"prompts": PROMPTS, "seed": 0, "output": "np"},
]
KINDS_OF_CALL = 6  # seeds, prompts and guidance scales are inputs, not kinds


def as_arrays(images):
    return np.stack([np.asarray(image) for image in images])


# ---- on a stand-in ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch):
    return fake_cuda.install(monkeypatch)


def affine(x, scale):
    return (x * scale).add_(1)


def inputs(x, scale):
    return {"x": torch.full((2, 3), float(x)), "scale": torch.tensor(float(scale))}


@pytest.mark.parametrize("scheduler", [None, LCMScheduler(**SD)], ids=["DDIM", "LCM"])
@pytest.mark.parametrize("passes", [None, ()], ids=["all passes", "no pass"])
def test_everything_an_image_depends_on_is_an_input_of_the_recording(fake, make_pipeline, scheduler, passes):
    pipe = OneStepPipeline(make_pipeline(scheduler), device="cpu", passes=passes)
    eager = [as_arrays(pipe(**call)) for call in CALLS]
    pipe._graphs = GraphCache(torch.device("cpu"), capacity=len(CALLS))
    for _ in range(2):
        for call, expected in zip(CALLS, eager):
            np.testing.assert_array_equal(as_arrays(pipe(**call)), expected)
    assert len(fake.graphs) == KINDS_OF_CALL
    assert sum(graph.replays for graph in fake.graphs) == 2 * len(CALLS)
    assert "CUDA graphs: used, 6 recorded" in str(pipe.explain())


def test_a_result_is_not_overwritten_by_the_next_replay(fake):
    cache = GraphCache(torch.device("cpu"))
    first = cache.run("key", affine, inputs(2, 3))
    second = cache.run("key", affine, inputs(5, 7))
    assert first.unique().tolist() == [7]
    assert second.unique().tolist() == [36]
    assert len(fake.graphs) == 1


def test_the_callers_tensors_are_neither_kept_nor_changed(fake):
    cache = GraphCache(torch.device("cpu"))
    given = inputs(2, 3)
    cache.run("key", affine, given)
    given["x"].fill_(100)
    assert cache.run("key", affine, inputs(2, 3)).unique().tolist() == [7]
    assert given["x"].unique().tolist() == [100]


def test_the_kind_of_call_used_longest_ago_is_dropped(fake):
    cache = GraphCache(torch.device("cpu"), capacity=2)
    for key in ("a", "b", "a", "c"):  # drops "b"
        cache.run(key, affine, inputs(1, 1))
    assert len(cache) == 2
    assert len(fake.graphs) == 3
    cache.run("a", affine, inputs(1, 1))
    assert len(fake.graphs) == 3
    cache.run("b", affine, inputs(1, 1))
    assert len(fake.graphs) == 4


def test_what_a_recording_needs_lives_as_long_as_the_recording(fake):
    class Constant:
        alive = True

        def __del__(self):
            type(self).alive = False

    cache = GraphCache(torch.device("cpu"), capacity=1)
    cache.run("a", affine, inputs(1, 1), keeps=Constant())
    assert Constant.alive
    cache.run("b", affine, inputs(1, 1))
    assert not Constant.alive


def test_what_cannot_be_recorded_runs_eagerly_and_says_so_once(fake):
    def unrecordable(x):
        if fake.recording:
            raise RuntimeError("operation not permitted when\nstream is capturing")
        return x + 1

    cache = GraphCache(torch.device("cpu"))
    cache.run("good", affine, inputs(1, 1))
    x = torch.zeros(2)
    with pytest.warns(UserWarning, match="no CUDA graph for bad, running eagerly: operation not permitted when stream"):
        assert cache.run("bad", unrecordable, {"x": x}).tolist() == [1, 1]
    assert cache.run("bad", unrecordable, {"x": x + 1}).tolist() == [2, 2]  # pytest.ini: no second warning expected
    assert "not permitted" in cache.failure
    cache.run("new", affine, inputs(1, 1))
    assert len(fake.graphs) == 2  # the good one and the attempt; no attempt for the new one
    assert cache.run("good", affine, inputs(2, 3)).unique().tolist() == [7]
    assert fake.graphs[0].replays == 2


def test_an_error_of_the_function_itself_is_the_callers(fake):
    def broken(x):
        raise RuntimeError("out of memory")

    cache = GraphCache(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.run("key", broken, {"x": torch.zeros(1)})
    assert cache.failure == ""


def test_a_cache_of_no_recordings_is_refused(fake):
    with pytest.raises(ValueError, match="capacity must be at least 1; got 0"):
        GraphCache(torch.device("cpu"), capacity=0)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu_pipe(folder):
    return OneStepPipeline.from_pretrained(folder, device="cuda")


def eagerly(pipe, call):
    graphs, pipe._graphs = pipe._graphs, None
    try:
        return as_arrays(pipe(**call))
    finally:
        pipe._graphs = graphs


@pytest.mark.gpu
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_on_a_gpu_graphs_give_the_bytes_of_eager_calls(gpu_pipe, call):
    expected = eagerly(gpu_pipe, call)
    for _ in range(3):
        np.testing.assert_array_equal(as_arrays(gpu_pipe(**call)), expected)


@pytest.mark.gpu
def test_on_a_gpu_images_are_near_those_of_the_cpu(gpu_pipe, folder):
    cpu = OneStepPipeline.from_pretrained(folder, device="cpu")
    assert np.abs(gpu_pipe(PROMPTS, output="np") - cpu(PROMPTS, output="np")).max() < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_sixteen_bit_images_are_near_those_of_float32(gpu_pipe, folder, dtype):
    half = OneStepPipeline.from_pretrained(folder, device="cuda", dtype=dtype)
    assert np.abs(half(PROMPTS, output="np") - gpu_pipe(PROMPTS, output="np")).mean() < 0.02
    assert half._graphs.failure == ""


@pytest.mark.gpu
def test_on_a_gpu_nothing_fails_to_be_recorded(gpu_pipe):
    gpu_pipe.warmup([(2, 16, 16), (4, 16, 16)], steps=2, guidance_scale=3)
    assert gpu_pipe._graphs.failure == ""
    assert len(gpu_pipe._graphs) >= 2


@pytest.mark.gpu
def test_on_a_gpu_recordings_beyond_the_capacity_are_dropped_and_made_again(folder):
    pipe = OneStepPipeline.from_pretrained(folder, device="cuda")
    pipe._graphs = GraphCache(pipe.device, capacity=2)
    expected = {batch: eagerly(pipe, {"prompts": ["three"] * batch}) for batch in (1, 2, 3)}
    for batch in (1, 2, 3, 1, 3, 2, 1):
        np.testing.assert_array_equal(as_arrays(pipe(["three"] * batch)), expected[batch])
        assert len(pipe._graphs) <= 2


@pytest.mark.gpu
def test_on_a_gpu_threads_on_streams_of_their_own_get_the_images_they_would_get_alone(gpu_pipe):
    expected = [as_arrays(gpu_pipe(**call)) for call in CALLS]
    results = {}

    def work(thread):
        with torch.cuda.stream(torch.cuda.Stream()):
            for repeat in range(5):
                for index, call in enumerate(CALLS):
                    results[thread, repeat, index] = as_arrays(gpu_pipe(**call))

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 * 5 * len(CALLS)
    for (_, _, index), result in results.items():
        np.testing.assert_array_equal(result, expected[index])


@pytest.mark.gpu
def test_on_a_gpu_a_function_that_waits_for_the_device_runs_eagerly():
    cache = GraphCache(torch.device("cuda", torch.cuda.current_device()))

    def waits(x):
        return x * x.sum().item()

    x = torch.ones(3, device="cuda")
    with pytest.warns(UserWarning, match="running eagerly"):
        assert cache.run("key", waits, {"x": x}).tolist() == [3, 3, 3]
    assert cache.run("key", waits, {"x": 2 * x}).tolist() == [12, 12, 12]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
