"""How a model is called: binding, flattening, names, calibration batches, JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from fxopt.errors import InputError
from fxopt.signature import CallArguments, Signature

A, B, C = torch.zeros(2, 1), torch.ones(2, 2), torch.full((2, 3), 2.0)


class Model(nn.Module):
    def forward(self, x: Any, y: Any = None, *rest: Any, scale: float = 1.0, **named: Any) -> Any:
        return x


class Plain(nn.Module):
    def forward(self, image: Any, mask: Any = None) -> Any:
        return image


def of(inputs: Any, model: nn.Module | None = None) -> tuple[Signature, tuple[torch.Tensor, ...]]:
    return Signature.of(model or Model(), inputs)


@pytest.mark.parametrize(
    ("inputs", "names", "leaves"),
    [
        (A, ("x",), [A]),
        ((A, B), ("x", "y"), [A, B]),
        ([A, B], ("x", "y"), [A, B]),
        ({"y": B, "x": A}, ("x", "y"), [A, B]),
        ((A, {"a": B, "b": [C]}), ("x", "y_a", "y_b_0"), [A, B, C]),
        ((A, B, C), ("x", "y", "rest_0"), [A, B, C]),
        ({"x": A, "extra": B}, ("x", "named_extra"), [A, B]),
        (CallArguments((A,), {"scale": 2.0, "mask": B}), ("x", "named_mask"), [A, B]),
        ((A, 7), ("x",), [A]),
    ],
)
def test_inputs_are_bound_like_a_call(inputs: Any, names: tuple[str, ...], leaves: list[torch.Tensor]) -> None:
    signature, flat = of(inputs)
    assert signature.names == names
    assert [id(item) for item in flat] == [id(item) for item in leaves]
    args, kwargs = signature.call_arguments(flat)
    assert [id(item) for item in signature.flatten_inputs(args, kwargs)] == [id(item) for item in flat]
    loaded = Signature.from_json(json.loads(json.dumps(signature.to_json())))
    assert loaded.to_json() == signature.to_json()
    assert [id(item) for item in loaded.flatten_inputs(args, kwargs)] == [id(item) for item in flat]


def test_positional_keyword_and_default_arguments_are_one_call() -> None:
    signature, _ = of((A, B), Plain())
    for args, kwargs in [((A, B), {}), ((A,), {"mask": B}), ((), {"mask": B, "image": A})]:
        assert [id(item) for item in signature.flatten_inputs(args, kwargs)] == [id(A), id(B)]


def test_names_are_unique_identifiers() -> None:
    signature, _ = of({"x": {"a b": A, "a_b": B, "class": C}})
    assert len(set(signature.names)) == 3
    assert all(name.isidentifier() for name in signature.names)


def test_a_parameter_called_self_or_a_keyword_is_renamed() -> None:
    class Odd(nn.Module):
        def forward(self, **kwargs: Any) -> Any:
            return kwargs["class"]

    signature, _ = of({"class": A}, Odd())
    assert signature.names == ("kwargs_class",)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (3, "must be a tuple of positional arguments, a mapping of keyword arguments or one tensor, not int"),
        ((1, 2), "hold no tensor"),
        ((), r"do not fit forward\(x, y=None, \*rest, scale=1\.0, \*\*named\): missing a required argument: 'x'"),
        ((numpy.zeros(3),), r"x is a numpy array: pass torch\.from_numpy"),
        (({"a": [numpy.zeros(3)]}, A), r"x\.a\.0 is a numpy array"),
    ],
)
def test_wrong_example_inputs_are_refused(inputs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        of(inputs)


def test_a_call_with_another_constant_is_refused() -> None:
    signature, _ = of(CallArguments((A,), {"scale": 2.0}))
    with pytest.raises(InputError, match=r"scale: was 2\.0 when the model was captured"):
        signature.flatten_inputs((A,), {"scale": 3.0})
    with pytest.raises(InputError, match=r"scale: was 2\.0"):
        signature.flatten_inputs((A,), {})


def test_a_call_without_the_constant_given_at_capture_is_refused_where_one_tensor_would_do() -> None:
    signature, _ = of((A, 5), Plain())
    with pytest.raises(InputError, match="mask: was 5"):
        signature.flatten_inputs((A,), {})
    assert signature.flatten_inputs((B, 5), {})[0] is B


def test_too_many_arguments_are_refused() -> None:
    signature, _ = of(A, Plain())
    with pytest.raises(InputError, match="too many positional arguments"):
        signature.flatten_inputs((A, B, C), {})
    with pytest.raises(InputError, match="mask: was None"):
        signature.flatten_inputs((A, B), {})
    with pytest.raises(InputError, match="unexpected keyword argument 'nothing'"):
        signature.flatten_inputs((A,), {"nothing": B})


@pytest.mark.parametrize(
    "batch",
    [A, (A,), [A], (A, torch.tensor([1])), [A, "label", 3], {"image": A}, {"image": A, "label": 3}],
)
def test_the_first_entries_of_a_batch_are_the_inputs(batch: Any) -> None:
    signature, _ = of(A, Plain())
    assert signature.flatten_batch(batch)[0] is A


def test_batches_of_a_model_with_two_inputs() -> None:
    signature, _ = of((A, B), Plain())
    for batch in [(A, B), (A, B, torch.tensor([1])), {"mask": B, "label": 3, "image": A}]:
        assert [id(item) for item in signature.flatten_batch(batch)] == [id(A), id(B)]
    with pytest.raises(InputError, match="mask"):
        signature.flatten_batch((A,))
    with pytest.raises(InputError, match="must be a tensor, tuple, list or mapping, not int"):
        signature.flatten_batch(5)


def test_outputs_are_not_known_before_capture() -> None:
    signature, _ = of(A)
    with pytest.raises(InputError, match="not captured yet"):
        signature.unflatten_outputs([A])


def test_a_model_whose_forward_cannot_be_inspected_takes_any_call() -> None:
    class Native(nn.Module):
        forward = torch.relu  # a builtin without a signature

    signature, flat = of((A,), Native())
    assert signature.call_arguments(flat)[0][0] is A


class Masked(nn.Module):
    def forward(self, x: Any, flag: Any = None, mask: Any = B, *, both: Any = (C, 1)) -> Any:
        return x


def test_a_default_that_is_a_tensor_is_not_saved() -> None:
    signature, flat = of(A, Masked())
    assert [id(item) for item in flat] == [id(A), id(B), id(C)]
    assert [id(item) for item in signature.flatten_inputs((A,), {})] == [id(A), id(B), id(C)]
    loaded = Signature.from_json(json.loads(json.dumps(signature.to_json())))
    assert loaded.to_json() == signature.to_json()
    assert loaded.flatten_inputs((A,), {"mask": C, "both": (B, 1)}) == [A, C, B]
    with pytest.raises(InputError, match="mask was left out: its default holds tensors, which are not saved; pass it"):
        loaded.flatten_inputs((A,), {"both": (B, 1)})
    with pytest.raises(InputError, match="both was left out"):
        loaded.flatten_inputs((A, None, B), {})


def test_a_default_that_no_call_uses_may_be_anything() -> None:
    class Odd(nn.Module):
        def forward(self, x: Any, table: Any = {(1, 2): 3}) -> Any:  # noqa: B006
            return x

    signature, _ = of((A, None), Odd())
    assert signature.flatten_inputs((B, None), {})[0] is B
    assert Signature.from_json(json.loads(json.dumps(signature.to_json()))).flatten_inputs((B, None), {})[0] is B


def test_the_first_tensors_of_a_batch_are_the_flat_inputs() -> None:
    class Many(nn.Module):
        def forward(self, *xs: Any) -> Any:
            return xs[0]

    class Gap(nn.Module):
        def forward(self, x: Any, mask: Any = None, y: Any = None) -> Any:
            return x

    class Nested(nn.Module):
        def forward(self, x: Any, pair: Any) -> Any:
            return x

    label = torch.tensor([1])
    for signature, batch in [
        (of((A, B), Many())[0], (A, B, label)),
        (of({"x": A, "y": B}, Gap())[0], [A, B, label]),
        (of((A, (B,)), Nested())[0], (A, (B,), label)),
        (of((A, (B,)), Nested())[0], (A, B, label)),
    ]:
        assert [id(item) for item in signature.flatten_batch(batch)] == [id(A), id(B)]
