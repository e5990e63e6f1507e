from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from fxopt.errors import ArtifactError, BackendError
from fxopt.lowering.onnx_model import DATA_FILE, MODEL_FILE, OnnxModel
from fxopt.lowering.onnx_session import open_session

X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def model() -> OnnxModel:
    """y = x @ first + second, a weight that nothing uses, and one that is used for nothing."""
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "first"], ["xw"]),
            helper.make_node("Add", ["xw", "second"], ["y"]),
            helper.make_node("Neg", ["dead"], ["nowhere"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3000])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    generator = torch.Generator().manual_seed(0)
    weights = {
        "first": torch.randn(2, 3000, generator=generator),
        "second": torch.randn(3000, generator=generator),
        "dead": torch.randn(2000, generator=generator),
        "spare": torch.randn(2000, generator=generator),
    }
    return OnnxModel.of(proto, weights)


def run(loaded: OnnxModel) -> torch.Tensor:
    session = open_session(loaded, providers=["CPUExecutionProvider"], threads=1)
    return torch.from_numpy(session.run(None, {"x": X.numpy()})[0])


def test_weights_are_inputs_for_tools_and_unused_ones_are_dropped() -> None:
    whole = model()
    assert list(whole.weights) == ["first", "second", "dead"]
    seen = whole.as_inputs()
    onnx.checker.check_model(seen, full_check=True)
    assert [item.name for item in seen.graph.input] == ["x", "first", "second", "dead"]
    assert not seen.graph.initializer
    del seen.graph.node[-1]
    back = whole.with_graph(seen)
    assert [item.name for item in back.graph.graph.input] == ["x"]
    assert list(back.weights) == ["first", "second"]
    assert torch.equal(run(back), run(whole))


def test_the_forms_give_the_same_answer() -> None:
    whole = model()
    expected = X @ whole.weights["first"] + whole.weights["second"]
    torch.testing.assert_close(run(whole), expected)
    torch.testing.assert_close(run(OnnxModel(whole.as_one(), {})), expected)


@pytest.mark.parametrize(
    ("limit", "files"), [(2**30, [MODEL_FILE]), (1000, [MODEL_FILE, DATA_FILE])], ids=["one file", "external data"]
)
def test_saved_and_loaded(tmp_path: Path, limit: int, files: list[str]) -> None:
    whole = model()
    whole.save(tmp_path, one_file_below=limit)
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    onnx.checker.check_model(str(tmp_path / MODEL_FILE))  # by path: anybody's tool finds the external data
    reference = onnx.load_model(tmp_path / MODEL_FILE)
    assert {item.name for item in reference.graph.initializer} == {"first", "second", "dead"}
    loaded = OnnxModel.load(tmp_path)
    assert loaded.weights.keys() == whole.weights.keys()
    assert all(torch.equal(loaded.weights[name], whole.weights[name]) for name in whole.weights)
    assert torch.equal(run(loaded), run(whole))


def test_more_weights_of_4_bits_than_a_message_holds_are_refused() -> None:
    whole = model()
    held = helper.make_tensor("second", TensorProto.INT4, [3000], bytes(1500), raw=True)
    packed = OnnxModel.of(whole.graph, {"first": whole.weights["first"]}, [held])
    assert len(packed.as_external(largest_message=4000).graph.initializer) == 2
    with pytest.raises(BackendError, match=r"graph and weights of 4 bits have 1,\d{3} bytes, .* takes 1,500 of these"):
        packed.as_external(largest_message=1500)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    model().save(tmp_path, one_file_below=1000)
    data = (tmp_path / DATA_FILE).read_bytes()
    (tmp_path / DATA_FILE).write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match="too short for the weight dead"):
        OnnxModel.load(tmp_path)
    (tmp_path / DATA_FILE).unlink()
    with pytest.raises(ArtifactError, match="holds the weights and cannot be read"):
        OnnxModel.load(tmp_path)
    (tmp_path / MODEL_FILE).write_bytes(b"\xff\xff not a model")
    with pytest.raises(ArtifactError, match="not a readable ONNX model"):
        OnnxModel.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("location", "../secret", "was not written by fxopt"),
        ("length", "7", "has 7 bytes"),
        ("offset", "x", "no offset"),
    ],
)
def test_external_data_elsewhere_is_refused(tmp_path: Path, key: str, value: str, message: str) -> None:
    model().save(tmp_path, one_file_below=1000)
    proto = onnx.load_model(tmp_path / MODEL_FILE, load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        if entry.key == key:
            entry.value = value
    (tmp_path / MODEL_FILE).write_bytes(proto.SerializeToString())
    with pytest.raises(ArtifactError, match=message):
        OnnxModel.load(tmp_path)
