"""denoising_loss against a plain implementation of every prediction type and weighting."""

import itertools

import pytest
import torch

from fastdistill import diffusion
from fastdistill.losses import denoising_loss

GAMMA = 5.0
SHAPE = (4, 3, 5, 7)
FLOWS = ("flow_prediction", "instaflow")

TARGETS = {
    "epsilon": lambda data, noise, alpha, sigma: noise,
    "sample": lambda data, noise, alpha, sigma: data,
    "v_prediction": lambda data, noise, alpha, sigma: alpha * noise - sigma * data,
    "flow_prediction": lambda data, noise, alpha, sigma: noise - data,
    "instaflow": lambda data, noise, alpha, sigma: data - noise,
}
# As the Min-SNR paper and diffusers' training scripts write them, and for the flows by the same reasoning.
MIN_SNR = {
    "epsilon": lambda snr: snr.clamp(max=GAMMA) / snr,
    "sample": lambda snr: snr.clamp(max=GAMMA),
    "v_prediction": lambda snr: snr.clamp(max=GAMMA) / (snr + 1),
    "flow_prediction": lambda snr: snr.clamp(max=GAMMA) / (snr.sqrt() + 1) ** 2,
    "instaflow": lambda snr: snr.clamp(max=GAMMA) / (snr.sqrt() + 1) ** 2,
}
SNR = {
    "epsilon": torch.ones_like,
    "sample": lambda snr: snr,
    "v_prediction": lambda snr: snr / (snr + 1),
    "flow_prediction": lambda snr: snr / (snr.sqrt() + 1) ** 2,
    "instaflow": lambda snr: snr / (snr.sqrt() + 1) ** 2,
}
WEIGHTS = {"uniform": dict.fromkeys(TARGETS, torch.ones_like), "snr": SNR, "min_snr": MIN_SNR}


def batch(prediction_type="epsilon", dtype=torch.float64):
    pred, data, noise = torch.randn((3, *SHAPE), dtype=torch.float64).to(dtype)
    t = torch.tensor([20, 300, 600, 990])  # the first has an SNR above gamma
    schedule = diffusion.flow if prediction_type in FLOWS else diffusion.scaled_linear
    return pred, data, noise, *schedule(dtype=torch.float64).at(t)


def plain(pred, data, noise, alpha, sigma, prediction_type, weighting):
    target = TARGETS[prediction_type](data, noise, alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1))
    weight = WEIGHTS[weighting][prediction_type](alpha**2 / sigma**2)
    return (weight * (pred - target).square().flatten(1).mean(1)).mean()


@pytest.mark.parametrize(("prediction_type", "weighting"), list(itertools.product(TARGETS, WEIGHTS)))
def test_every_type_and_weighting_is_what_the_papers_write(prediction_type, weighting):
    for dtype in (torch.float64, torch.float32):
        inputs = batch(prediction_type, dtype)
        pred = inputs[0].requires_grad_()
        loss = denoising_loss(*inputs, prediction_type=prediction_type, weighting=weighting)
        wide = [t.double() for t in inputs]
        expected = plain(*wide, prediction_type, weighting)
        assert loss.dtype == dtype
        torch.testing.assert_close(loss, expected, check_dtype=False, rtol=1e-5, atol=1e-6)
        ours, exact = torch.autograd.grad(loss, pred)[0], torch.autograd.grad(expected, pred)[0]
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("weighting", ["snr", "min_snr"])
@pytest.mark.parametrize("prediction_type", TARGETS)
def test_a_weighted_loss_is_the_same_whatever_the_network_predicts(prediction_type, weighting):
    """The weights make every type's loss the SNR-weighted error of the data, on any path."""
    _, data, noise, _, _ = batch()
    alpha, sigma = torch.tensor([2.0, 0.9, 0.5, 0.01]).double(), torch.tensor([0.3, 0.4, 0.5, 1.5]).double()
    x_t = diffusion.add_noise(data, noise, alpha, sigma)
    mu = data + 0.1 * torch.randn_like(data)
    pred = diffusion.convert(mu, x_t, alpha, sigma, "sample", prediction_type)
    loss = denoising_loss(pred, data, noise, alpha, sigma, prediction_type=prediction_type, weighting=weighting)
    snr = (alpha / sigma) ** 2
    weight = snr.clamp(max=GAMMA) if weighting == "min_snr" else snr
    torch.testing.assert_close(loss, (weight * (mu - data).square().flatten(1).mean(1)).mean())


@pytest.mark.parametrize("weighting", WEIGHTS)
@pytest.mark.parametrize("prediction_type", TARGETS)
def test_the_ends_of_the_schedule_stay_finite(prediction_type, weighting):
    pred, data, noise, _, _ = batch(dtype=torch.float32)
    alpha, sigma = torch.tensor([1.0, 0.0, 1.0, 1e-30]), torch.tensor([0.0, 1.0, 1e-30, 1.0])
    loss = denoising_loss(pred, data, noise, alpha, sigma, prediction_type=prediction_type, weighting=weighting)
    assert loss.isfinite() == ((prediction_type, weighting) != ("sample", "snr"))


