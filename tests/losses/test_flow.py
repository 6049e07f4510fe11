"""Rectified flow: the two conventions, the velocity loss, and the straightness of flows known in closed form."""

import math

import pytest
import torch

from fastdistill import diffusion
from fastdistill.losses import flow_interpolate, flow_matching_loss, straightness

CONVENTIONS = ("instaflow", "sd3")
T = torch.tensor([0.0, 0.25, 1.0])


def ends(dtype=torch.float64):
    return torch.randn((2, 3, 4, 5, 7), dtype=torch.float64).to(dtype)


def point(data, noise, t, convention):
    t = t.view(-1, 1, 1, 1)
    return t * data + (1 - t) * noise if convention == "instaflow" else (1 - t) * data + t * noise


def velocity(data, noise, convention):
    return data - noise if convention == "instaflow" else noise - data


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_interpolation_is_the_papers_line_and_meets_its_ends(convention):
    data, noise = ends()
    x_t = flow_interpolate(data, noise, T, convention=convention)
    torch.testing.assert_close(x_t, point(data, noise, T.double(), convention))
    first, last = (noise, data) if convention == "instaflow" else (data, noise)
    assert torch.equal(x_t[0], first[0])
    assert torch.equal(x_t[2], last[2])
    torch.testing.assert_close(flow_interpolate(data, noise, 0.25, convention=convention)[1], x_t[1])


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_velocity_is_the_derivative_of_the_line_and_what_the_network_predicts(convention):
    data, noise = ends()
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    forward = flow_interpolate(data, noise, t + 1e-3, convention=convention)
    slope = (forward - flow_interpolate(data, noise, t - 1e-3, convention=convention)) / 2e-3
    torch.testing.assert_close(slope, velocity(data, noise, convention))
    prediction_type = {"instaflow": "instaflow", "sd3": "flow_prediction"}[convention]
    target = diffusion.training_target(data, noise, 1.0, 1.0, prediction_type)
    torch.testing.assert_close(slope, target)
    assert diffusion.noise_time(convention) == {"instaflow": 0, "sd3": 1}[convention]


def test_16_bit_ends_are_interpolated_in_float32_and_rounded_once():
    data, noise = ends(torch.bfloat16)
    x_t = flow_interpolate(data, noise, torch.tensor([0.001, 0.3, 0.777]))
    exact = point(data.double(), noise.double(), torch.tensor([0.001, 0.3, 0.777]).double(), "instaflow")
    assert x_t.dtype == torch.bfloat16
    assert (x_t.float() == exact.bfloat16().float()).float().mean() > 0.99  # but for float32's own rounding near a tie
    assert flow_interpolate(data, noise.float(), 0.5).dtype == torch.float32


def test_interpolation_in_float32_is_one_op_and_differentiable():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not function.is_view:
                names.append(str(function))
            return result

    data, noise = ends(torch.float32)
    names = []
    with Count():
        flow_interpolate(data, noise, T)
    assert names == ["aten.lerp.Tensor"]
    data, noise = (t.double().requires_grad_() for t in (data, noise))
    assert torch.autograd.gradcheck(lambda d, n: flow_interpolate(d, n, T.double()), (data, noise), fast_mode=True)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("weight", [None, 2.0, torch.tensor([0.5, 1.0, 0.0])])
def test_the_loss_is_the_weighted_mean_squared_error_of_the_velocity(convention, weight):
    data, noise = ends()
    pred = torch.randn_like(data).requires_grad_()
    distances = (pred - velocity(data, noise, convention)).square().flatten(1).mean(1)
    expected = ((1.0 if weight is None else weight) * distances).mean()
    (wanted,) = torch.autograd.grad(expected, pred)
    for dtype in (torch.float64, torch.float32):
        own = pred.detach().to(dtype).requires_grad_()
        loss = flow_matching_loss(own, data.to(dtype), noise.to(dtype), convention=convention, weight=weight)
        loss.backward()
        torch.testing.assert_close(loss, expected, check_dtype=False)
        torch.testing.assert_close(own.grad, wanted, check_dtype=False, rtol=1e-5, atol=1e-8)


def test_a_perfect_velocity_costs_nothing_and_the_wrong_convention_much():
    data, noise = ends(torch.float32)
    pred = (data - noise).requires_grad_()
    loss = flow_matching_loss(pred, data, noise, convention="instaflow")
    loss.backward()
    assert loss == 0
    assert torch.equal(pred.grad, torch.zeros_like(pred))
    assert flow_matching_loss(pred, data, noise, convention="sd3") > 4


