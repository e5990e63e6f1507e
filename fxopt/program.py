"""The intermediate representation: a private flat graph, and what is known about the model it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar, cast

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen
from torch.nn import functional

from fxopt.codegen import StructuredCodeGen
from fxopt.errors import InputError
from fxopt.free_axes import BATCH, FreeAxis, resized
from fxopt.integer_scheme import Scheme
from fxopt.interpret import Watch, run_graph
from fxopt.ops import Call, resolve
from fxopt.report import Cost, Report
from fxopt.sharing import buffers_restored, keep_persistence, share_module, without_graph
from fxopt.signature import Signature
from fxopt.target import Target

if TYPE_CHECKING:
    from fxopt.layer_times import LayerTimes

__all__ = ["BatchAxis", "Loss", "Program"]

T = TypeVar("T")
Loss = Callable[[Any, Any], torch.Tensor]


class BatchAxis(NamedTuple):
    """Which flat inputs carry the batch on axis 0, and the batch size of the example."""

    inputs: tuple[int, ...]
    size: int


class Program:
    """A captured model: a flat `fx.Graph` over modules that sit at their original paths.

    Placeholders are tensors (targets `signature.names`), the output is a tuple of tensors, parameters live in modules,
    everything else is a function call. A program is private: it shares no module with the caller's model. Its tensors
    are immutable for passes, which is why copies share them; only training the `module` writes into them.

    Attributes:
        signature: how the model is called, and what it returns.
        example_inputs: flat tensors, as given at capture; in `io_dtype` where a pass has set that.
        io_dtype: the data type that it takes and gives in place of the model's float32; None: as the model.
        calibration: the caller's iterable of batches, or None.
        target: where the engine will run.
        scheme: which integers the kernels of the backend multiply.
        layer_times: how long layers take on the backend that it is for; None if that is not known.
        batch: the batch axis, or None if the batch size is fixed.
        loss: what the outputs and the targets of a calibration batch come to, a scalar tensor; None for a usual choice.
        fixed_batch: why the batch size is fixed; None if it is not, or if there is no batch.
        free_axes: the axes beside the batch that may have any size.
        properties: what passes have established ("quantized", ...); see `Pass.provides`.
        report: what the passes run so far have done.
        frontend: which frontend captured it, "symbolic" or "export".
    """

    def __init__(
        self,
        module: fx.GraphModule,
        signature: Signature,
        example_inputs: tuple[torch.Tensor, ...],
        *,
        frontend: str,
        batch: BatchAxis | None = None,
        free_axes: tuple[FreeAxis, ...] = (),
        calibration: Iterable[Any] | None = None,
        target: Target | None = None,
    ) -> None:
        self._root = without_graph(module)
        self._graph = _copy_graph(module.graph)
        self._module: fx.GraphModule | None = None
        self._modules_by_path: dict[str, nn.Module] = {}
        self._nodes_by_name: dict[str, fx.Node] = {}
        self._edits = 0
        self._analyses: dict[Callable[[Program], Any], Any] = {}
        self.signature = signature
        self.example_inputs = example_inputs
        self.io_dtype: torch.dtype | None = None
        self.frontend = frontend
        self.batch = batch
        self.fixed_batch: str | None = None
        self.free_axes = free_axes
        self.loss: Loss | None = None
        self.calibration = calibration
        self.target = target or Target.detect()
        self.scheme = Scheme.of(self.target)
        self.layer_times: LayerTimes | None = None
        self.properties: frozenset[str] = frozenset()
        self.report = Report()

    @property
    def module(self) -> fx.GraphModule:
        """An `nn.Module` called like the model, with the model's parameter names. It trains."""
        if self._module is None:
            # a graph module owns its graph: what was handed out must neither follow later edits nor forbid them
            graph = _copy_graph(self._graph)
            graph.set_codegen(StructuredCodeGen(self.signature))
            self._module = self._assemble(graph, _ProgramModule)
        return self._module

    @property
    def graph(self) -> fx.Graph:
        """The flat graph. Change it through `fxopt.edit` only."""
        return self._graph

    @property
    def nodes(self) -> list[fx.Node]:
        """All nodes in execution order: a list of its own, safe to edit under."""
        return list(self.graph.nodes)

    @property
    def training(self) -> bool:
        """Whether the model was captured in training mode."""
        return self._root.training

    @property
    def edits(self) -> int:
        """How many times the graph or its tensors were edited since capture."""
        return self._edits

    def node(self, name: str) -> fx.Node:
        """The node of that name.

        Raises:
            InputError: if there is none.
        """
        if not self._nodes_by_name:
            self._nodes_by_name = {node.name: node for node in self._graph.nodes}
        if name not in self._nodes_by_name:
            raise InputError(f"the program has no node {name!r}")
        return self._nodes_by_name[name]

    def op(self, node: fx.Node) -> str:
        """Canonical operator name of a node: "relu", "placeholder", "unknown:some.function"."""
        return self.call(node).op

    def call(self, node: fx.Node) -> Call:
        """What a node calls: canonical name, named arguments, module."""
        return resolve(node, self.module_of(node))

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """The module that a `call_module` node calls; None for other nodes."""
        if node.op != "call_module":
            return None
        # passes ask this of all nodes again and again, and walking a path is slow
        path = str(node.target)
        if path not in self._modules_by_path:
            self._modules_by_path[path] = self._root.get_submodule(path)
        return self._modules_by_path[path]

    def tensor_of(self, node: fx.Node) -> torch.Tensor | None:
        """The parameter or buffer that a `get_attr` node reads; None for other nodes."""
        if node.op != "get_attr":
            return None
        owner, _, name = str(node.target).rpartition(".")
        return cast("torch.Tensor", getattr(self._root.get_submodule(owner), name))

    def callers(self, node: fx.Node) -> list[fx.Node]:
        """All nodes that call the same module as `node`, itself included."""
        if node.op != "call_module":
            return []
        module = self.module_of(node)
        return [other for other in self._graph.nodes if other.op == "call_module" and self.module_of(other) is module]

    def analysis(self, function: Callable[[Program], T]) -> T:
        """The result of an analysis, computed once and kept until the next edit."""
        if function not in self._analyses:
            self._analyses[function] = function(self)
        return cast(T, self._analyses[function])

    def remember(self, function: Callable[[Program], Any], result: object) -> None:
        """Stores the result of an analysis that was found on the way to something else."""
        self._analyses[function] = result

    def cost(self) -> Cost:
        """Parameters, multiply-accumulates at the example's sizes, and bytes of parameters and buffers."""
        from fxopt.analysis.costs import total_cost

        return self.analysis(total_cost)

    def text(self) -> str:
        """The program as deterministic text, one line per node."""
        from fxopt.analysis.text import render

        return self.analysis(render)

    def flat_module(self) -> fx.GraphModule:
        """The same graph called flatly: tensors in, tuple of tensors out. Shares the tensors, not the modules."""
        twin = self.copy()
        twin._graph.set_codegen(CodeGen())
        return twin._assemble(twin._graph)

    def run(
        self, *inputs: torch.Tensor, watch: Watch | None = None, gradients: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Runs the graph eagerly on flat inputs; inputs and buffers are left as they are.

        In training mode the outputs may be random: seed the generator to compare two runs.

        Args:
            inputs: flat tensors.
            watch: called with each node and its value.
            gradients: whether autograd follows the run.
        """
        with buffers_restored(self._root):
            flat = [tensor.detach().clone() for tensor in inputs]
            return run_graph(self._root, self._graph, flat, watch, gradients=gradients)

    def calibration_inputs(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """The flat inputs of each calibration batch, for passes that look at data.

        Raises:
            InputError: if there is no calibration data, no batch in it, or a batch does not fit the model.
        """
        for inputs, _ in self.calibration_pairs():
            yield inputs

    def calibration_pairs(self) -> Iterator[tuple[tuple[torch.Tensor, ...], Any]]:
        """The flat inputs of each calibration batch, and the targets that it holds besides (None if there are none).

        Raises:
            InputError: as `calibration_inputs`.
        """
        if self.calibration is None:
            raise InputError("this needs data: pass calibration=, an iterable of batches such as a DataLoader")
        empty = True
        for index, batch in enumerate(self.calibration):
            empty = False
            try:
                given = self.signature.flatten_batch(batch)
            except InputError as error:
                raise InputError(f"calibration batch {index}: {error}") from error
            inputs = self.in_io_dtype(given)
            for name, tensor, example in zip(self.signature.names, inputs, self.example_inputs, strict=True):
                floating = tensor.is_floating_point() and example.is_floating_point()
                if floating and tensor.dtype != example.dtype:
                    raise InputError(
                        f"calibration batch {index}: {name} is {tensor.dtype}, and the example input {example.dtype}: "
                        "convert it first"
                    )
            yield inputs, self.signature.targets_of(batch)
        if empty:
            once = iter(self.calibration) is self.calibration
            advice = "; an iterator can be read once only, a list again and again" if once else ""
            raise InputError(f"calibration holds no batch{advice}")

    def in_io_dtype(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Flat inputs or outputs of the model as this program takes or gives them: see `io_dtype`."""
        return tuple(
            tensor.to(self.io_dtype) if self.io_dtype is not None and tensor.dtype is torch.float32 else tensor
            for tensor in tensors
        )

    def loss_of(self, outputs: Sequence[torch.Tensor], targets: Any) -> torch.Tensor:
        """The loss of a calibration batch, a mean over its samples.

        That is `loss`, or by default of the first output: cross-entropy for classes (integers), mean squared error for
        values of the output's shape.

        Args:
            outputs: flat outputs for the batch.
            targets: what `calibration_pairs` gives with its inputs.

        Raises:
            InputError: if there are no targets, or they do not fit the loss.
        """
        if targets is None:
            raise InputError("this needs targets: let each calibration batch hold them behind the inputs, (x, target)")
        first = outputs[0]
        found: Any
        if self.loss is not None:
            found = self.loss(self.signature.unflatten_outputs(outputs), targets)
        elif isinstance(targets, torch.Tensor) and targets.dtype == torch.int64:
            found = _fitting(functional.cross_entropy, first, targets)
        elif isinstance(targets, torch.Tensor) and targets.shape == first.shape:
            found = _fitting(functional.mse_loss, first, targets)
        else:
            raise InputError(
                "the targets are neither classes (int64) nor values of the output's shape: "
                "pass loss=, a function of the outputs and the targets"
            )
        if not isinstance(found, torch.Tensor) or found.numel() != 1:
            raise InputError("loss must give a tensor of one value, the mean over the samples")
        return found.reshape(())

    def inputs_with_batch(self, size: int | None = None, *, seed: int = 0) -> tuple[torch.Tensor, ...]:
        """Fresh random flat inputs like the example's: same dtypes, devices and value ranges.

        Args:
            size: batch size for the inputs that carry the batch; None, or a fixed batch, keeps the example's.
            seed: of the generator.
        """
        generator = torch.Generator().manual_seed(seed)
        batched = self.batch.inputs if self.batch is not None and size is not None else ()
        return tuple(
            _random_like(tensor, size if index in batched else None, generator)
            for index, tensor in enumerate(self.example_inputs)
        )

    def inputs_at_other_sizes(self) -> tuple[torch.Tensor, ...]:
        """The example inputs with another size of all free axes; the batch is the example's."""
        return resized(self.example_inputs, {axis.places: axis.other for axis in self.free_axes})

    def axis_names(self, *, batch: bool) -> dict[tuple[int, int], str]:
        """What axes that may have any size are called, by flat input and axis.

        Args:
            batch: whether that of the batch is among them, if it is free.
        """
        carriers = self.batch.inputs if batch and self.batch is not None else ()
        free = {place: axis.name for axis in self.free_axes for place in axis.places}
        return {(index, 0): BATCH for index in carriers} | free

    def copy(self) -> Program:
        """An independent program that shares all tensors with this one. Costs O(nodes)."""
        clone = object.__new__(Program)
        clone.__dict__.update(self.__dict__)
        clone._root = share_module(self._root)
        clone._graph = _copy_graph(self._graph)
        clone._module = None
        clone._modules_by_path = {}
        clone._nodes_by_name = {}
        clone._analyses = dict(self._analyses)
        clone.report = self.report.copy()
        return clone

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        inputs = ", ".join(self.signature.names)
        return f"<Program({inputs}) of {len(self.graph.nodes)} nodes, captured by {self.frontend}>"

    def _changed(self) -> None:
        """Called by `fxopt.edit` after every edit."""
        self._edits += 1
        self._module = None
        self._nodes_by_name = {}
        self._analyses.clear()

    def _place(self, path: str, module: nn.Module) -> None:
        """Puts a module at a path, in the place of what is there; `fxopt.edit` calls it. Missing folders are made."""
        *folders, name = path.split(".")
        owner = self._root
        for folder in folders:
            if folder not in owner._modules:
                owner.add_module(folder, nn.Module())
            owner = owner.get_submodule(folder)
        owner.add_module(name, module)
        known = self._modules_by_path
        self._modules_by_path = {key: value for key, value in known.items() if not f"{key}.".startswith(f"{path}.")}

    def _assemble(self, graph: fx.Graph, kind: type[fx.GraphModule] = fx.GraphModule) -> fx.GraphModule:
        """A graph module over this program's modules."""
        module = kind(self._root, graph, class_name="Program")
        keep_persistence(module, self._root)
        module.training = self.training
        modes = {name: child.training for name, child in self._root.named_modules()}
        for name, child in module.named_modules():
            # the folders that a graph module makes for paths are new; leaf modules keep a mode of their own
            child.training = modes.get(name, self.training)
        return module


class _ProgramModule(fx.GraphModule):
    """A graph module that says how it is saved: its code calls the signature, which pickle does not know."""

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "the module of a program is not pickled: save its state_dict(), and load that into the module of a program "
            "that the same passes made; or save a compiled model by compiled.save(folder)"
        )


