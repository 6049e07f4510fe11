"""The cases of lpips_distance are what VGG16 gives, and the fused head needs less memory than the plain one."""

import weakref

import pytest
import torch
from fastdistill.bench.lpips_distance import BENCHMARK, eager, fused, inputs
from fastdistill.training.activations import SavedTensors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdistill.losses._vgg16 import VGG16Features


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once of what the ops inside made, each storage counted once."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(result):
            if not isinstance(t, torch.Tensor):
                continue
            storage = t.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.most = max(self.most, sum(self.alive.values()))
        return result


def test_a_suite_holds_the_features_of_vgg16():
    with torch.device("meta"):
        features = VGG16Features()(torch.zeros(1, 3, 512, 512))
    assert [case.shape for case in BENCHMARK.select_cases(["vgg512"])] == [tuple(f.shape[1:]) for f in features]


def test_nothing_but_features_and_weights_is_saved_and_the_plain_head_saves_as_much_again():
    arguments = inputs()
    features = sum(f.nbytes for f in (*arguments[0], *arguments[1]))
    saved = {}
    for name, head in (("fused", fused), ("eager", eager)):
        with SavedTensors([t for group in arguments for t in group]) as kept:
            head(*arguments)
        saved[name] = kept.nbytes
    assert saved["fused"] == 0
    assert saved["eager"] > features


def test_the_peak_of_temporaries_is_a_quarter_of_the_plain_head_s_or_less():
    arguments = inputs()
    gradients = sum(f.nbytes for f in arguments[0])
    most = {}
    for name, head in (("fused", fused), ("eager", eager)):
        with Peak() as peak:
            made = torch.autograd.grad(head(*arguments).sum(), arguments[0])
        assert sum(g.nbytes for g in made) == gradients
        most[name] = peak.most - gradients  # what is left of it are temporaries
    assert most["fused"] < 4096, "a few scalars per sample"
    scratch = 4 * 2 * (65536 // 2 + 512)  # of the CPU kernel's one thread here, which is no tensor
    assert most["eager"] >= 4 * (most["fused"] + scratch)


@pytest.mark.parametrize("layout", BENCHMARK.layouts)
def test_fused_and_plain_head_agree_on_the_benchmark_s_inputs(layout):
    case = BENCHMARK.select_cases(["512x4x4"])[0]
    given = BENCHMARK.setup(case, torch.float32, layout, torch.device("cpu"))
    arguments = {**given.tensors, **given.constants}
    assert given.tensors["features_x"].stride(1) == (1 if layout == "channels_last" else 16)
    torch.testing.assert_close(fused(**arguments), eager(**arguments))


def test_the_cost_counts_each_feature_and_gradient_once():
    case, size = BENCHMARK.select_cases(["512x4x4"])[0], 512 * 4 * 4
    forward, backward, full = (BENCHMARK.cost(case, torch.bfloat16, mode) for mode in ("forward", "backward", "full"))
    assert (forward.bytes, backward.bytes, full.bytes) == (4 * size, 8 * size, 12 * size)
