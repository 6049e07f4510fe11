"""One product for the projections that read one input: never with other weights than the layers have at that moment."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fastdistill.nn import FusedAttnProcessor, join_projections, joint, patch, unpatch
from fastdistill.nn.joint import products, side_by_side
from tests.nn.test_attention import KINDS, every_kind, inputs, result_and_gradients
from tests.nn.test_patch import assert_same_numbers, every_model, exact_numbers, sd_unet, unet_call
from tests.nn.test_patch import result_and_gradients as model_result_and_gradients


def joined(kind, dtype=torch.float64):
    attn = KINDS[kind]().to(dtype)
    attn.set_processor(FusedAttnProcessor())
    assert join_projections(attn) == 1
    return attn


def weights_of(attn):
    return [attn.to_k.weight, attn.to_v.weight]


def plain_result(attn, tensors):
    return AttnProcessor2_0()(attn, *tensors)


def assert_current(attn, tensors):
    """The result is that of diffusers' own processor with the weights of this moment."""
    torch.testing.assert_close(attn(*tensors), plain_result(attn, tensors), rtol=1e-12, atol=1e-12)


@pytest.fixture
def everywhere(monkeypatch):
    """As on a GPU: `patch` joins here too."""
    monkeypatch.setattr(joint, "_pays", lambda device: True)


@pytest.fixture
def joint_products(monkeypatch):
    """How many products of joint weights were asked for."""
    calls, found = [], joint.side_by_side

    def counted(parameters):
        result = found(parameters)
        calls.extend([] if result is None or result.dim() < 2 else [len(parameters)])
        return result

    monkeypatch.setattr(joint, "side_by_side", counted)
    return calls


# ---- the same numbers ------------------------------------------------------------------------------------------------