def test_min_snr_takes_the_limits_at_the_ends():
    ends = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    weights = {t: diffusion.snr_weight(*ends, t, gamma=GAMMA).tolist() for t in TARGETS}
    assert weights == {
        "epsilon": [0, 1],
        "sample": [pytest.approx(GAMMA), 0],
        "v_prediction": [0, 0],
        "flow_prediction": [0, 0],
        "instaflow": [0, 0],
    }


def test_numbers_do_as_tensors_do():
    pred, data, noise, _, _ = batch(dtype=torch.float32)
    for prediction_type, weighting in itertools.product(TARGETS, WEIGHTS):
        options = {"prediction_type": prediction_type, "weighting": weighting}
        number = denoising_loss(pred, data, noise, 0.6, 0.8, **options)
        tensor = denoising_loss(pred, data, noise, torch.full((4,), 0.6), torch.tensor(0.8), **options)
        torch.testing.assert_close(number, tensor)


def test_a_16_bit_prediction_meets_float32_data_as_they_are():
    pred, data, noise, alpha, sigma = batch(dtype=torch.float32)
    pred = pred.bfloat16().requires_grad_()
    loss = denoising_loss(pred, data, noise, alpha, sigma, prediction_type="v_prediction", weighting="min_snr")
    loss.backward()
    exact = plain(pred.double(), data.double(), noise.double(), alpha, sigma, "v_prediction", "min_snr")
    torch.testing.assert_close(loss, exact, check_dtype=False, rtol=1e-5, atol=1e-6)
    assert pred.grad.dtype == torch.bfloat16


def test_the_prediction_alone_receives_a_gradient():
    inputs = [t.float().requires_grad_() for t in batch()]
    denoising_loss(*inputs, prediction_type="v_prediction", weighting="min_snr").backward()
    assert inputs[0].grad.abs().max() > 0
    assert all(t.grad is None for t in inputs[1:])


def test_the_loss_compiles_into_one_graph():
    pred, data, noise, alpha, sigma = (t.float() for t in batch())

    def loss(pred, alpha, sigma):
        return denoising_loss(
            pred, data, noise, alpha, sigma, prediction_type="v_prediction", weighting="min_snr"
        )  # fmt: skip

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pred, alpha, sigma), loss(pred, alpha, sigma))
    torch.testing.assert_close(compiled(pred, 0.6, 0.8), loss(pred, 0.6, 0.8))


def test_bad_input_names_the_argument_the_value_and_the_need():
    pred, data, noise, alpha, sigma = batch()
    for arguments, options, error, message in (
        ((pred, data[:2], noise, alpha, sigma), {}, ValueError, r"data: expected pred's shape .* got \(2, 3, 5, 7\)"),
        ((pred, data, None, alpha, sigma), {}, TypeError, "noise: expected a tensor, got NoneType"),
        ((pred, data, noise, alpha, sigma[:1]), {}, ValueError, r"sigma: expected shape \(\) or \(4,\)"),
        ((pred, data, noise, alpha, sigma), {"prediction_type": "eps"}, ValueError, "prediction_type must be one of"),
        ((pred, data, noise, alpha, sigma), {"weighting": "p2"}, ValueError, "weighting: expected one of .* 'p2'"),
        ((pred, data, noise, alpha, sigma), {"snr_gamma": 0}, ValueError, "snr_gamma: expected a positive number"),
    ):
        with pytest.raises(error, match=message):
            denoising_loss(*arguments, **options)


def over_the_batch(call):
    """Names of the ops that compute a number per sample, and those of the package."""
    from torch.utils._python_dispatch import TorchDispatchMode

    small, own = [], []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function.namespace == "fastdistill":
                own.append(str(function))
            elif isinstance(result, torch.Tensor) and not function.is_view:
                assert result.numel() <= 4, function
                small.append(str(function))
            return result

    with Names():
        call()
    return small, own


def test_a_call_is_one_op_and_as_many_over_the_batch_as_documented():
    pred, data, noise, alpha, sigma = batch(dtype=torch.float32)
    alpha, sigma = alpha.float(), sigma.float()
    of_min_snr = {"epsilon": 4, "sample": 3, "v_prediction": 6, "flow_prediction": 5, "instaflow": 5}
    for prediction_type, weighting in itertools.product(TARGETS, ("uniform", "min_snr")):
        options = {"prediction_type": prediction_type, "weighting": weighting}
        small, own = over_the_batch(lambda o=options: denoising_loss(pred, data, noise, alpha, sigma, **o))
        expected = (prediction_type == "v_prediction") + (of_min_snr[prediction_type] if weighting == "min_snr" else 0)
        assert len(small) == expected, (prediction_type, weighting, small)
        assert own == ["fastdistill.weighted_squared_error.cpu"]