def test_the_prediction_alone_receives_a_gradient():
    pred, data, noise = (t.requires_grad_() for t in torch.randn(3, 2, 4, 8, 8))
    flow_matching_loss(pred.bfloat16(), data, noise).backward()
    assert pred.grad.abs().max() > 0
    assert data.grad is noise.grad is None


# ---- straightness ---------------------------------------------------------------------------------------------------


def gaussian(x, t):
    """The rectified flow from N(0, 1) to N(0, 1), in "instaflow": E[data - noise | x_t = x]."""
    t = t.to(x.dtype)[:, None]
    return (2 * t - 1) / (t**2 + (1 - t) ** 2) * x


def reversed_gaussian(x, t):
    return -gaussian(x, 1 - t)


@pytest.mark.parametrize(("convention", "flow"), [("instaflow", gaussian), ("sd3", reversed_gaussian)])
def test_the_flow_from_a_gaussian_to_itself_has_its_known_straightness(convention, flow):
    # Noise of mean square 1 exactly, so that what is left is the error of the steps: half of it with twice as many.
    noise = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    exact = 2 - math.pi / 2
    errors = [abs(straightness(flow, noise, steps, convention=convention).item() - exact) for steps in (100, 200)]
    assert errors[0] < 0.03 * exact
    assert errors[1] < 0.55 * errors[0]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_constant_velocity_is_straight_and_arrives(convention):
    noise, seen = torch.randn(5, 2), []

    def flow(x, t):
        seen.append((x, t))
        return torch.full_like(x, 3.0)

    assert straightness(flow, noise, 10, convention=convention) < 1e-12
    times = [t[0].item() for _, t in seen]
    expected = [k / 10 for k in range(10)]
    assert times == pytest.approx(expected if convention == "instaflow" else [1 - t for t in expected])
    assert all(t.shape == (5,) and t.dtype == torch.float32 for _, t in seen)
    arrived = noise + 2.7 * (1 if convention == "instaflow" else -1)
    torch.testing.assert_close(seen[-1][0], arrived)


def test_straightness_is_the_mean_squared_distance_to_the_displacement():
    noise = torch.randn(4, 3, dtype=torch.float64)
    z, velocities = noise, []
    for k in range(25):
        velocities.append(torch.sin(z + k / 25))
        z = z + velocities[-1] / 25
    expected = (torch.stack(velocities) - (z - noise)).square().mean()
    ours = straightness(lambda x, t: torch.sin(x + t.double().round(decimals=6)[:, None]), noise, 25)
    torch.testing.assert_close(ours, expected)


def test_no_graph_is_kept_and_the_state_has_the_noises_dtype():
    weight = torch.ones((), requires_grad=True)
    dtypes = set()

    def flow(x, t):
        dtypes.add(x.dtype)
        return weight * x

    result = straightness(flow, torch.randn(3, 2, dtype=torch.bfloat16), 4)
    assert dtypes == {torch.bfloat16}
    assert result.dtype == torch.float32
    assert not result.requires_grad


def test_bad_input_names_the_argument_the_value_and_the_need():
    data, noise = ends()
    for call, error, message in (
        (
            lambda: flow_interpolate(data, noise[:1], T),
            ValueError,
            r"noise: expected data's shape .* got \(1, 4, 5, 7\)",
        ),
        (lambda: flow_interpolate(data, noise, T[:2]), ValueError, r"t: expected shape \(\) or \(3,\)"),
        (lambda: flow_interpolate(data, noise, 1.5), ValueError, r"t: expected within \[0, 1\], got 1.5"),
        (
            lambda: flow_interpolate(data, noise, T, convention="sd"),
            ValueError,
            "convention must be one of instaflow, sd3",
        ),
        (lambda: flow_matching_loss(data, data, 1.0), TypeError, "noise: expected a tensor, got float"),
        (lambda: flow_matching_loss(data, data, noise, weight=T[:2]), ValueError, r"weight: .*got \(2,\)"),
        (lambda: straightness(gaussian, noise, 0), ValueError, "steps: expected an integer of 1 or more, got 0"),
        (lambda: straightness(lambda x, t: x[:1], noise, 2), ValueError, r"velocity: expected to return shape"),
    ):
        with pytest.raises(error, match=message):
            call()
