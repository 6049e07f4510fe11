"""ADD's heads against a plain recomputation, their normalisation's groups, and R1 that sees one spectral norm."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from fastdistill.training.discriminator import BatchNormLocal, Discriminator, Head, groups_of

from fastdistill.losses import frozen_state, r1_penalty


def circular(x, kernel):
    """x (B, C, L) with what the far end has, as many places as the kernel reaches over."""
    reach = kernel // 2
    return torch.cat([x[:, :, x.shape[2] - reach :], x, x[:, :, :reach]], 2) if reach else x


def plain_block(block, x, group_size):
    conv, norm = block[0], block[1]
    weight = conv.parametrizations.weight.original
    matrix, buffers = weight.flatten(1), conv.parametrizations.weight[0]
    weight = weight / (buffers._u @ matrix @ buffers._v)
    x = F.conv1d(circular(x, weight.shape[2]), weight, conv.bias)
    for first in range(0, len(x), group_size):
        group = x[first : first + group_size]
        mean = group.mean((0, 2), keepdim=True)
        deviation = (group.square().mean((0, 2), keepdim=True) - mean.square() + norm.eps).sqrt()
        x = torch.cat([x[:first], (group - mean) / deviation, x[first + group_size :]])
    x = x * norm.weight[:, None] + norm.bias[:, None]
    return torch.where(x > 0, x, 0.2 * x)


@pytest.mark.parametrize("conditioned", [True, False])
def test_a_head_is_what_the_paper_says_recomputed_in_plain_steps(conditioned):
    head = Head(6, 5 if conditioned else 0).double().eval()
    for norm in (head.block[1], head.residual[1]):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    x, told = torch.randn(12, 6, 10).double(), torch.randn(12, 5).double()
    h = plain_block(head.block, x, 6)  # 12 samples make two groups of 6
    h = (plain_block(head.residual, h, 6) + h) / math.sqrt(2)
    vectors = head.out.parametrizations.weight[0]
    weight = head.out.parametrizations.weight.original
    weight = weight / (vectors._u @ weight.flatten(1) @ vectors._v)
    out = torch.einsum("oc,bcl->bol", weight[:, :, 0], h) + head.out.bias[:, None]
    if conditioned:
        assert out.shape[1] == 64
        compared = told @ head.project.weight.T + head.project.bias
        expected = (out * compared[:, :, None]).sum(1) / 8
        torch.testing.assert_close(head(x, told), expected)
    else:
        torch.testing.assert_close(head(x), out[:, 0])


def test_each_layer_has_a_head_of_its_own():
    discriminator = Discriminator([4, 6], condition_width=3).eval()
    features, told = [torch.randn(2, 4, 9), torch.randn(2, 6, 16)], torch.randn(2, 3)
    logits = discriminator(features, told)
    assert [tuple(each.shape) for each in logits] == [(2, 9), (2, 16)]
    torch.testing.assert_close(logits[1], discriminator.heads[1](features[1], told))


@pytest.mark.parametrize(("batch", "groups"), [(2, 1), (8, 1), (10, 2), (12, 2), (16, 2), (64, 8)])
def test_groups_are_as_few_as_hold_eight_samples_each(batch, groups):
    assert groups_of(batch) == groups


def test_a_batch_that_cannot_be_divided_says_which_can():
    with pytest.raises(ValueError, match=r"batch size 17 makes 3 groups .* not divisible by 3; .* smaller that is: 16"):
        BatchNormLocal(4)(torch.randn(17, 4, 5))


def test_batch_normalisation_is_over_eight_neighbours_and_their_tokens_alone():
    x = torch.randn(16, 3, 5).double() * 3 + 1
    norm = BatchNormLocal(3).double()
    plain = torch.nn.BatchNorm1d(3, track_running_stats=False).double().train()
    both = torch.cat([plain(x[:8]), plain(x[8:])])
    torch.testing.assert_close(norm(x), both)
    other = x.clone()
    other[8:] = 100 * torch.randn(8, 3, 5).double()
    torch.testing.assert_close(norm(other)[:8], both[:8])


def test_a_batch_of_one_warns_and_only_once():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        head = Head(4)
        for _ in range(3):
            head(torch.randn(1, 4, 9))
    assert len([w for w in seen if "a batch of 1" in str(w.message) and "hinge" in str(w.message)]) == 1


@pytest.mark.parametrize("mode", ["exact", "approximate", "finite_difference"])
def test_a_penaltys_forward_passes_see_one_spectral_norm_and_leave_it(mode):
    discriminator = Discriminator([4, 4])
    features = [torch.randn(8, 4, 9), torch.randn(8, 4, 9)]
    for _ in range(50):
        discriminator(features)  # the power iteration settles
    before = {name: value.clone() for name, value in discriminator.named_buffers()}
    assert before
    seen = []
    hook = discriminator.heads[0].block[0].register_forward_pre_hook(lambda conv, _: seen.append(conv.weight.detach()))
    r1_penalty(lambda tokens: discriminator(tokens), features, gamma=1.0, mode=mode).backward()
    hook.remove()
    assert len(seen) == {"exact": 1, "approximate": 2, "finite_difference": 3}[mode]
    assert all(torch.equal(weight, seen[0]) for weight in seen)
    assert all(torch.equal(value, before[name]) for name, value in discriminator.named_buffers())


def test_the_finite_difference_gradient_is_the_exact_penaltys_through_the_groups_statistics():
    discriminator = Discriminator([4], condition_width=3).double()
    told, features = torch.randn(8, 3).double(), [torch.randn(8, 4, 9).double()]
    gradients = []
    with frozen_state(discriminator):
        for mode in ("exact", "finite_difference"):
            discriminator.zero_grad()
            settings = {"gamma": 1.0, "mode": mode, "step": 1e-4 if mode == "finite_difference" else None}
            r1_penalty(lambda tokens: discriminator(tokens, told), features, **settings).backward()
            moved = [torch.zeros_like(p) if p.grad is None else p.grad for p in discriminator.parameters()]
            gradients.append(torch.cat([gradient.flatten() for gradient in moved]))
    # LeakyReLU has kinks, which the two sides of a step may fall on different sides of.
    assert (gradients[0] - gradients[1]).norm() < 1e-2 * gradients[0].norm()


@pytest.mark.parametrize(
    ("features", "condition", "message"),
    [
        ([torch.zeros(2, 4, 9)], None, "features: 1 layers; these heads were made for 2"),
        ([torch.zeros(2, 4, 9)] * 2, None, "condition: got none; this head needs one"),
    ],
)
def test_what_does_not_fit_is_named(features, condition, message):
    with pytest.raises(ValueError, match=message):
        Discriminator([4, 4], condition_width=3)(features, condition)
    with pytest.raises(ValueError, match="condition: got one; this head needs none"):
        Discriminator([4])([torch.zeros(2, 4, 9)], torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"widths: .* got none"):
        Discriminator([])
