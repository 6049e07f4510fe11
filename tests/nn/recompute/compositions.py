"""What the tests of recompute ask of a composition: its bits, its gradients, the bytes it keeps."""

import torch


def leaves_of(inputs, frozen=()):
    return [t if t is None or i in frozen else t.detach().clone().requires_grad_() for i, t in enumerate(inputs)]


def run(function, inputs, frozen=(), **settings):
    """(result, gradients of the inputs that need one)."""
    leaves = leaves_of(inputs, frozen)
    y = function(*leaves, **settings)
    torch.manual_seed(1)
    return y.detach(), torch.autograd.grad(
        y, [t for t in leaves if t is not None and t.requires_grad], torch.randn_like(y)
    )


def assert_equal_bits(ours, plain):
    assert torch.equal(ours[0], plain[0])
    assert len(ours[1]) == len(plain[1])
    for a, b in zip(ours[1], plain[1]):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def kept(function, *inputs, **settings):
    """The bytes of each piece of memory that autograd keeps, those of parameters left out."""
    parameters = {t.untyped_storage()._cdata for t in inputs if isinstance(t, torch.nn.Parameter)}
    found = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage._cdata not in parameters:
            found[storage._cdata] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(*inputs, **settings)  # alive until all are counted, or their memory might be used twice
    del y
    return sorted(found.values())


def under_autocast(function):
    def call(*inputs, **settings):
        with torch.autocast("cpu", torch.bfloat16):
            return function(*inputs, **settings)

    return call


def check_second_derivatives(ours, plain, inputs, frozen=()):
    def penalty(function):
        leaves = leaves_of(inputs, frozen)
        trained = [t for t in leaves if t is not None and t.requires_grad]
        grads = torch.autograd.grad(function(*leaves).square().sum(), trained, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), trained)

    torch.testing.assert_close(penalty(ours), penalty(plain), rtol=1e-4, atol=1e-3)
