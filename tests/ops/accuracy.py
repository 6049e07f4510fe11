"""The honest tolerance: at most twice the error that PyTorch itself makes in the same dtype, plus half a rounding."""

import torch

# Half an eps of a 16-bit dtype; float32 leaves room for another order of summation.
ATOL = {torch.float32: 2e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
ATOL_FLOAT32_LARGE_MEAN = 1e-5  # |mean| / std > 10


def assert_close_to_exact(ours, exact, torchs, dtype, *, large_mean=False, slack=1.0, what=""):
    """ours and torchs: results in `dtype` arithmetic; exact: the same in float64."""
    exact = exact.double()
    atol = ATOL_FLOAT32_LARGE_MEAN if large_mean and dtype == torch.float32 else ATOL[dtype]
    scale = max(1.0, exact.abs().max().item()) if exact.numel() else 1.0
    bound = 2 * (torchs.double() - exact).abs().max().item() + slack * atol * scale if exact.numel() else 0.0
    error = (ours.double() - exact).abs().max().item() if exact.numel() else 0.0
    assert error <= bound, f"{what}: error {error:.3e}, allowed {bound:.3e}"
    assert ours.shape == exact.shape
