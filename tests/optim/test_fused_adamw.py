"""FusedAdamW against torch's AdamW, clip_grad_norm_ and an EMA by hand; state dicts; skipped steps; bad input."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from fastdistill.optim import FusedAdamW
from tests.optim.networks import assert_same, averages, gradients_like, network, set_gradients, two_groups

on_every_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


class Plain:
    """What FusedAdamW replaces."""

    def __init__(self, params, max_grad_norm, ema, ema_decay, **kwargs):
        self.optimizer = torch.optim.AdamW(params, **kwargs)
        self.params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.max_grad_norm, self.ema, self.ema_decay = max_grad_norm, ema, ema_decay

    def step(self):
        norm = nn.utils.clip_grad_norm_(self.params, self.max_grad_norm)
        self.optimizer.step()
        for average, p in zip(self.ema, self.params):
            average.lerp_(p.detach().float(), 1 - self.ema_decay)
        return norm


# ---- the same numbers -----------------------------------------------------------------------------------------------


@on_every_backend
def test_200_steps_equal_adamw_with_clipping_and_an_average(backend):
    ours, plain = network(), network()
    ema, plain_ema = averages(ours), averages(plain)
    kwargs = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6}
    fused = FusedAdamW(two_groups(ours), ema=ema, ema_decay=0.98, max_grad_norm=1.0, backend=backend, **kwargs)
    other = Plain(two_groups(plain), 1.0, plain_ema, 0.98, **kwargs)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200) for optimizer in (fused, other.optimizer)]
    for step in range(200):
        # Some have none now and then; the norm is on both sides of the bound.
        gradients = gradients_like(ours, step, absent=step % 3 == 1)
        set_gradients(ours, gradients)
        set_gradients(plain, gradients)
        norm = other.step()
        fused.step()
        torch.testing.assert_close(fused.grad_norm, norm)
        for schedule in schedules:
            schedule.step()
    assert_same(ours.parameters(), plain.parameters(), 2e-5)
    assert_same(ema, plain_ema, 2e-5)
    for p, q in zip(ours.parameters(), plain.parameters()):
        assert fused.state[p]["step"] == other.optimizer.state[q]["step"]
    assert fused.skipped == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_16_bits_follow_float32_ones(dtype):
    ours, plain = network(dtype), network()
    for p, q in zip(ours.parameters(), plain.parameters()):
        q.data.copy_(p)
    ema, plain_ema = averages(ours), averages(plain)
    fused = FusedAdamW(ours.parameters(), lr=1e-2, ema=ema, max_grad_norm=1.0)
    other = Plain(plain.parameters(), 1.0, plain_ema, 0.999, lr=1e-2)
    for step in range(50):
        gradients = [g.to(dtype) for g in gradients_like(ours, step)]
        set_gradients(ours, gradients)
        set_gradients(plain, [g.float() for g in gradients])
        fused.step()
        other.step()
    assert_same([fused.state[p]["master"] for p in ours.parameters()], plain.parameters(), 2e-5)
    assert_same(ema, plain_ema, 2e-5)
    assert all(
        torch.equal(p, q.to(dtype))
        for p, q in zip(ours.parameters(), [fused.state[p]["master"] for p in ours.parameters()])
    )


def test_float64_is_computed_in_float64():
    ours, plain = network(torch.float64), network(torch.float64)
    fused, other = FusedAdamW(ours.parameters()), torch.optim.AdamW(plain.parameters())
    for step in range(5):
        gradients = [g.double() for g in gradients_like(ours, step)]
        set_gradients(ours, gradients)
        set_gradients(plain, gradients)
        fused.step()
        other.step()
    assert_same(ours.parameters(), plain.parameters(), 1e-13)


def test_gradients_in_another_order_of_memory_and_parameters_with_gaps():
    image = nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last))
    spread = nn.Parameter(torch.randn(6, 10)[:, ::2])
    plain = [nn.Parameter(p.detach().clone()) for p in (image, spread)]
    ema = [torch.zeros(8, 4, 3, 3), torch.zeros(6, 5)]
    fused, other = FusedAdamW([image, spread], ema=ema, ema_decay=0.5), torch.optim.AdamW(plain)
    plain_ema = [torch.zeros_like(t) for t in ema]
    for _ in range(3):
        for p, q in zip((image, spread), plain):
            q.grad = torch.randn(p.shape)
            p.grad = q.grad.clone()
        fused.step()
        other.step()
        for average, q in zip(plain_ema, plain):
            average.lerp_(q.detach(), 0.5)
    assert_same([image, spread], plain, 1e-6)
    assert_same(ema, plain_ema, 1e-6)
    assert fused.state[image]["exp_avg"].stride() == image.stride()


def test_the_average_of_a_parameter_without_a_gradient_goes_on():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    ema = [torch.zeros(3), torch.zeros(3)]
    fused = FusedAdamW([p, q], lr=0.0, ema=ema, ema_decay=0.75)
    p.grad = torch.ones(3)
    fused.step()
    assert torch.equal(ema[0], torch.full((3,), 0.25))
    assert torch.equal(ema[1], torch.full((3,), 0.25))
    fused.ema_decay = torch.tensor(0.5)  # may change, and be a tensor
    fused.step()
    assert torch.equal(ema[1], torch.full((3,), 0.625))
    p.grad.fill_(math.nan)
    fused.step()
    assert torch.equal(ema[1], torch.full((3,), 0.625))
    assert q not in fused.state


def test_closures_return_their_loss_and_a_tensor_is_a_learning_rate():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    fused, other = FusedAdamW([p], lr=torch.tensor(0.1)), torch.optim.AdamW([q], lr=0.1)

    def closure(optimizer, p):
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert fused.step(lambda: closure(fused, p)).item() == 3.0
    other.step(lambda: closure(other, q))
    assert_same([p], [q], 1e-6)


@pytest.mark.parametrize("unscale", [False, True])
def test_a_grad_scaler_unscales_and_skips(unscale):
    ours, plain = network(), network()
    fused, other = FusedAdamW(ours.parameters(), max_grad_norm=1.0), Plain(plain.parameters(), 1.0, [], 0.999)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        gradients = gradients_like(ours, step)
        set_gradients(ours, [g * 1024.0 for g in gradients])
        set_gradients(plain, gradients)
        if step == 2:
            next(ours.parameters()).grad[0] = math.inf
        scaler.scale(torch.ones(()))  # which a loss would have been
        if unscale:
            scaler.unscale_(fused)
        scaler.step(fused)
        if step == 2:
            continue_at = scaler.get_scale()
        else:
            norm = other.step()
            torch.testing.assert_close(fused.grad_norm, norm)
        scaler.update(1024.0)
    assert continue_at == 1024.0
    assert fused.skipped == 1
    assert_same(ours.parameters(), plain.parameters(), 1e-6)


def test_a_compiled_step_takes_the_same_step():
    ours, plain = network(), network()
    fused, other = FusedAdamW(ours.parameters()), FusedAdamW(plain.parameters())
    for net in (ours, plain):
        set_gradients(net, gradients_like(net, 0))
    torch.compile(lambda: fused.step(), backend="eager")()
    other.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), plain.parameters()))


# ---- skipped steps --------------------------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("when", [0, 2])
def test_a_bad_gradient_skips_the_whole_step(backend, bad, when):
    net = network(torch.bfloat16)
    ema = averages(net)
    fused = FusedAdamW(two_groups(net), ema=ema, state_bits=8, backend=backend)
    for step in range(when):
        set_gradients(net, [g.bfloat16() for g in gradients_like(net, step)])
        fused.step()
    set_gradients(net, [g.bfloat16() for g in gradients_like(net, when)])
    before = copy.deepcopy((list(net.parameters()), fused.state_dict(), ema))
    list(net.parameters())[-1].grad[-1] = bad
    fused.step()
    assert fused.skipped == 1
    assert not fused.grad_norm.isfinite()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before[0]))
    assert all(torch.equal(p, q) for p, q in zip(ema, before[2]))
    for key, state in fused.state_dict()["state"].items():
        for name, value in state.items():
            if when:
                assert torch.equal(value, before[1]["state"][key][name])
            elif name != "master":
                assert not value.any()


# ---- state dicts ----------------------------------------------------------------------------------------------------


def through_a_file(state_dict):
    memory = io.BytesIO()
    torch.save(state_dict, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=True)


def test_adamw_and_ours_continue_each_other():
    ours, plain = network(), network()
    fused, other = FusedAdamW(two_groups(ours), lr=1e-2), torch.optim.AdamW(two_groups(plain), lr=1e-2)
    for step in range(12):
        gradients = gradients_like(ours, step)
        set_gradients(ours, gradients)
        set_gradients(plain, gradients)
        fused.step()
        other.step()
        if step % 4 == 3:  # each goes on with the other's
            mine, theirs = through_a_file(fused.state_dict()), through_a_file(other.state_dict())
            assert mine["param_groups"][0].keys() == theirs["param_groups"][0].keys()
            assert mine["state"][0].keys() == theirs["state"][0].keys()
            fused = FusedAdamW(two_groups(ours), lr=1.0)
            other = torch.optim.AdamW(two_groups(plain), lr=1.0)
            fused.load_state_dict(theirs)
            other.load_state_dict(mine)
    assert_same(ours.parameters(), plain.parameters(), 2e-6)


def train(net, optimizer, steps, start=0):
    for step in range(start, start + steps):
        set_gradients(net, [g.to(next(net.parameters()).dtype) for g in gradients_like(net, step)])
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_a_copy_goes_on_bit_for_bit(dtype, bits, how):
    net = network(dtype)
    fused = FusedAdamW(net.parameters(), state_bits=bits, max_grad_norm=1.0, ema=averages(net), ema_decay=0.9)
    train(net, fused, 2)
    if how == "state_dict":
        copied = copy.deepcopy(net)
        other = FusedAdamW(
            copied.parameters(), state_bits=bits, max_grad_norm=1.0, ema=[t.clone() for t in fused.ema], ema_decay=0.9
        )
        other.load_state_dict(through_a_file(fused.state_dict()))
    elif how == "deepcopy":
        copied, other = copy.deepcopy((net, fused))
    else:
        copied, other = pickle.loads(pickle.dumps((net, fused)))
    train(net, fused, 2, 2)
    train(copied, other, 2, 2)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), copied.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(fused.ema, other.ema))
    assert all(
        torch.equal(p, q)
        for a, b in zip(fused.state.values(), other.state.values())
        for p, q in zip(a.values(), b.values())
    )


def test_states_of_other_widths_are_converted():
    net = network(torch.bfloat16)
    fused = FusedAdamW(net.parameters(), state_bits=8)
    train(net, fused, 3)
    wide = fused.to_adamw_state_dict()
    large = max(range(len(wide["state"])), key=lambda i: wide["state"][i]["exp_avg"].numel())
    assert all(state.keys() == {"step", "exp_avg", "exp_avg_sq"} for state in wide["state"].values())
    other = FusedAdamW(net.parameters(), state_bits=32)
    other.load_state_dict(fused.state_dict())
    p = list(net.parameters())[large]
    torch.testing.assert_close(other.state[p]["exp_avg"], wide["state"][large]["exp_avg"], rtol=0, atol=0)
    assert torch.equal(other.state[p]["master"], fused.state[p]["master"])
    narrow = FusedAdamW(net.parameters(), state_bits=8)
    narrow.load_state_dict(wide)
    assert narrow.state[p]["exp_avg_codes"].dtype == torch.uint8
    plain = torch.optim.AdamW(net.parameters())
    plain.load_state_dict(wide)
    plain.step()
    plain.load_state_dict(fused.state_dict())
    with pytest.raises(KeyError, match="exp_avg"):  # codes are never taken for values
        plain.step()


def test_hooks_of_load_state_dict_see_tensors():
    net = network()
    fused = FusedAdamW(net.parameters())
    train(net, fused, 1)
    seen = []
    fused.register_load_state_dict_pre_hook(lambda _, saved: seen.append(saved["state"][0]["exp_avg"]))
    fused.register_load_state_dict_post_hook(lambda o: seen.append(o.state[next(net.parameters())]["exp_avg"]))
    fused.load_state_dict(fused.state_dict())
    assert torch.equal(seen[0], seen[1])
    assert seen[0].data_ptr() != seen[1].data_ptr()


def test_masters_follow_parameters_that_something_else_changed():
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    fused = FusedAdamW([p], lr=0.0)
    p.grad = torch.ones_like(p)
    fused.step()
    with torch.no_grad():
        p.fill_(3.0)
    fused.refresh_masters()
    fused.step()
    assert torch.equal(p, torch.full_like(p, 3.0))


# ---- memory, 8 bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "bits", "expected"),
    [
        (torch.float32, 32, 8.0),
        (torch.float32, 8, 2.03125),
        (torch.bfloat16, 32, 12.0),
        (torch.bfloat16, 8, 6.03125),
        (torch.float16, 8, 6.03125),
        (torch.float64, 8, 16.0),
    ],
)
def test_the_state_takes_as_many_bytes_as_the_docs_say(dtype, bits, expected):
    p = nn.Parameter(torch.zeros(1 << 14, dtype=dtype))
    fused = FusedAdamW([p], state_bits=bits)
    p.grad = torch.ones_like(p)
    fused.step()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in fused.state[p].values()}
    assert (sum(storages.values()) - 4) / p.numel() == expected  # 4: the step


def test_moments_of_8_bits_converge_like_those_of_32():
    # Regression of 128 x 64 weights; gradients of very different sizes in one block.
    torch.manual_seed(1)
    x, target = torch.randn(128, 64) * torch.logspace(-2, 1, 64), torch.randn(64, 128)
    losses = {}
    for bits in (32, 8):
        w = nn.Parameter(torch.zeros(64, 128))
        fused = FusedAdamW([w], lr=2e-2, weight_decay=0.0, state_bits=bits)
        for _ in range(300):
            loss = (x @ (w - target)).square().mean()
            w.grad = torch.autograd.grad(loss, w)[0]
            fused.step()
        losses[bits] = loss.item()
    first = (x @ target).square().mean().item()
    assert losses[32] < 1e-3 * first
    assert losses[8] < 1.1 * losses[32]


def test_small_tensors_keep_float32():
    p = nn.Parameter(torch.zeros(4095))
    fused = FusedAdamW([p], state_bits=8)
    p.grad = torch.ones_like(p)
    fused.step()
    assert fused.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}


# ---- CUDA -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [32, 8])
def test_steps_in_a_cuda_graph_equal_plain_ones(bits):
    ours, plain = network().cuda(), network().cuda()
    lr = torch.tensor(1e-2, device="cuda")
    pair = [
        FusedAdamW(net.parameters(), lr=lr, ema=averages(net), max_grad_norm=1.0, state_bits=bits)
        for net in (ours, plain)
    ]
    gradients = [[g.cuda() for g in gradients_like(ours, step)] for step in range(4)]
    gradients[2][0][0] = math.nan
    for net, optimizer in zip((ours, plain), pair):
        set_gradients(net, gradients[0])
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pair[0].step()
    for step in range(1, 4):
        for p, g in zip(ours.parameters(), gradients[step]):
            p.grad.copy_(g)
        set_gradients(plain, gradients[step])
        lr.mul_(0.5)
        graph.replay()
        pair[1].step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), plain.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(pair[0].ema, pair[1].ema))
    assert pair[0].skipped == pair[1].skipped == 1


# ---- groups and bad input -------------------------------------------------------------------------------------------


def test_a_group_added_later_brings_its_averages():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    ema = [torch.zeros(3), torch.zeros(2)]
    fused = FusedAdamW([p], ema=ema[:1], ema_decay=0.5)
    with pytest.raises(ValueError, match='the group needs "ema"'):
        fused.add_param_group({"params": [q]})
    assert len(fused.param_groups) == 1
    fused.add_param_group({"params": [q], "lr": 0.0, "weight_decay": 0.0, "ema": ema[1:]})
    p.grad, q.grad = torch.ones(3), torch.ones(2)
    fused.step()
    assert torch.equal(ema[1], torch.full((2,), 0.5))
    assert fused.ema[1] is ema[1]


def parameter(dtype=torch.float32):
    return nn.Parameter(torch.zeros(2, 3, dtype=dtype))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr=-1.0: must be at least 0"),
        ({"lr": torch.ones(2)}, ValueError, r"lr: a tensor must have one element, got shape \(2,\)"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas=\(0.9, 1.0\): each must be at least 0 and below 1"),
        ({"betas": (0.9,)}, TypeError, r"betas=\(0.9,\): must be two floats"),
        ({"eps": -1e-8}, ValueError, "eps=-1e-08: must be at least 0"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay=-0.1: must be at least 0"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm=0.0: must be positive, or None"),
        ({"ema_decay": 1.5}, ValueError, "ema_decay=1.5: must be between 0 and 1"),
        ({"state_bits": 4}, ValueError, "state_bits=4: must be 8 or 32"),
        ({"amsgrad": True}, ValueError, "amsgrad=True: is not fused; use torch.optim.AdamW"),
        ({"ema": []}, ValueError, "ema: needs 1 tensors, one for each parameter in their order, got 0"),
        ({"ema": [1.0]}, TypeError, r"ema\[0\]: expected a tensor, got float"),
        ({"ema": [torch.zeros(3, 2)]}, ValueError, r"ema\[0\]: shape \(3, 2\), its parameter has \(2, 3\)"),
        ({"ema": [torch.zeros(2, 3).bfloat16()]}, TypeError, r"ema\[0\]: torch.bfloat16 .*, needs torch.float32"),
        ({"ema": [torch.zeros(2, 3, device="meta")]}, ValueError, r"ema\[0\]: lies on meta, its parameter on cpu"),
    ],
)
def test_bad_input_names_the_argument_the_value_and_the_need(kwargs, error, message):
    with pytest.raises(error, match=message):
        FusedAdamW([parameter()], **kwargs)


def test_bad_parameters_and_gradients_are_named():
    p = parameter()
    with pytest.raises(ValueError, match=r"ema\[0\]: is its parameter's own memory"):
        FusedAdamW([p], ema=[p.data])
    with pytest.raises(TypeError, match=r"params\[0\] of group 0: expected float32, .* got torch.complex64"):
        FusedAdamW([parameter(torch.complex64)])
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"gradient of params\[0\]: expected a dense tensor, got layout"):
        FusedAdamW(embedding.parameters()).step()
    fused = FusedAdamW([p])
    with pytest.raises(ValueError, match="a parameter's state has no 'step'"):
        fused.load_state_dict({**fused.state_dict(), "state": {0: {"momentum_buffer": torch.zeros(2, 3)}}})
    other = torch.optim.AdamW([p], amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad=True: is not fused"):
        fused.load_state_dict(other.state_dict())
