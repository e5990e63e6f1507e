"""The command `fxopt`: the public interface, from a shell.

Results go to standard output, progress and messages to standard error. What the user got wrong is one line there and
exit code 2.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import fxopt
from fxopt import registry
from fxopt.cli_output import Output, one_line, options_of, options_text, summary_of, summary_of_tensor
from fxopt.errors import BackendUnavailable, FxoptError, InputError, first_line
from fxopt.frontends.capture import Frontend
from fxopt.input_source import as_example_inputs, gather_inputs, parse_axes, parse_input
from fxopt.model_source import load_model, load_weights
from fxopt.passes_base import Plan
from fxopt.structure import flatten
from fxopt.timing import measure

_USER_ERROR = 2

app = typer.Typer(
    name="fxopt",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # main() turns errors into one line, or with --debug leaves them alone
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="torchvision:NAME, timm:NAME, package.module:callable (a module, or what returns one) or FILE.pt2",
        show_default=False,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="state dict to load, every entry of it: .safetensors, or what torch.save wrote. Nothing is ever "
        "downloaded: without this the weights are those that the model is made with, random for a library's.",
        show_default=False,
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="[NAME=]SHAPE[:TYPE]",
        help="an example input, such as 1x3x224x224 or ids=1x16:int64; repeat it for several. Known for "
        "torchvision, timm and .pt2.",
        show_default=False,
    ),
]
Passes = Annotated[
    list[str] | None,
    typer.Option(
        "--passes",
        metavar="SPEC[,SPEC]...",
        help="passes in order, such as 'simplify,fold_batch_norm' or 'name(option=0.5)'; may be repeated; '' is none",
        show_default="default: the exact passes",
    ),
]
HowCaptured = Annotated[Frontend, typer.Option("--frontend", help="how the model is captured")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fxopt {metadata.version('fxopt')}, torch {torch.__version__}, Python {sys.version.split()[0]}")
        raise typer.Exit


@app.callback(
    epilog="[bold]Examples[/]\n\n"
    "fxopt explain torchvision:resnet18 --passes fold_batch_norm\n\n"
    "fxopt compile torchvision:resnet18 --weights resnet18.safetensors -o resnet18/\n\n"
    "fxopt run resnet18/ --input photo.jpg --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225\n\n"
    "fxopt compile my_package.models:make --input 8x3x32x32 --backend eager -o out/"
)
def _fxopt(
    context: typer.Context,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="say what is being done")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="say everything, and show tracebacks")] = False,
    version: Annotated[  # noqa: ARG001 (its callback has acted)
        bool, typer.Option("--version", help="print the version and exit", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """A graph-rewriting compiler for PyTorch models: smaller and faster, and it says why when it is not."""
    context.obj = Output(verbose=verbose, debug=debug)


@app.command("passes")
def list_passes(context: typer.Context, as_json: AsJson = False) -> None:
    """List the passes that are installed, with their options. A plugin that does not import is named and left out."""
    output: Output = context.obj
    entries: list[dict[str, Any]] = [
        {"name": name, "exact": kind.exact, "options": options_of(kind), "summary": summary_of(kind)}
        for name, kind in registry.passes().items()
    ]
    if as_json:
        output.json(
            {"passes": entries, "pipelines": {name: list(specs) for name, specs in registry.pipelines().items()}}
        )
        return
    output.table(
        ["pass", "exact", "options", "what it does"],
        [
            [entry["name"], "yes" if entry["exact"] else "no", options_text(entry["options"]), entry["summary"]]
            for entry in entries
        ],
    )
    for name, specs in registry.pipelines().items():
        output.text(f"{name} stands for {', '.join(specs)}")


@app.command("backends")
def list_backends(context: typer.Context, as_json: AsJson = False) -> None:
    """List the backends that are installed, with their options, and why one cannot be used here."""
    output: Output = context.obj
    entries: list[dict[str, Any]] = [
        {"name": name, "unavailable": kind().unavailable(), "options": options_of(kind), "summary": summary_of(kind)}
        for name, kind in registry.backends().items()
    ]
    if as_json:
        output.json({"backends": entries})
        return
    output.table(
        ["backend", "available", "options", "what it does"],
        [
            [entry["name"], entry["unavailable"] or "yes", options_text(entry["options"]), entry["summary"]]
            for entry in entries
        ],
    )


@app.command()
def show(
    context: typer.Context,
    model: Model,
    weights: Weights = None,
    inputs: Inputs = None,
    passes: Annotated[
        list[str] | None, typer.Option("--passes", metavar="SPEC[,SPEC]...", help="show the program after these passes")
    ] = None,
    frontend: HowCaptured = "auto",
    as_json: AsJson = False,
) -> None:
    """Print the program that a model is captured as, and what it costs.

    Example: fxopt show torchvision:mobilenet_v2 --input 1x3x96x96
    """
    output: Output = context.obj
    module, example = _model(output, model, weights, inputs)
    with output.progress("capturing"):
        if passes is None:
            program = fxopt.capture(module, example, frontend=frontend)
        else:
            program = fxopt.optimize(module, example, _specs(passes), frontend=frontend)
        cost = program.cost()
    if as_json:
        output.json({"frontend": program.frontend, "cost": cost._asdict(), "text": program.text()})
        return
    output.text(program.text())
    output.text(
        f"captured by {program.frontend}: {cost.params:,} parameters, {cost.macs:,} multiply-accumulates, "
        f"{cost.bytes:,} bytes"
    )


@app.command()
def explain(
    context: typer.Context,
    model: Model,
    passes: Passes = None,
    backend: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="what engine is meant, for passes with gate='time'", show_default=False),
    ] = None,
    weights: Weights = None,
    inputs: Inputs = None,
    frontend: HowCaptured = "auto",
    as_json: AsJson = False,
) -> None:
    """Print what passes would do to a model, and what they would leave alone and why.

    Example: fxopt explain timm:repvgg_a0 --passes merge_branches
    """
    output: Output = context.obj
    module, example = _model(output, model, weights, inputs)
    with output.progress("planning"):
        plans = fxopt.explain(module, example, _specs(passes), backend=backend, frontend=frontend)
    if as_json:
        output.json([_plan_json(plan) for plan in plans])
        return
    for plan in plans:
        output.table(
            ["node", "", "what, or why not"],
            [[rewrite.node, "rewrite", rewrite.what] for rewrite in plan.rewrites]
            + [[skip.node, "skip", skip.why] for skip in plan.skips],
            title=f"{plan.config}: {len(plan.rewrites)} rewrites, {len(plan.skips)} skips",
        )


@app.command("compile")
def compile_model(
    context: typer.Context,
    model: Model,
    directory: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="folder to save the engine in", show_default=False)
    ],
    passes: Passes = None,
    backend: Annotated[str, typer.Option(metavar="SPEC", help="such as onnx, 'onnx(num_threads=2)' or eager")] = "onnx",
    weights: Weights = None,
    inputs: Inputs = None,
    dynamic_batch: Annotated[bool, typer.Option(help="keep the batch size open")] = True,
    dynamic_axes: Annotated[
        list[str] | None,
        typer.Option(
            "--dynamic-axis",
            metavar="INPUT:AXIS[=NAME]",
            help="keep the size of another axis open, as in x:2=height; repeat it. Axes of one name have one size.",
            show_default=False,
        ),
    ] = None,
    frontend: HowCaptured = "auto",
    compress: Annotated[bool, typer.Option("--compress", help="save compressed files: for weights with zeros")] = False,
    as_json: AsJson = False,
) -> None:
    """Compile a model into a folder that fxopt run and fxopt.load read.

    Example: fxopt compile torchvision:resnet18 --weights resnet18.safetensors --backend onnx -o resnet18/
    """
    output: Output = context.obj
    module, example = _model(output, model, weights, inputs)
    with output.progress("compiling"):
        compiled = fxopt.compile(
            module,
            example,
            passes=_specs(passes),
            backend=backend,
            dynamic_batch=dynamic_batch,
            dynamic_axes=parse_axes(dynamic_axes or []),
            frontend=frontend,
        )
        compiled.save(directory, compress=compress)
    if as_json:
        output.json(compiled.report.to_json())
        return
    output.show(compiled.report)
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    output.text(f"saved in {directory} ({size:,} bytes)")


@app.command()
def run(
    context: typer.Context,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="folder that fxopt compile has written", show_default=False)
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="[NAME=]SHAPE|FILE",
            help="a shape to fill at random, or a file: .npy, .npz, .safetensors, .pt, or a picture. "
            "Repeat it for several inputs. Without it: random inputs of the shapes that were compiled.",
            show_default=False,
        ),
    ] = None,
    mean: Annotated[str, typer.Option(help="of a picture's channels, scaled to 0..1: one number, or three")] = "0",
    std: Annotated[str, typer.Option(help="likewise: (pixel / 255 - mean) / std goes in")] = "1",
    save_outputs: Annotated[
        Path | None, typer.Option(metavar="FILE.safetensors", help="write the outputs here", show_default=False)
    ] = None,
    benchmark: Annotated[bool, typer.Option("--benchmark", help="also measure the latency")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="calls that --benchmark measures")] = 50,
    as_json: AsJson = False,
) -> None:
    """Run a compiled model on random or given inputs, and sum up what comes out.

    Example: fxopt run resnet18/ --benchmark
    """
    output: Output = context.obj
    with output.progress("loading"):
        compiled = fxopt.load(directory)
    reason = compiled.engine.cannot_run()
    if reason is not None:
        raise BackendUnavailable(f"the engine in {directory} cannot run here: {reason}")
    tensors = gather_inputs(
        compiled.engine.inputs, inputs or [], mean=_numbers("--mean", mean), std=_numbers("--std", std)
    )
    args, kwargs = compiled.signature.call_arguments([tensor.to(compiled.engine.device) for tensor in tensors])

    def call() -> Any:
        answer = compiled(*args, **kwargs)
        if compiled.engine.device.type == "cuda":
            torch.cuda.synchronize(compiled.engine.device)
        return answer

    with output.progress("running"):
        leaves, structure = flatten(call())
        timings = measure({"engine": call}, rounds=rounds) if benchmark else {}
    outputs = dict(zip(structure.paths(), leaves, strict=True))
    if save_outputs is not None:
        _save(save_outputs, outputs)
    latency = {name: timing.milliseconds() for name, timing in timings.items()}.get("engine")
    summaries = [summary_of_tensor(name, tensor) for name, tensor in outputs.items()]
    if as_json:
        output.json({"outputs": summaries, "latency": latency})
        return
    columns = ["output", "shape", "type", "min", "max", "mean"]
    output.table(columns, [[summary.get(column, "") for column in columns] for summary in summaries])
    if latency is not None:
        output.text("latency: median {median} ms, quartiles {low} - {high} ms, {calls} calls".format_map(latency))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits: 0 if all went well, 2 for what the user got wrong, 1 for everything else.

    Args:
        arguments: those of the command line by default.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    if debug:  # it belongs before the command, but is wanted when the line that failed is repeated with it at the end
        words = ["--debug", *(word for word in words if word != "--debug")]
    sys.path.insert(0, os.getcwd())  # noqa: PTH109 (sys.path takes strings); package.module:callable is found from here
    try:
        code = app(words, prog_name="fxopt", standalone_mode=False)
    except (FxoptError, typer.TyperException) as error:
        if debug:
            raise
        text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        if not text:  # the help was shown, as there was no command
            sys.exit(_USER_ERROR)
        print(f"fxopt: error: {one_line(text)}", file=sys.stderr)  # noqa: T201 (the command talks to its user)
        sys.exit(_USER_ERROR)
    except typer.Abort:
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _model(
    output: Output, spec: str, weights: Path | None, inputs: Sequence[str] | None
) -> tuple[nn.Module, tuple[Any, ...] | dict[str, Any]]:
    """The module that `spec` stands for, and example inputs for it."""
    with output.progress(f"loading {spec}"):
        model, example = load_model(spec)
        if weights is not None:
            load_weights(model, weights)
    if inputs:
        return model, as_example_inputs([parse_input(text) for text in inputs])
    if example is None:
        raise InputError(f"{spec} does not say what it takes: add --input SHAPE, such as --input 1x3x224x224")
    return model, example


def _specs(texts: Sequence[str] | None) -> list[str]:
    """The specs in what was given as --passes, split at commas that are in no brackets and no quotes."""
    if texts is None:
        return ["default"]
    found: list[str] = []
    for text in texts:
        start = depth = 0
        quote = ""
        for position, character in enumerate(f"{text},"):
            if quote:
                quote = "" if character == quote else quote
            elif character in "'\"":
                quote = character
            elif character in "([{":
                depth += 1
            elif character in ")]}":
                depth -= 1
            elif character == "," and depth <= 0:
                found.append(text[start:position].strip())
                start = position + 1
        # a bracket or quote that is left open: the spec's own error says so
        found.append(text[start:].strip())
    return [spec for spec in found if spec]


def _plan_json(plan: Plan) -> dict[str, Any]:
    return {
        "name": plan.name,
        "config": plan.config,
        "rewrites": [rewrite._asdict() for rewrite in plan.rewrites],
        "skips": [skip._asdict() for skip in plan.skips],
    }


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} takes one number or three, such as 0.485,0.456,0.406, not {text!r}") from error


def _save(path: Path, outputs: Mapping[str, torch.Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if path.suffix != ".safetensors":
        raise InputError(f"--save-outputs writes safetensors: name the file {path.stem}.safetensors")
    # safetensors refuses tensors that share memory, as an output and a view of it do
    copies = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in outputs.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(copies, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"--save-outputs: cannot write {path}: {first_line(error)}") from error
