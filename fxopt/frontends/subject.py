"""What is captured: a private copy of a model, how it is called, and what it answers to the calls it is judged by."""

from __future__ import annotations

import copy
import warnings
from typing import Any, NamedTuple

import torch
from torch import nn

from fxopt.compare import compare, rounding_tolerance
from fxopt.errors import CaptureError, InputError, first_line
from fxopt.free_axes import BATCH, DynamicAxes, FreeAxis, Places, named_places, other_sizes, resized, sizes_text
from fxopt.frontends.attention import plain_attention
from fxopt.program import BatchAxis
from fxopt.randomness import fixed_random_state
from fxopt.sharing import buffers_restored, share_module
from fxopt.signature import Signature
from fxopt.structure import Structure, flatten

__all__ = ["Case", "Subject", "checked"]


class Case(NamedTuple):
    """A call of the model.

    Attributes:
        inputs: flat.
        answers: the model's, flat.
        what: which sizes the inputs have, for people.
        of_batch: whether the batch is another than the example's.
    """

    inputs: tuple[torch.Tensor, ...]
    answers: list[torch.Tensor]
    what: str
    of_batch: bool = False


class Subject(NamedTuple):
    """A private copy of the model, how it is called, and what it answers.

    Attributes:
        model: the copy.
        signature: how it is called.
        outputs: the structure of what it returns.
        inputs: the example's, flat.
        batch: the inputs that carry the batch, if the model takes another.
        free_axes: the axes that are to have any size.
        cases: the example, another batch, another size of the free axes.
        fixed_batch: why the batch is fixed; None if it is not, or if there is none.
        state: what is worth knowing about buffers that the model writes.
        padding: what is worth knowing about outputs that are padding.
    """

    model: nn.Module
    signature: Signature
    outputs: Structure
    inputs: tuple[torch.Tensor, ...]
    batch: BatchAxis | None
    free_axes: tuple[FreeAxis, ...]
    cases: list[Case]
    fixed_batch: str | None
    state: str | None
    padding: str | None

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any, dynamic_axes: DynamicAxes) -> Subject:
        """Copies and runs the model.

        Raises:
            InputError: if the inputs do not fit it, or it does not take other sizes of the axes that are to be free.
            CaptureError: if it cannot be copied.
        """
        private = _private_copy(model)
        signature, inputs = Signature.of(private, example_inputs)
        _check_devices(private, inputs)
        # a tensor of inference mode cannot take part in an export: what is no view of it can
        inputs = tuple(tensor.clone() if tensor.is_inference() else tensor.detach() for tensor in inputs)
        if next((tensor.shape[0] for tensor in inputs if tensor.ndim), 1) == 0:
            raise InputError("the example inputs hold no sample, so nothing could be checked: pass at least one")
        named = named_places(dynamic_axes, signature.names, inputs)
        batch = _batch_axis(inputs, named)
        try:
            answers, outputs, written = _answers(private, signature, inputs)
        except InputError:
            raise
        except Exception as error:  # the model's own code refuses the inputs in its own way
            raise InputError(f"the model fails on the example inputs: {type(error).__name__}: {error}") from error
        if not answers:
            raise InputError("the model returns no tensor: there is nothing to compile")
        cases = [Case(inputs, answers, _batch_text(inputs))]
        fixed_batch = None
        if batch is not None:
            other = 3 if batch.size == 2 else 2
            carriers = tuple((index, 0) for index in batch.inputs)
            fresh = resized(inputs, {carriers: other})
            try:
                found = _answers(private, signature, fresh)[0]
                cases.append(Case(fresh, found, f"a batch of {other}", of_batch=True))
            except Exception as error:  # noqa: BLE001 (a model may refuse in any way; the reason is kept)
                fixed_batch = f"the model takes a batch of {batch.size} and fails on {other} ({first_line(error)})"
                batch = None
        state, padding = _state(private, written), _padding(private, signature, cases[0])
        subject = cls(private, signature, outputs, inputs, batch, (), cases, fixed_batch, state, padding)
        return subject._with_free_axes(named) if named else subject

    def with_fixed_batch(self, why: str) -> Subject:
        """The same subject, but that the batch is the example's."""
        cases = [case for case in self.cases if not case.of_batch]
        return self._replace(batch=None, cases=cases, fixed_batch=why)

    def case_at(self, name: str, size: int) -> Case | None:
        """The call with one free axis at that size, the others at their other size; None if the model refuses it."""
        sizes = {axis.name: size if axis.name == name else axis.other for axis in self.free_axes}
        inputs = resized(self.inputs, {axis.places: sizes[axis.name] for axis in self.free_axes})
        try:
            return Case(inputs, _answers(self.model, self.signature, inputs)[0], sizes_text(sizes))
        except Exception:  # noqa: BLE001 (a model may refuse in any way; that it does is what was asked)
            return None

    def _with_free_axes(self, named: dict[str, Places]) -> Subject:
        """The subject with axes whose other sizes the model was seen to take, found one after the other.

        Raises:
            InputError: naming the axis of which it takes no other size that was tried.
        """
        axes: list[FreeAxis] = []
        answered: Case | None = None
        for rank, (name, places) in enumerate(named.items()):
            size = self.inputs[places[0][0]].shape[places[0][1]]
            tried, reason = other_sizes(size, rank), ""
            for other in tried:
                attempt = [*axes, FreeAxis(name, places, size, other)]
                inputs = resized(self.inputs, {axis.places: axis.other for axis in attempt})
                try:
                    answers = _answers(self.model, self.signature, inputs)[0]
                except Exception as error:  # noqa: BLE001 (a model may refuse in any way; the reason is kept)
                    reason = reason or first_line(error)
                    continue
                answered = Case(inputs, answers, sizes_text({axis.name: axis.other for axis in attempt}))
                axes = attempt
                break
            else:
                others = sizes_text({axis.name: axis.other for axis in axes})
                raise InputError(
                    f"{name} cannot be free: the model takes {size} and fails on {', '.join(map(str, tried))}"
                    f"{f' with {others}' if others else ''} ({reason}). Axes that must have one size get one name; "
                    "another example may allow for other sizes"
                )
        assert answered is not None
        return self._replace(free_axes=tuple(axes), cases=[*self.cases, answered])