def _fitting(loss: Loss, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    try:
        return loss(output, targets)
    except (RuntimeError, ValueError, IndexError) as error:
        raise InputError(
            f"the targets {tuple(targets.shape)} do not fit the first output {tuple(output.shape)}: {error}; "
            "pass loss=, a function of the outputs and the targets"
        ) from error


def _copy_graph(graph: fx.Graph) -> fx.Graph:
    """The same nodes under the same names."""
    twin = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = twin.graph_copy(graph, copies, return_output_node=True)
    twin.output(output[0] if isinstance(output, tuple) else output)
    for node, copied in copies.items():
        copied.meta = dict(node.meta)
    return twin


def _random_like(tensor: torch.Tensor, size: int | None, generator: torch.Generator) -> torch.Tensor:
    shape = tuple(tensor.shape) if size is None or not tensor.ndim else (size, *tensor.shape[1:])
    sample = tensor.detach().cpu()
    if tensor.is_floating_point():
        values = sample.double()
        finite = values[values.isfinite()]
        spread = float(finite.std()) if finite.numel() > 1 else 0.0
        center = float(finite.mean()) if finite.numel() else 0.0
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * (spread or 1.0) + center
    elif tensor.is_complex() or not tensor.numel():
        drawn = torch.zeros(shape, dtype=tensor.dtype)
    else:
        picks = torch.randint(0, tensor.numel(), shape, generator=generator)
        drawn = sample.reshape(-1)[picks]
    return drawn.to(dtype=tensor.dtype, device=tensor.device)
