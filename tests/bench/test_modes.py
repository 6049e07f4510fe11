"""What a step of each mode computes."""

import pytest
import torch
from fastdistill.bench.benchmark import Inputs
from fastdistill.bench.modes import MODES

X, WEIGHT, GRAD = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0]), torch.tensor([7.0, 11.0])
INPUTS = Inputs({"x": X, "weight": WEIGHT}, {"y": GRAD}, {"power": 2})
EXPECTED = {"y": X**2 * WEIGHT, "grad_x": GRAD * 2 * X * WEIGHT, "grad_weight": GRAD * X**2}


def scaled_power(x, weight, power):
    return x**power * weight


@pytest.mark.parametrize(
    ("mode", "results"),
    [("forward", ["y"]), ("backward", ["grad_x", "grad_weight"]), ("full", ["y", "grad_x", "grad_weight"])],
)
def test_a_step_makes_its_results_anew_each_time(mode, results):
    step = MODES[mode](scaled_power, INPUTS)
    first, second = step.tensors(), step.tensors()
    assert list(first) == results
    for name in results:
        assert torch.equal(first[name], EXPECTED[name])
        assert torch.equal(second[name], EXPECTED[name])
        assert first[name] is not second[name]


def test_forward_builds_no_graph():
    assert not MODES["forward"](scaled_power, INPUTS).tensors()["y"].requires_grad


def test_inputs_in_another_dtype_have_the_same_values():
    wide = INPUTS.to(torch.float64)
    assert wide.tensors["x"].dtype == wide.grad_outputs["y"].dtype == torch.float64
    assert torch.equal(wide.tensors["weight"].float(), WEIGHT)
    assert wide.constants == INPUTS.constants


def test_a_forward_pass_reads_no_gradient():
    assert INPUTS.nbytes("forward") == X.nbytes + WEIGHT.nbytes
    assert INPUTS.nbytes("full") == INPUTS.nbytes("backward") == X.nbytes + WEIGHT.nbytes + GRAD.nbytes


def test_several_outputs_are_named():
    inputs = Inputs({"x": X}, {"y": GRAD, "total": GRAD})
    results = MODES["full"](lambda x: (2 * x, 3 * x), inputs).tensors()
    assert torch.equal(results["total"], 3 * X)
    assert torch.equal(results["grad_x"], 5 * GRAD)
