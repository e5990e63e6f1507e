"""Affine maps, observers, rounding: what is promised of each by itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.analysis.layer_moments import Moments
from fxopt.analysis.value_spreads import Observer, Spread, affine_of
from fxopt.errors import InputError
from fxopt.integer_limits import IntegerLimits
from fxopt.integer_scheme import INT8, UINT8, IntegerType
from fxopt.quantization import Affine, QuantizedTensor, dequantize, quantize
from fxopt.rounding import rounded

numbers = st.floats(-1e6, 1e6, allow_nan=False, width=32)


@settings(max_examples=60, deadline=None)
@given(st.tuples(numbers, numbers), st.sampled_from([UINT8, INT8]), st.floats(0, 1))
def test_what_is_in_range_is_off_by_half_a_step_at_most(
    ends: tuple[float, float], kind: IntegerType, share: float
) -> None:
    affine = Affine.over(kind, min(ends), max(ends))
    assert affine == Affine.from_json(affine.to_json())
    low, high = affine.range
    x = torch.tensor([low + share * (high - low), 0.0])
    back = dequantize(quantize(x, *affine.arguments), *affine.arguments)
    assert torch.allclose(back, affine.rounded(x), rtol=1e-5, atol=1e-6 * affine.scale)
    assert float((back - x).abs().max()) <= affine.scale * (0.5 + 1e-3) + 1e-6 * float(x.abs().max())
    assert float(back[1]) == 0.0


def test_a_tensor_of_integers() -> None:
    weight = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    scale = weight.abs().amax((1, 2)) / 127
    held = QuantizedTensor((weight / scale.reshape(4, 1, 1)).round().to(torch.int8), scale)
    assert float((held() - weight).abs().max()) <= float(scale.max()) / 2 * 1.001
    assert sorted(held.state_dict()) == ["codes", "scale"]


def spread_of(*parts: torch.Tensor) -> Spread:
    spread = Spread()
    for part in parts:
        spread.add(part)
    return spread


def test_a_histogram_does_not_depend_on_the_order_of_what_it_saw() -> None:
    generator = torch.Generator().manual_seed(0)
    small, large = torch.randn(1000, generator=generator), 37 * torch.randn(1000, generator=generator)
    spread = spread_of(small, large, torch.zeros(0))
    middles, counts = spread.bins()
    assert (spread.count, float(counts.sum())) == (2000, 2000.0)
    both = torch.cat([small, large]).double()
    assert (spread.low, spread.high) == (float(both.min()), float(both.max()))
    # no number is further from the middle of its bin than half of a bin
    expanded = torch.repeat_interleave(middles, counts.long())
    assert float((expanded - both.sort().values).abs().max()) < 4 * both.abs().max() / 8192


@pytest.mark.parametrize("kind", [UINT8, INT8])
@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse", "entropy"])
def test_observers(observer: Observer, kind: IntegerType) -> None:
    bulk = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    values = torch.cat([bulk, torch.tensor([60.0])])
    affine = affine_of(spread_of(values), kind, observer)
    whole = Affine.over(kind, float(values.min()), float(values.max()))
    if observer == "minmax":
        assert affine == whole
        return
    if observer == "mse":
        errors = [float((each.rounded(values) - values).square().mean()) for each in (affine, whole)]
        assert errors[0] < 0.9 * errors[1]
    else:
        assert affine.scale < 0.5 * whole.scale, "a single outlier does not stretch the range"


def test_values_of_one_sign_use_all_integers() -> None:
    affine = affine_of(spread_of(torch.rand(5000, generator=torch.Generator().manual_seed(0))), UINT8, "mse")
    assert affine.zero_point == 0
    assert affine.range[1] > 0.97


def test_nothing_but_zeros_and_nothing_at_all() -> None:
    affine = affine_of(spread_of(torch.zeros(5)), UINT8, "mse")
    assert (affine.scale, affine.zero_point) == (2.0**-8, 0)
    with pytest.raises(InputError, match="no numbers"):
        affine_of(Spread(), UINT8, "mse")


def moments(seed: int, length: int, groups: int = 1) -> tuple[torch.Tensor, Moments]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(groups, 400, length, generator=generator, dtype=torch.float64)
    rows = rows @ torch.randn(groups, length, length, generator=generator, dtype=torch.float64) + 0.5
    mean = rows.mean(1)
    around = rows - mean.unsqueeze(1)
    return rows, Moments(mean, around.transpose(1, 2) @ around / rows.shape[1], 1e-4)


@pytest.mark.parametrize("groups", [1, 3])
def test_gptq_loses_less_than_the_nearest_and_the_bias_takes_up_the_mean(groups: int) -> None:
    rows, seen = moments(0, 150, groups)
    weight = torch.randn(groups, 150, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    errors = []
    for how in ("nearest", "gptq"):
        found = rounded(weight, IntegerLimits(7), seen, how=how)  # type: ignore[arg-type]
        assert float(found.codes.abs().max()) <= 7
        assert torch.equal(found.codes, found.codes.round())
        lost = rows @ (weight - found.codes * found.scale) - found.offset.reshape(groups, 1, -1)
        assert float(lost.mean(1).abs().max()) < 1e-9
        errors.append(float(lost.square().mean()))
    assert errors[1] < 0.6 * errors[0]


def test_weights_of_so_many_values_lose_nothing() -> None:
    _, seen = moments(0, 20)
    scale = torch.tensor([0.25, 0.5, 2.0], dtype=torch.float64)
    codes = torch.randint(-7, 8, (1, 20, 3), generator=torch.Generator().manual_seed(0)).double()
    codes[:, 0] = 7
    for how in ("nearest", "gptq"):
        found = rounded(codes * scale, IntegerLimits(7), seen, how=how)  # type: ignore[arg-type]
        assert torch.equal(found.codes, codes)
        assert torch.allclose(found.codes * found.scale, codes * scale)


@pytest.mark.parametrize("per_channel", [True, False])
def test_outputs_without_weights_have_the_scale_of_the_others(per_channel: bool) -> None:
    weight = torch.randn(1, 9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[:, :, 1] = 0
    scale = rounded(weight, IntegerLimits(127), None, per_channel=per_channel).scale
    assert float(scale.min()) == pytest.approx(float(scale.max()), rel=1.0)
    assert not bool(rounded(weight, IntegerLimits(127), None, per_channel=per_channel).codes[:, :, 1].any())


def test_a_weight_of_zeros() -> None:
    found = rounded(torch.zeros(1, 9, 2, dtype=torch.float64), IntegerLimits(127), None)
    assert not bool(found.codes.any())
    assert bool(found.scale.isfinite().all())
