"""nfsd_loss against the paper's three-term gradient."""

import pytest
import torch

from fastdistill.losses import nfsd_loss


def batch(dtype=torch.float64):
    return torch.randn((4, 3, 2, 5, 7), dtype=torch.float64).to(dtype)


def paper(cond, uncond, negative, t, weight, scale, threshold=200):
    condition = cond - uncond
    domain = torch.stack([u if step < threshold else u - n for u, n, step in zip(uncond, negative, t.tolist())])
    return weight.view(-1, 1, 1, 1) * (domain + scale * condition)


@pytest.mark.parametrize("small_noise", [200, 500])
def test_the_gradient_is_the_papers_and_the_value_half_its_mean_square(small_noise):
    x, cond, uncond, negative = batch()
    t, weight = torch.tensor([199, 200, 501]), torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    x.requires_grad_()
    loss = nfsd_loss(x, cond, uncond, negative, t, weight, small_noise=small_noise)
    (2 * loss).backward()
    g = paper(cond, uncond, negative, t, weight, 7.5, small_noise)
    torch.testing.assert_close(loss, 0.5 * g.square().mean())
    torch.testing.assert_close(x.grad, 2 * g / x.numel())


def test_one_timestep_and_weight_for_all_do_as_one_each():
    x, cond, uncond, negative = batch(torch.float32)
    for t in (100, 700):
        each = nfsd_loss(x, cond, uncond, negative, torch.full((3,), t), torch.full((3,), 0.7), 3.0)
        torch.testing.assert_close(nfsd_loss(x, cond, uncond, negative, t, 0.7, 3.0), each)


def test_the_student_alone_receives_a_gradient_and_inputs_are_left_as_they_are():
    tensors = [t.bfloat16().requires_grad_() for t in batch()]
    before = [t.detach().clone() for t in tensors]
    loss = nfsd_loss(*tensors, torch.tensor([10, 300, 900]), torch.rand(3))
    loss.backward()
    assert loss.dtype == torch.float32
    assert tensors[0].grad.dtype == torch.bfloat16
    assert all(t.grad is None for t in tensors[1:])
    assert all(torch.equal(a, b) for a, b in zip(tensors, before))


def test_an_empty_batch_gives_zero():
    empty = torch.zeros(0, 4, 8, 8, requires_grad=True)
    loss = nfsd_loss(empty, empty, empty, empty, torch.zeros(0, dtype=torch.long), torch.zeros(0))
    loss.backward()
    assert loss == 0


def test_the_loss_compiles_into_one_graph():
    x, *eps = batch(torch.float32)
    t, weight = torch.tensor([10, 300, 900]), torch.rand(3)
    compiled = torch.compile(lambda x: nfsd_loss(x, *eps, t, weight), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.requires_grad_()), nfsd_loss(x, *eps, t, weight))


def test_bad_input_names_the_argument_the_value_and_the_need():
    x, cond, uncond, negative = batch()
    t, weight = torch.tensor([1, 2, 3]), torch.ones(3)
    with pytest.raises(ValueError, match=r"eps_negative: expected x's shape .* got \(2, 2, 5, 7\)"):
        nfsd_loss(x, cond, uncond, negative[:2], t, weight)
    with pytest.raises(TypeError, match=r"t: expected integer timesteps, got torch\.float32"):
        nfsd_loss(x, cond, uncond, negative, t.float(), weight)
    with pytest.raises(TypeError, match=r"t: expected integer timesteps, got 0\.5"):
        nfsd_loss(x, cond, uncond, negative, 0.5, weight)
    with pytest.raises(ValueError, match=r"weight: expected shape \(\) or \(3,\), one per sample, got \(2,\)"):
        nfsd_loss(x, cond, uncond, negative, t, weight[:2])
