"""The command: what it prints, what it writes, and one line with exit code 2 for what the user got wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import fxopt
from fxopt.cli import main
from fxopt.input_source import parse_axes, parse_input
from tests.conftest import NewProcess

MODELS = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))

class Pair(nn.Module):
    def forward(self, ids, scale):
        return {"scaled": ids * scale, "ids": [ids + 1]}

def broken():
    raise KeyError("no such\\nlayer")

number = 3

class Views(nn.Module):
    def forward(self, x):
        y = x * 2
        return y, y.flatten(), y[:, :1]
"""
SHAPE = "2x3x8x8"


class Result(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `fxopt ARGUMENTS` in a folder with `zoo.py`."""
    (tmp_path / "zoo.py").write_text(MODELS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "zoo", raising=False)

    def run(*arguments: str) -> Result:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Result(ended.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def engine(command: Command) -> Path:
    """A compiled `zoo:make`."""
    result = command("compile", "zoo:make", "--input", SHAPE, "--backend", "eager", "-o", "engine")
    assert result.code == 0, result.err
    return Path("engine")


def zoo_make() -> nn.Module:
    namespace: dict[str, Callable[[], nn.Module]] = {}
    exec(MODELS, namespace)
    return namespace["make"]().eval()


def test_help_explains_itself(command: Command) -> None:
    overview = command("--help")
    assert overview.code == 0
    for name in ("passes", "backends", "show", "explain", "compile", "run"):
        assert name in overview.out
        assert command(name, "--help").code == 0
    assert "torchvision:NAME" in " ".join(command("compile", "--help").out.split())


def test_version(command: Command) -> None:
    assert command("--version").out.startswith("fxopt 0.1.0, torch ")


def test_passes_lists_those_of_the_entry_points(command: Command) -> None:
    result = command("passes", "--json")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    by_name = {entry["name"]: entry for entry in data["passes"]}
    assert {"fold_batch_norm", "simplify", "merge_branches"} <= set(by_name)
    assert by_name["fold_batch_norm"]["exact"] is True
    assert by_name["fold_batch_norm"]["summary"]
    assert data["pipelines"]["default"] == ["simplify", "fold_batch_norm", "merge_branches"]
    table = command("passes").out
    assert "fold_batch_norm" in table
    assert "default stands for simplify, fold_batch_norm, merge_branches" in table


def test_backends_says_what_can_be_used(command: Command) -> None:
    data = json.loads(command("backends", "--json").out)
    by_name = {entry["name"]: entry for entry in data["backends"]}
    assert by_name["eager"]["unavailable"] is None
    assert by_name["onnx"]["options"]["num_threads"] == "None"
    assert "eager" in command("backends").out


def test_show_prints_the_program_and_its_cost(command: Command) -> None:
    result = command("show", "zoo:make", "--input", SHAPE)
    assert result.code == 0, result.err
    program = fxopt.capture(zoo_make(), torch.zeros(2, 3, 8, 8))
    assert result.out.startswith(program.text() + "\n")
    assert f"{program.cost().params:,} parameters" in result.out


def test_show_after_passes(command: Command) -> None:
    data = json.loads(command("show", "zoo:make", "--input", SHAPE, "--passes", "fold_batch_norm", "--json").out)
    assert "batch_norm" not in data["text"]
    assert data["frontend"] == "symbolic"


def test_explain_prints_rewrites_and_refusals(command: Command) -> None:
    arguments = ("explain", "zoo:make", "--input", SHAPE, "--passes", "fold_batch_norm, merge_branches")
    plans = json.loads(command(*arguments, "--json").out)
    assert [plan["name"] for plan in plans] == ["fold_batch_norm", "merge_branches"]
    assert len(plans[0]["rewrites"]) == 1
    assert "fold_batch_norm: 1 rewrites" in command(*arguments).out


def test_compile_then_run(command: Command) -> None:
    result = command("compile", "zoo:make", "--input", SHAPE, "--backend", "onnx(num_threads=1)", "-o", "out/engine")
    assert result.code == 0, result.err
    assert "fold_batch_norm" in result.out
    assert "saved in out/engine" in result.out
    x = torch.randn(5, 3, 8, 8)
    save_file({"x": x}, "x.safetensors")
    result = command("run", "out/engine", "--input", "x.safetensors", "--save-outputs", "y.safetensors")
    assert result.code == 0, result.err
    (y,) = load_file("y.safetensors").values()
    torch.testing.assert_close(y, zoo_make()(x).detach(), rtol=1e-3, atol=1e-4)


def test_compile_saves_compressed_files(command: Command) -> None:
    passes = ("--passes", "prune_weights(sparsity=0.9)", "--backend", "onnx(num_threads=1)")
    for name, options in {"plain": (), "small": ("--compress",)}.items():
        result = command("compile", "zoo:make", "--input", SHAPE, *passes, "-o", name, *options)
        assert result.code == 0, result.err
    assert Path("small/model.onnx.xz").stat().st_size < Path("plain/model.onnx").stat().st_size
    save_file({"x": torch.randn(5, 3, 8, 8)}, "x.safetensors")
    outputs = []
    for name in ("plain", "small"):
        result = command("run", name, "--input", "x.safetensors", "--save-outputs", f"{name}.safetensors")
        assert result.code == 0, result.err
        outputs += load_file(f"{name}.safetensors").values()
    assert torch.equal(*outputs)


def test_compile_prints_the_report_as_json(command: Command) -> None:
    result = command("compile", "zoo:make", "--input", SHAPE, "--backend", "eager", "-o", "engine", "--json")
    report = fxopt.Report.from_json(json.loads(result.out))
    assert [item.name for item in report.passes] == ["simplify", "fold_batch_norm", "merge_branches"]


def test_run_measures_latency(command: Command, engine: Path) -> None:
    data = json.loads(command("run", str(engine), "--benchmark", "--rounds", "3", "--json").out)
    assert data["latency"]["calls"] == 3
    assert 0 < data["latency"]["low"] <= data["latency"]["median"] <= data["latency"]["high"]
    assert data["outputs"][0]["shape"] == [1, 10]
    assert "latency: median" in command("run", str(engine), "--benchmark", "--rounds", "3").out


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
def test_run_reads_inputs_from_files(command: Command, engine: Path, suffix: str) -> None:
    x = torch.randn(3, 3, 8, 8)
    file = f"x{suffix}"
    if suffix == ".npy":
        numpy.save(file, x.numpy())
    elif suffix == ".npz":
        numpy.savez(file, anything=x.numpy())
    elif suffix == ".pt":
        torch.save(x, file)
    else:
        save_file({"anything": x}, file)
    data = json.loads(command("run", str(engine), "--input", file, "--json").out)
    y = zoo_make()(x).detach().double()
    assert data["outputs"][0]["shape"] == [3, 10]
    assert data["outputs"][0]["mean"] == pytest.approx(y.mean().item(), rel=1e-4)


def test_run_reads_a_picture(command: Command, engine: Path) -> None:
    pixels = numpy.zeros((20, 10, 3), dtype=numpy.uint8)
    pixels[..., 0] = 255
    Image.fromarray(pixels).save("red.png")
    arguments = ("run", str(engine), "--input", "red.png", "--mean", "0.5", "--std", "0.5,0.5,0.25", "--json")
    data = json.loads(command(*arguments).out)
    x = torch.tensor([1.0, -1.0, -2.0]).reshape(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert data["outputs"][0]["mean"] == pytest.approx(zoo_make()(x).double().mean().item(), rel=1e-4)


def test_named_inputs_and_nested_outputs(command: Command) -> None:
    shapes = ("--input", "ids=2x5:int64", "--input", "scale=2x5")
    assert command("compile", "zoo:Pair", *shapes, "--passes", "", "--backend", "eager", "-o", "pair").code == 0
    torch.save({"ids": torch.full((3, 5), 7), "scale": torch.full((3, 5), 2.0)}, "inputs.pt")
    data = json.loads(command("run", "pair", "--input", "inputs.pt", "--json").out)
    assert {entry["output"]: entry["max"] for entry in data["outputs"]} == {"scaled": 14, "ids[0]": 8}
    data = json.loads(command("run", "pair", "--input", "scale=4x5", "--json").out)
    assert [entry["shape"] for entry in data["outputs"]] == [[4, 5], [4, 5]]


def test_axes_of_any_size(command: Command) -> None:
    axes = ["--dynamic-axis", "x:2=height", "--dynamic-axis", "x:3"]
    result = command("compile", "zoo:Views", "--input", SHAPE, "--backend", "eager", "-o", "out", *axes)
    assert result.code == 0, result.err
    (spec,) = fxopt.load("out").engine.inputs
    assert str(spec) == "x: float32[batch, 3, height, x_3]"
    result = command("run", "out")
    assert result.code == 2
    assert "height of the input x: float32[batch, 3, height, x_3] may have any size: add --input x=SHAPE" in result.err
    result = command("run", "out", "--input", "1x3x5x7", "--json")
    assert [item["shape"] for item in json.loads(result.out)["outputs"]] == [[1, 3, 5, 7], [105], [1, 1, 5, 7]]
    Image.new("RGB", (9, 6)).save("photo.png")
    result = command("run", "out", "--input", "photo.png", "--json")
    assert json.loads(result.out)["outputs"][0]["shape"] == [1, 3, 6, 9]


def test_outputs_that_share_memory_are_saved(command: Command) -> None:
    assert command("compile", "zoo:Views", "--input", "2x3", "--backend", "eager", "-o", "out").code == 0
    result = command("run", "out", "--save-outputs", "o.safetensors")
    assert result.code == 0, result.err
    shapes = sorted(tuple(tensor.shape) for tensor in load_file("o.safetensors").values())
    assert shapes == [(1, 1), (1, 3), (3,)]


def test_weights_are_loaded_strictly(command: Command) -> None:
    torch.manual_seed(7)
    trained = {
        name: torch.randn_like(tensor.float()).to(tensor.dtype) for name, tensor in zoo_make().state_dict().items()
    }
    trained["1.running_var"] = trained["1.running_var"].abs() + 1
    save_file(trained, "good.safetensors")
    torch.save({"state_dict": trained, "epoch": 3}, "good.pth")
    model = zoo_make()
    model.load_state_dict(trained)
    x = torch.randn(2, 3, 8, 8)
    numpy.save("x.npy", x.numpy())
    for file in ("good.safetensors", "good.pth"):
        arguments = ("--weights", file, "--input", SHAPE, "--backend", "eager", "-o", "out")
        assert command("compile", "zoo:make", *arguments).code == 0
        assert command("run", "out", "--input", "x.npy", "--save-outputs", "y.safetensors").code == 0
        torch.testing.assert_close(load_file("y.safetensors")["output"], model(x).detach(), rtol=1e-4, atol=1e-4)


def test_weights_that_do_not_fit(command: Command) -> None:
    given = zoo_make().state_dict()
    given["4.bias"] = torch.zeros(9)
    given["extra"] = given.pop("0.bias")
    save_file(given, "other.safetensors")
    result = command("show", "zoo:make", "--input", SHAPE, "--weights", "other.safetensors")
    assert result == Result(
        2,
        "",
        "fxopt: error: other.safetensors does not fit the model: missing: 0.bias; unexpected: extra; "
        "of another shape: 4.bias (9,) instead of (10,)\n",
    )


def test_torchvision_and_timm_know_their_inputs(command: Command) -> None:
    assert "f32[1, 3, 299, 299]" in command("show", "torchvision:inception_v3").out.splitlines()[0]
    assert "f32[1, 3, 176, 176]" in command("show", "timm:resnet10t").out.splitlines()[0]
    smaller = command("show", "torchvision:squeezenet1_1", "--input", "1x3x64x64").out
    assert "f32[1, 3, 64, 64]" in smaller.splitlines()[0]


def test_exported_program(command: Command) -> None:
    model, x = zoo_make(), torch.randn(2, 3, 8, 8)
    torch.export.save(torch.export.export(model, (x,)), "model.pt2")
    result = command("compile", "model.pt2", "--backend", "eager", "-o", "out")
    assert result.code == 0, result.err
    torch.testing.assert_close(fxopt.load("out")(x), model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("show nothing", "cannot read 'nothing': MODEL is torchvision:NAME"),
        ("show torchvision:resnet19", "torchvision has no model 'resnet19'; did you mean resnet18"),
        ("show timm:repvgg_a9", "timm has no model 'repvgg_a9'; did you mean"),
        ("show zoo:missing --input 1x3", "cannot import zoo:missing"),
        ("show zoo_that_is_not:x --input 1x3", "No module named 'zoo_that_is_not'"),
        ("show .zoo:make --input 1x3", "cannot import .zoo:make: TypeError"),
        ("show zoo_misspelt:make --input 1x3", "cannot import zoo_misspelt:make: SyntaxError"),
        ("show zoo_failing:make --input 1x3", "cannot import zoo_failing:make: ZeroDivisionError: division by zero"),
        ("show zoo:number --input 1x3", "zoo:number is a int, neither a torch.nn.Module nor callable"),
        ("show zoo:broken --input 1x3", "zoo:broken() failed with KeyError"),
        ("show missing.pt2", "missing.pt2 does not exist"),
        ("show zoo.py.pt2", "was not written by torch.export.save"),
        ("show zoo:make", "zoo:make does not say what it takes: add --input"),
        ("show zoo:make --input 1y3", "cannot read the input '1y3'"),
        ("show zoo:make --input 1x3:float31", "unknown element type"),
        ("show zoo:make --input 99999999999x99999", "an input of shape 99999999999x99999 cannot be made"),
        ("show zoo:make --input 99999999999999999999x3", "an input of shape 99999999999999999999x3 cannot be made"),
        ("show zoo:Pair --input ids=1x3 --input 1x3", "name every --input, or none"),
        ("show zoo:make --input 2x3x8x8 --frontend magic", "magic"),
        ("show zoo:make --input 2x3x8x8 --weights none.safetensors", "none.safetensors does not exist"),
        ("explain zoo:make --input 2x3x8x8 --passes nothing", "no pass named 'nothing'"),
        ("explain zoo:make --input 2x3x8x8 --passes fold_batch_norm(eps=1)", "fold_batch_norm has no option 'eps'"),
        ("explain zoo:make --input 2x3x8x8 --passes fold_batch_norm(a={[]:1})", "is not a spec"),
        (f"explain zoo:make --input 2x3x8x8 --passes x{'-' * 100_000}", "is not a spec"),
        ("explain zoo:make --input 2x3x8x8 --passes simplify,fold_batch_norm(clone_shared=True", "is not a spec"),
        ("explain zoo:make --input 2x3x8x8 --passes simplify'", "is not a spec"),
        ("show zoo:make --input 2x3x8x8 --weights junk.pt", "cannot read junk.pt"),
        ("show zoo:make --input 2x3x8x8 --weights .", ". is a folder"),
        ("compile zoo:make --input 2x3x8x8 --backend onnx(num_threads=0.5) -o out", "num_threads must be an integer"),
        ("compile zoo:make --input 2x3x8x8 --backend nothing -o out", "no backend named 'nothing'"),
        ("compile zoo:make --input 2x3x8x8", "--output"),
        ("run not_there", "not_there is not a folder"),
        ("run .", "was not written by fxopt"),
        ("nonsense", "No such command"),
        ("show", "MODEL"),
    ],
)  # fmt: skip
def test_user_errors_are_one_line_and_exit_code_2(command: Command, arguments: str, message: str) -> None:
    Path("zoo.py.pt2").write_text("no archive", encoding="utf-8")
    Path("junk.pt").write_text("hi", encoding="utf-8")
    Path("zoo_misspelt.py").write_text("def make(:\n", encoding="utf-8")
    Path("zoo_failing.py").write_text("1 / 0\n", encoding="utf-8")
    result = command(*arguments.split())
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("fxopt: error: ")
    assert result.err.count("\n") == 1
    assert message in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--input y=1x3x8x8", "no free input 'y'"),
        ("--input 1x3x8x8 --input 1x3x8x8", "no free input ''"),
        ("--input none.npy", "none.npy does not exist"),
        ("--input zoo.py", "zoo.py"),
        ("--input 1x3x9x8", "expected shape"),
        ("--mean a", "--mean takes one number or three"),
        ("--save-outputs out.txt", "--save-outputs writes safetensors"),
        ("--save-outputs zoo.py/out.safetensors", "--save-outputs: cannot write zoo.py/out.safetensors"),
        ("--save-outputs folder.safetensors", "--save-outputs: cannot write folder.safetensors"),
    ],
)
def test_user_errors_of_run(command: Command, engine: Path, arguments: str, message: str) -> None:
    Path("folder.safetensors").mkdir()
    result = command("run", str(engine), *arguments.split())
    assert result.code == 2
    assert result.err.startswith("fxopt: error: ")
    assert result.err.count("\n") == 1
    assert message in result.err


@pytest.mark.usefixtures("command")
def test_debug_leaves_the_traceback() -> None:
    for arguments in (["--debug", "show", "nothing"], ["show", "nothing", "--debug"]):
        with pytest.raises(fxopt.InputError, match="cannot read 'nothing'"):
            main(arguments)


def test_a_pass_that_finds_nothing_is_a_warning(new_process: NewProcess, tmp_path: Path) -> None:
    (tmp_path / "zoo.py").write_text(MODELS, encoding="utf-8")
    command = "from fxopt.cli import main; import sys; main(sys.argv[1:])"
    arguments = "compile zoo:Pair --input 2x5 --input 2x5 --passes fold_batch_norm --backend eager -o out"
    result = new_process.run(["-c", command, *arguments.split()], path=[tmp_path])
    assert result.returncode == 0
    assert result.stderr == "warning: fold_batch_norm changed nothing: the program has no node it applies to\n"


def test_verbose_logs_to_standard_error(command: Command) -> None:
    arguments = ("show", "zoo:make", "--input", SHAPE, "--passes", "fold_batch_norm")
    assert "1 rewrites" in command("-v", *arguments).err
    assert command(*arguments).err == ""


def test_output_can_be_piped(new_process: NewProcess) -> None:
    source = "import sys; from fxopt.cli import main; main(['backends', '--json'])"
    assert {entry["name"] for entry in json.loads(new_process.code(source))["backends"]} >= {"eager", "onnx"}


def test_axes_are_read() -> None:
    assert parse_axes(["x:2=height", "ids:1", "x:3"]) == {"x": {2: "height", 3: "x_3"}, "ids": {1: "ids_1"}}
    with pytest.raises(fxopt.InputError, match="cannot read the axis 'x': write an input and an axis of it"):
        parse_axes(["x"])
    with pytest.raises(fxopt.InputError, match="axis 2 of x is given twice"):
        parse_axes(["x:2", "x:2=height"])


def test_input_shapes() -> None:
    spec = parse_input("mask=2x3:bool")
    assert (spec.name, spec.shape, spec.dtype) == ("mask", (2, 3), torch.bool)
    assert parse_input("4").shape == (4,)
    ids = parse_input("2x64:int64").random()
    assert ids.dtype == torch.int64
    assert set(ids.unique().tolist()) == {0, 1}
    assert torch.equal(parse_input("8").random(1), parse_input("8").random(1))
