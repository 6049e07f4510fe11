"""The cache of cross-attention keys and values: what it computes, and that it is never stale."""

import copy
import threading

import pytest
import torch
from torch.nn import functional as F

from fastdistill.engine.attention import DirectAttention
from fastdistill.engine.context import CrossAttentionCache
from fastdistill.engine.passes._replace import named_parts
from fastdistill.engine.passes.direct_attention import apply as direct_attention

from .conftest import TEXT_WIDTH, build_unet
from .test_passes import NETWORK_PASSES, parts_of, predict, relative_error, unet_inputs

DOUBLE = {"dtype": torch.float64}


def cross_attentions():
    class Parts:
        networks = {"UNet": build_unet().double()}  # noqa: RUF012

    direct_attention(Parts)
    found = [child for _, _, child in named_parts(Parts.networks["UNet"], DirectAttention) if child.cross]
    assert len(found) == 6
    return found


def context(seed=0, tokens=7):
    return torch.randn(1, tokens, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed), **DOUBLE)


@pytest.fixture
def products(monkeypatch):
    """How many projections were computed."""
    calls = []
    monkeypatch.setattr(
        "fastdistill.engine.context.F.linear",
        lambda *args, linear=F.linear: (calls.append(args[0].shape), linear(*args))[1],
    )
    return calls


def test_every_attention_reads_its_own_keys_and_values():
    attentions = cross_attentions()
    projections = [attention.joint for attention in attentions]
    cache = CrossAttentionCache(attentions, 4)
    given = [context(1), context(2)]
    projected = cache(given)
    assert projected.shape == (2, 7, cache.width)
    for attention, projection in zip(attentions, projections):
        exact = projection(torch.cat(given))
        torch.testing.assert_close(attention.joint(projected), exact, rtol=1e-12, atol=1e-12)
        assert attention.joint(projected).untyped_storage().data_ptr() == projected.data_ptr()  # not copied


def test_attentions_with_and_without_biases_may_be_mixed():
    attentions = cross_attentions()
    for index, attention in enumerate(attentions[::2]):
        attention.joint.bias = torch.nn.Parameter(torch.randn(len(attention.joint.weight), **DOUBLE) + index)
    projections = [attention.joint for attention in attentions]
    projected = CrossAttentionCache(attentions, 4)([context()])
    for attention, projection in zip(attentions, projections):
        torch.testing.assert_close(attention.joint(projected), projection(context()), rtol=1e-12, atol=1e-12)


def test_a_prompt_is_projected_once_and_alone(products):
    cache = CrossAttentionCache(cross_attentions(), 4)
    one, two = context(1), context(2)
    together = cache([one, two, one])
    assert products == [one.shape] * 2
    assert torch.equal(cache([two]), together[1:2])
    assert torch.equal(cache([one, one]), together[[0, 2]])
    assert len(products) == 2


def test_the_prompts_used_last_are_kept(products):
    cache = CrossAttentionCache(cross_attentions(), 2)
    one, two, three = (context(seed) for seed in range(3))
    for each in (one, two, one, three):  # drops two
        cache([each])
    assert len(cache) == 2
    assert len(products) == 3
    cache([one])
    assert len(products) == 3
    cache([two])
    assert len(products) == 4
    cache.clear()
    assert len(cache) == 0
    cache([two])
    assert len(products) == 5


def test_without_capacity_nothing_is_kept(products):
    cache = CrossAttentionCache(cross_attentions(), 0)
    one = context()
    assert torch.equal(cache([one, one]), cache([one, one]))
    assert len(cache) == 0
    assert len(products) == 2  # one a call


