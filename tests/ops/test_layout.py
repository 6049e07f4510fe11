"""Which tensors can be read together, sample by sample, in the order of memory."""

import torch

from fastdistill.ops._layout import samples_in_step


def test_tensors_of_one_order_are_in_step():
    contiguous = torch.empty(3, 4, 65, 63)
    last = contiguous.to(memory_format=torch.channels_last)
    video = torch.empty(2, 4, 5, 6, 7).to(memory_format=torch.channels_last_3d)
    assert samples_in_step(contiguous, contiguous.clone())
    assert samples_in_step(last, last.clone())
    assert samples_in_step(video, video.clone())
    assert samples_in_step(torch.empty(5, 7), torch.empty(5, 7))
    assert samples_in_step(torch.empty(5))
    assert not samples_in_step(contiguous, last)


def test_samples_may_lie_apart_but_not_upon_each_other():
    wide = torch.empty(3, 8, 6, 5)
    assert samples_in_step(wide[:, :4], wide[:, 4:], torch.empty(3, 4, 6, 5))
    assert samples_in_step(wide[::2], torch.empty(2, 8, 6, 5))
    assert not samples_in_step(torch.empty(1, 4, 6, 5).expand(3, -1, -1, -1))
    assert samples_in_step(torch.empty(1, 4, 6, 5).expand(1, -1, -1, -1))


def test_samples_with_gaps_are_not_in_step():
    assert not samples_in_step(torch.empty(3, 4, 6, 10)[..., :5])
    assert not samples_in_step(torch.empty(3, 4, 6, 1).expand(-1, -1, -1, 5))


def test_strides_of_dimensions_of_one_element_do_not_matter():
    a = torch.empty(2, 1, 8, 8)
    b = torch.empty(2, 8, 8, 1).permute(0, 3, 1, 2)
    assert a.stride() != b.stride()
    assert samples_in_step(a, b)
    assert samples_in_step(torch.empty(0, 4, 8, 8))
    assert not samples_in_step(torch.empty(2, 4, 8, 8), torch.empty(2, 4, 8, 9))
