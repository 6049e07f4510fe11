"""The rule of `fastdistill.bench.accuracy`, as an assertion."""

from fastdistill.bench.accuracy import allowed_error


def assert_close_to_exact(ours, exact, torchs, dtype, *, large_mean=False, whole_ulp=False, relative=0.0, what=""):
    """`ours` against `exact` (float64), allowed twice the error of `torchs`, the same in `dtype`, plus the floor.

    whole_ulp: a 16-bit result may be off by a whole unit in the last place instead of half of one.
    relative: allowed besides, of the largest exact value.
    """
    assert ours.shape == exact.shape, what
    if not exact.numel():
        return
    largest = exact.abs().max().item()
    bound = allowed_error((torchs.double() - exact).abs().max().item(), largest, dtype, large_mean=large_mean)
    if whole_ulp:
        bound += allowed_error(0.0, largest, dtype)
    bound += relative * largest
    error = (ours.double() - exact).abs().max().item()
    assert error <= bound, f"{what}: error {error:.3e}, allowed {bound:.3e}"
