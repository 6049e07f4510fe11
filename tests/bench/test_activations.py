"""What a UNet keeps for its backward pass, counted without computing anything."""

import pytest
import torch
from fastdistill.bench.activations import app, measure
from fastdistill.training.activations import SavedTensors
from typer.testing import CliRunner


def test_recompute_keeps_three_fifths_of_an_sd15_unet_for_no_more_arithmetic():
    plain, patched, recomputed, checkpointed = measure("sd15", 4, 512, torch.bfloat16)
    # 3.49 GiB, counted by hand over the kinds of layers.
    assert plain.saved_bytes == pytest.approx(3.49 * 2**30, rel=2e-3)
    assert patched.saved_bytes < 0.84 * plain.saved_bytes
    assert recomputed.saved_bytes <= 0.60 * plain.saved_bytes
    assert checkpointed.saved_bytes < recomputed.saved_bytes
    assert recomputed.flops < 1.05 * plain.flops
    assert checkpointed.flops > 1.2 * plain.flops


def test_every_piece_of_memory_counts_once_and_what_the_network_owns_not_at_all():
    weight = torch.randn(64, 64, requires_grad=True)
    x = torch.randn(16, 64, requires_grad=True)
    with SavedTensors([weight]) as saved:
        y = (x * 1.0).sin()  # keeps its argument, which the next line's op keeps as well
    assert saved.nbytes == x.nbytes
    with SavedTensors([weight]) as saved:
        z = x @ weight  # keeps x and the weight
        ((z * z) * z[:8, :1].sum()).sum()  # keeps z, a product, a sum and views of z
    assert x.nbytes + 2 * z.nbytes < saved.nbytes < x.nbytes + 2 * z.nbytes + 64
    del y


def test_a_checkpointed_block_keeps_its_inputs():
    x = torch.randn(16, 64, requires_grad=True)
    with SavedTensors() as saved:
        y = saved.checkpoint(lambda t: t.sin().cos().exp(), x)
    assert saved.nbytes == x.nbytes
    y.sum().backward()
    assert torch.allclose(x.grad, -x.sin().cos().exp() * x.sin().sin() * x.cos())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sd3"], "unknown architecture 'sd3'"),
        (["--resolution", "500"], "500: must be a multiple of 8 pixels"),
        (["--dtype", "int8"], "'int8': unknown; known: bfloat16, float16, float32"),
    ],
)
def test_bad_options_name_the_value_and_what_is_known(arguments, message):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.output
