"""What counts as rounding where a graph and its model differ."""

import torch

from lrpfx.capture.checks.faithful import rounded


def test_numbers_are_rounded_in_either_direction_and_the_same_each_time() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.rand(50, dtype=dtype) + 0.5
        before = torch.random.get_rng_state()
        changed = rounded(x)
        assert torch.equal(before, torch.random.get_rng_state())
        more = (changed.double() / x.double() - 1) / torch.finfo(dtype).eps
        assert ((more.abs() > 0.5) & (more.abs() < 4)).all()
        assert (more > 0).any() and (more < 0).any()
        assert torch.equal(changed, rounded(x))


def test_what_is_no_floating_tensor_stays() -> None:
    ids = torch.arange(3)
    assert rounded(ids) is ids and rounded("sum") == "sum"
