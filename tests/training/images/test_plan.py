"""Which images a batch holds: every one in its turn, in any bucket, from any place."""

from collections import Counter

import pytest
import torch
from fastdistill.training.data import shuffled
from fastdistill.training.images import Plan

MEMBERS = [torch.arange(0, 23), torch.arange(23, 30), torch.tensor([], dtype=torch.int64), torch.tensor([30])]


def test_one_bucket_is_taken_in_the_order_of_the_shuffled_data():
    plan = Plan([torch.arange(10)], seed=3)
    batches = torch.cat([plan.batch(number, 4)[1] for number in range(9)])
    assert torch.equal(batches, shuffled(0, 36, 10, seed=3))


@pytest.mark.parametrize("size", [1, 3, 4, 16])
def test_no_image_is_left_out_whatever_its_bucket_and_none_comes_twice_before_the_others(size):
    plan = Plan(MEMBERS)
    total = sum(map(len, MEMBERS))
    seen, streams = Counter(), {}
    for number in range(40 * total // size):
        bucket, chosen = plan.batch(number, size)
        assert set(chosen.tolist()) <= set(MEMBERS[bucket].tolist())
        seen.update(chosen.tolist())
        streams.setdefault(bucket, []).extend(chosen.tolist())
    for bucket, stream in streams.items():
        length = len(MEMBERS[bucket])
        for first in range(0, len(stream) - length + 1, length):
            assert sorted(stream[first : first + length]) == MEMBERS[bucket].tolist()
    assert set(seen) == set(range(total))
    assert max(seen.values()) - min(seen.values()) <= size + 1  # what a bucket still owes is less than a batch


def test_a_batch_depends_on_its_number_alone_and_the_buckets_are_mixed():
    there, back = Plan(MEMBERS), Plan(MEMBERS)
    forward = [there.batch(number, 4) for number in range(50)]
    backward = [back.batch(number, 4) for number in reversed(range(50))][::-1]
    for (bucket, chosen), (other_bucket, other) in zip(forward, backward):
        assert bucket == other_bucket
        assert torch.equal(chosen, other)
    assert len({bucket for bucket, _ in forward[:7]}) > 1
    other_seed = [Plan(MEMBERS, seed=1).batch(number, 4)[0] for number in range(50)]
    assert other_seed != [bucket for bucket, _ in forward]