def test_another_tensor_is_another_prompt_even_in_the_same_memory(products):
    cache = CrossAttentionCache(cross_attentions(), 4)
    for seed in range(20):
        given = context(seed)
        torch.testing.assert_close(cache([given]), F.linear(given, cache._weight, cache._bias))
        del given
    products.clear()
    one = context(1)
    cache([one])
    cache([one.clone()])
    cache([one.view_as(one)])
    assert len(products) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda cache, given: given.add_(1),
        lambda cache, given: given[:, 3].zero_(),
        lambda cache, given: cache._weight.mul_(2),
        lambda cache, given: cache._weight[5:9].mul_(2),
        lambda cache, given: cache.replace(2, torch.ones_like(cache._weight[cache._columns[2]])),
    ],
    ids=["prompt", "part of the prompt", "weights", "some weights", "replace"],
)
def test_what_was_made_from_other_values_is_not_given_out(change):
    cache = CrossAttentionCache(cross_attentions(), 4)
    given = context()
    before = cache([given])
    change(cache, given)
    after = cache([given])
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, F.linear(given, cache._weight, cache._bias), rtol=0, atol=0)


def test_replaced_weights_are_those_of_one_attention():
    attentions = cross_attentions()
    cache = CrossAttentionCache(attentions, 4)
    given = context()
    before = cache([given])
    weight = torch.randn_like(cache._weight[cache._columns[3]])
    cache.replace(3, weight)
    after = cache([given])
    for index, attention in enumerate(attentions):
        changed = not torch.equal(attention.joint(after), attention.joint(before))
        assert changed == (index == 3)
    torch.testing.assert_close(attentions[3].joint(after), F.linear(given, weight))
    with pytest.raises(ValueError, match=r"weight: needs shape \(.*\), got \(2, 3\)"):
        cache.replace(3, torch.ones(2, 3))
    with pytest.raises(ValueError, match="bias: these attentions have none"):
        cache.replace(3, weight, torch.ones(len(weight)))


def test_weights_are_replaced_under_inference_mode_too():
    with torch.inference_mode():
        cache = CrossAttentionCache(cross_attentions(), 4)
        given = context()
        before = cache([given])
        cache.replace(0, 2 * cache._weight[cache._columns[0]])
        assert not torch.equal(cache([given]), before)


def test_a_context_that_was_not_projected_is_refused():
    attentions = cross_attentions()
    cache = CrossAttentionCache(attentions, 4)
    with pytest.raises(ValueError, match=rf"reads {cache.width} projected values per token .* got {TEXT_WIDTH}"):
        attentions[0](torch.randn(1, 4, attentions[0].q.in_features, **DOUBLE), context())


def test_threads_that_share_it_get_what_they_would_get_alone():
    cache = CrossAttentionCache(cross_attentions(), 3)
    given = [context(seed) for seed in range(5)]
    alone = [F.linear(each, cache._weight, cache._bias) for each in given]
    wrong = []

    def work(start):
        for turn in range(60):
            index = (start + turn * 3) % 5
            if not torch.equal(cache([given[index]]), alone[index]):
                wrong.append(index)
            if turn % 20 == 19:
                cache.clear()

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(cache) <= 3


@torch.no_grad()
def test_the_weights_are_moved_not_doubled(make_pipeline):
    plain, _ = parts_of(make_pipeline, NETWORK_PASSES)
    cached, _ = parts_of(make_pipeline, (*NETWORK_PASSES, "cross_attention_cache"))

    def values(parts):
        return sum(parameter.numel() for parameter in parts.unet.parameters())

    assert values(cached) + cached.context._weight.numel() == values(plain)


@torch.no_grad()
def test_a_cross_attention_that_reads_the_prompt_itself_keeps_the_pass_off(make_pipeline):
    unet = build_unet().double()
    attention = next(m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock").attn2

    class Own(type(attention.processor)):
        pass

    attention.set_processor(Own())
    parts, reports = parts_of(make_pipeline, (*NETWORK_PASSES, "cross_attention_cache"), unet=copy.deepcopy(unet))
    assert parts.context is None
    assert "1 modules of the UNet may read the prompt itself" in str(reports[-1])
    x, given = unet_inputs()
    exact = unet(x, torch.tensor(999), given).sample
    assert relative_error(predict(parts, x, torch.tensor(999), given), exact) < 1e-10