def checked(model: nn.Module) -> nn.Module:
    """The module that is meant: what `torch.compile` and data parallelism wrap is looked into.

    Raises:
        InputError: if it is no module, or not initialised.
        CaptureError: if it holds no Python code.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("a TorchScript module holds no Python code to trace: capture the nn.Module it was made from")
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be an nn.Module, not {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    uninitialised = (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)
    tensors = (*model.named_parameters(), *model.named_buffers())
    lazy = next((name for name, item in tensors if isinstance(item, uninitialised)), None)
    if lazy is not None:
        raise InputError(f"{lazy} is not initialised yet: call the model once, then capture it")
    empty = next((name for name, item in tensors if item.is_meta), None)
    if empty is not None:
        raise InputError(f"{empty} is on the meta device, where it has no values: load the model's weights first")
    return model


def _private_copy(model: nn.Module) -> nn.Module:
    model = checked(model)
    # what a hook computed from parameters (weight_norm of old) is no leaf: deepcopy refuses it, the hook makes it anew
    attributes = [value for module in model.modules() for value in vars(module).values()]
    computed = [value for value in attributes if isinstance(value, torch.Tensor) and value.grad_fn is not None]
    try:
        return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})
    except Exception as error:  # what a model holds may refuse in any way: the reason is kept
        raise CaptureError(f"the model cannot be copied, and fxopt never works on yours: {error}") from error


def _check_devices(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    for tensor in inputs:
        if devices and tensor.ndim and tensor.device not in devices:
            held = ", ".join(sorted(map(str, devices)))
            raise InputError(f"an example input is on {tensor.device}, the model on {held}: move one to the other")


def _state(model: nn.Module, written: list[str]) -> str | None:
    """What is worth knowing about buffers that modules in evaluation mode write; in training many do, and may."""
    modules = dict(model.named_modules())
    kept = [name for name in written if not modules[name.rpartition(".")[0]].training]
    return f"the model keeps state in {', '.join(kept)}: an engine answers every call like the first" if kept else None


def _padding(model: nn.Module, signature: Signature, example: Case) -> str | None:
    """Whether torch's fast path, which callers of the model see, gives something else for what is padding."""
    if model.training or not any(isinstance(module, nn.TransformerEncoder) for module in model.modules()):
        return None
    args, kwargs = signature.call_arguments([tensor.clone() for tensor in example.inputs])
    with torch.no_grad(), fixed_random_state(), buffers_restored(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that the nested tensors of its fast path may change
        fast, _ = flatten(share_module(model)(*args, **kwargs))
    if compare(example.answers, fast).within(rounding_tolerance(example.answers)):
        return None
    return "what is padding is computed like the rest; torch's fast path gives zeros for it, or leaves it out"


def _answers(
    model: nn.Module, signature: Signature, inputs: tuple[torch.Tensor, ...]
) -> tuple[list[torch.Tensor], Structure, list[str]]:
    """The model's flat outputs, their structure, and the buffers that it wrote, which is undone.

    The run starts from a fixed random state.
    """
    args, kwargs = signature.call_arguments([tensor.clone() for tensor in inputs])
    # attributes that the code assigns stay on the shared copy, buffers that it writes into are put back
    with torch.no_grad(), fixed_random_state(), plain_attention(), buffers_restored(model) as written:
        answers, outputs = flatten(share_module(model)(*args, **kwargs))
    return answers, outputs, written


def _batch_axis(inputs: tuple[torch.Tensor, ...], named: dict[str, Places]) -> BatchAxis | None:
    """Axis 0 of the first input that has one, and of all inputs that agree with it in size.

    The caller may say which inputs carry it, by the name "batch" for axis 0: that name is taken out of `named`. Where
    one of these axes has another name, there is no batch.

    Raises:
        InputError: if another axis than the first is called so.
    """
    places = named.pop(BATCH, ())
    if any(axis != 0 for _, axis in places):
        raise InputError(f'dynamic_axes calls an axis "{BATCH}" that is not axis 0: use another name')
    if places:
        carriers = tuple(index for index, _ in places)
        return BatchAxis(carriers, inputs[carriers[0]].shape[0])
    size = next((tensor.shape[0] for tensor in inputs if tensor.ndim), 0)
    indices = tuple(index for index, tensor in enumerate(inputs) if tensor.ndim and tensor.shape[0] == size)
    taken = {place for items in named.values() for place in items}
    return BatchAxis(indices, size) if size and not any((index, 0) in taken for index in indices) else None


def _batch_text(inputs: tuple[torch.Tensor, ...]) -> str:
    return f"a batch of {next((tensor.shape[0] for tensor in inputs if tensor.ndim), 'no axis')}"