@every_kind
def test_joint_projections_have_the_result_and_gradients_of_separate_ones(kind, joint_products):
    attn = KINDS[kind]().double()
    tensors = inputs(kind, torch.float64)
    plain = result_and_gradients(attn, tensors)
    attn.set_processor(FusedAttnProcessor())
    join_projections(attn)
    joint_products.clear()
    torch.testing.assert_close(result_and_gradients(attn, tensors), plain, rtol=1e-12, atol=1e-12)
    assert set(joint_products) == {2 if kind == "cross" else 3}
    with torch.no_grad():
        torch.testing.assert_close(attn(*tensors), plain[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_derivatives_of_both_orders_are_those_of_the_function(bias):
    attn = Attention(query_dim=3, heads=1, dim_head=2, bias=bias).double()
    join_projections(attn)
    layers = (attn.to_q, attn.to_k, attn.to_v)
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    parameters = [p for p in (*weights, *biases) if p is not None]
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def function(x, *_):
        return products(x, weights, biases)

    assert torch.autograd.gradcheck(function, (x, *parameters))
    assert torch.autograd.gradgradcheck(function, (x, *parameters))


@pytest.mark.parametrize("trained", [(), (0,), (2,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("input_needs", [False, True])
def test_any_of_the_weights_may_be_frozen(trained, input_needs):
    attn = joined("with biases")
    layers = (attn.to_q, attn.to_k, attn.to_v)
    for index, layer in enumerate(layers):
        layer.requires_grad_(index in trained)
    x = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=input_needs)
    leaves = [t for t in (x, *(p for layer in layers for p in layer.parameters())) if t.requires_grad]
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    ours, theirs = products(x, weights, biases), tuple(layer(x) for layer in layers)
    torch.testing.assert_close(ours, theirs)
    seeds = [torch.randn_like(y) for y in ours]
    # A part that leads to no leaf has no gradient of its own, but is a view of the joint result.
    if leaves:
        found = torch.autograd.grad(sum((y * s).sum() for y, s in zip(ours, seeds)), leaves)
        torch.testing.assert_close(
            found, torch.autograd.grad(sum((y * s).sum() for y, s in zip(theirs, seeds)), leaves)
        )
    else:
        assert not any(y.requires_grad for y in ours)


def test_keys_and_values_of_a_context_come_from_their_part_of_the_joint_weights(joint_products):
    attn = joined("self")
    tensors = (torch.randn(2, 9, 16).double(), torch.randn(2, 5, 16).double())
    joint_products.clear()
    assert_current(attn, tensors)
    assert joint_products == [2]


def test_an_input_of_no_rows_has_gradients_of_zero():
    attn = joined("self")
    x = torch.empty(0, 9, 16, dtype=torch.float64, requires_grad=True)
    layers = (attn.to_q, attn.to_k, attn.to_v)
    ours = products(x, [layer.weight for layer in layers], [None] * 3)
    assert [tuple(y.shape) for y in ours] == [(0, 9, 16)] * 3
    sum(y.sum() for y in ours).backward()
    assert x.grad.shape == x.shape
    assert all(layer.weight.grad.eq(0).all() for layer in layers)


def test_a_weight_changed_between_forward_and_backward_is_an_error():
    attn, (x,) = joined("self"), inputs("self", torch.float64)
    y = attn(x.requires_grad_())
    with torch.no_grad():
        attn.to_v.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- never with other weights than the layers have -------------------------------------------------------------------

CHANGES = {
    "an optimiser's step": lambda attn: torch.optim.SGD(attn.parameters(), 1.0).step(),
    "weight.data.add_": lambda attn: attn.to_k.weight.data.add_(1),
    "weight.data =": lambda attn: setattr(attn.to_k.weight, "data", torch.randn_like(attn.to_k.weight)),
    "another parameter": lambda attn: setattr(
        attn.to_v, "weight", torch.nn.Parameter(torch.randn_like(attn.to_v.weight))
    ),
    "another layer": lambda attn: setattr(attn, "to_v", copy.deepcopy(attn.to_v).requires_grad_(False)),
    "load_state_dict": lambda attn: attn.load_state_dict(random_state(attn)),
    "load_state_dict(assign=True)": lambda attn: attn.load_state_dict(random_state(attn), assign=True),
    "two weights swapped": lambda attn: swap(attn.to_k.weight, attn.to_v.weight),
    "transposed in place": lambda attn: setattr(attn.to_v.weight, "data", torch.randn(12, 16).double().t()),
    ".to() and back": lambda attn: attn.float().double(),
    "a hook": lambda attn: attn.to_v.register_forward_hook(lambda module, args, y: 3 * y),
    "a forward of its own": lambda attn: setattr(attn.to_v, "forward", lambda x: F.linear(x, 3 * attn.to_v.weight)),
    "weight norm": lambda attn: (
        torch.nn.utils.parametrizations.weight_norm(attn.to_v)
        .parametrizations.weight[0]
        .register_forward_hook(lambda module, args, w: 3 * w)
    ),
}


def random_state(attn):
    return {name: torch.randn_like(value) for name, value in attn.state_dict().items()}


def swap(one, other):
    one.data, other.data = other.data, one.data


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_the_weights_is_seen(change):
    attn, tensors = joined("cross"), inputs("cross", torch.float64)
    assert_current(attn, tensors)
    attn(*tensors).square().sum().backward()
    before = attn(*tensors).detach()
    CHANGES[change](attn)
    assert_current(attn, tensors)
    moved = change in (".to() and back", "another layer")
    assert torch.allclose(attn(*tensors), before, rtol=1e-5, atol=1e-5) == moved


def test_neighbours_by_chance_are_not_joined():
    """The end of one storage may be where another begins; weights of different types or widths are no matrix."""
    memory = torch.randn(64)
    parts = [torch.nn.Parameter(part) for part in memory.view(4, 16).split(2)]
    assert torch.equal(side_by_side(parts), memory.view(4, 16))
    assert side_by_side(parts[::-1]) is None
    assert side_by_side([parts[0], parts[0]]) is None
    assert side_by_side([parts[0], torch.nn.Parameter(memory[32:].view(4, 8))]) is None
    assert side_by_side([parts[0], memory[32:].view(2, 16)]) is None  # no parameter: a function's argument
    assert side_by_side([parts[0], None]) is None
    raw = bytearray(256)
    apart = [torch.frombuffer(memoryview(raw)[at : at + 128], dtype=torch.float32).view(2, 16) for at in (0, 128)]
    assert apart[1].data_ptr() - apart[0].data_ptr() == 128
    assert side_by_side([torch.nn.Parameter(part) for part in apart]) is None


def test_parameters_in_a_buffer_of_somebody_elses_stay_there():
    """As flat parameters of sharded training: their owner would not know."""
    attn = KINDS["self"]()
    flat = torch.zeros(3, 16, 16)
    for index, layer in enumerate((attn.to_v, attn.to_k, attn.to_q)):
        layer.weight.data = flat[index]
    assert join_projections(attn) == 0
    assert attn.to_v.weight.data_ptr() == flat.data_ptr()


def test_parameters_given_to_a_functional_call_are_used():
    attn, tensors = joined("cross"), inputs("cross", torch.float64)
    others = {name: torch.randn_like(p) for name, p in attn.named_parameters()}
    ours = torch.func.functional_call(attn, others, tensors)
    attn.load_state_dict(others)
    torch.testing.assert_close(ours, plain_result(attn, tensors))


# ---- in a model ------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("recompute", [False, True], ids=["patched", "recomputed"])
def test_a_patched_model_with_joint_projections_computes_the_same(make, call, recompute, everywhere, joint_products):
    model = make().train()
    plain, exact = model_result_and_gradients(model, call), exact_numbers(model, call)
    patch(model, recompute=recompute)
    joint_products.clear()
    assert_same_numbers(model_result_and_gradients(model, call), exact, plain)
    assert len(joint_products) >= sum(isinstance(m, Attention) for m in model.modules())


def memory(model):
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())


def are_joined(model):
    return [side_by_side(weights_of(m)) is not None for m in model.modules() if isinstance(m, Attention)]


def test_joint_weights_take_no_more_memory_and_unpatch_parts_them(everywhere):
    model = sd_unet()
    before, plain = memory(model), unet_call(model)
    patch(model)
    assert all(are_joined(model))
    assert memory(model) == before
    unpatch(model)
    assert not any(are_joined(model))
    assert memory(model) == before
    assert torch.equal(unet_call(model), plain)


def test_on_a_cpu_patch_leaves_weights_where_they_are():
    model = sd_unet()
    addresses = [p.data_ptr() for p in model.parameters()]
    patch(model)
    assert [p.data_ptr() for p in model.parameters()] == addresses


def test_moved_copied_and_unpickled_models_stay_joined(everywhere):
    model = sd_unet()
    patch(model)
    assert all(are_joined(model.double()))
    copied = copy.deepcopy(model)
    assert all(are_joined(copied))
    assert memory(copied) == memory(model)
    assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in model.parameters()}
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert all(are_joined(loaded))
    for other in (copied, loaded):
        torch.testing.assert_close(unet_call(other, torch.float64), unet_call(model, torch.float64))


def test_a_joined_model_is_saved_and_loaded_as_any(tmp_path, everywhere):
    model = sd_unet()
    plain = unet_call(model)
    patch(model)
    for name, options in {"one file": {}, "shards": {"max_shard_size": "20KB"}}.items():
        model.save_pretrained(tmp_path / name, **options)
        loaded = type(model).from_pretrained(tmp_path / name)
        assert {k: v.tolist() for k, v in loaded.state_dict().items()} == {
            k: v.tolist() for k, v in model.state_dict().items()
        }
        torch.testing.assert_close(unet_call(loaded), plain)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    (file,) = (tmp_path / "one file").glob("*.safetensors")
    assert file.stat().st_size < 1.5 * 4 * sum(p.numel() for p in model.parameters())


def test_an_optimiser_made_before_trains_the_joined_weights(everywhere):
    models = [sd_unet(), None]
    models[1] = copy.deepcopy(models[0])
    optimisers = [torch.optim.AdamW(model.parameters(), 1e-3) for model in models]
    patch(models[1])
    for _ in range(3):
        for model, optimiser in zip(models, optimisers):
            optimiser.zero_grad()
            unet_call(model).square().sum().backward()
            optimiser.step()
    torch.testing.assert_close(unet_call(models[1]), unet_call(models[0]), rtol=1e-3, atol=1e-3)


def test_compiles_in_one_graph_without_addresses():
    attn, tensors = joined("with biases", torch.float32), inputs("with biases")
    plain = result_and_gradients(attn, tensors)
    compiled = torch.compile(attn.processor.__call__, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(attn, *tensors), plain[0])
    with torch.no_grad():
        attn.to_k.weight.mul_(2)
    torch.testing.assert_close(compiled(attn, *tensors), plain_result(attn, tensors), rtol=1e-4, atol=1e-5)


def test_works_with_gradient_checkpointing(everywhere):
    model = sd_unet().train()
    plain = model_result_and_gradients(model, unet_call)
    patch(model)
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(model_result_and_gradients(model, unet_call), plain, rtol=1e-3, atol=1e-3)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def unet_call_on_gpu(model):
    torch.manual_seed(1)
    torch.randn(2, 8), torch.randn(2, 6)  # what unet_call draws first
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    return model(x.cuda(), torch.tensor([3, 700]).cuda(), context.cuda()).sample


@pytest.mark.gpu
def test_on_a_gpu_a_patched_model_joins_as_it_is_moved_there_and_computes_the_same():
    model = sd_unet()
    exact = model_result_and_gradients(model, unet_call)
    patch(model)
    assert not any(are_joined(model))
    model.to("cuda")
    assert all(are_joined(model))

    found = model_result_and_gradients(model, unet_call_on_gpu)
    for name, value in exact.items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
def test_on_a_gpu_a_recorded_graph_sees_weights_changed_in_place():
    attn = joined("self", torch.float32).cuda()
    join_projections(attn)
    x = torch.randn(2, 9, 16, device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            attn(x)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = attn(x)
        attn.to_v.weight.mul_(2)
        graph.replay()
        torch.testing.assert_close(y, plain_result(attn, (x,)), rtol=1e-3, atol=1e-4)


# ---- in sharded and replicated training ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrap", [fully_shard, DistributedDataParallel])
def test_sharded_and_replicated_models_train_as_they_would_alone(wrap, one_process, everywhere):
    torch.manual_seed(0)
    model = sd_unet().double()
    plain = model_result_and_gradients(copy.deepcopy(model), lambda m: unet_call(m, torch.float64))
    patch(model)
    wrapped = wrap(model)
    y = unet_call(wrapped, torch.float64)
    y.square().sum().backward()
    torch.testing.assert_close(y.detach(), plain["y"])
    for name, parameter in model.named_parameters():
        grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        torch.testing.assert_close(grad, plain[name])
