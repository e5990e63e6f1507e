"""The one door for changes: every edit keeps the graph legal, counts, and never writes into a tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

import fxopt
from fxopt import edit
from fxopt.errors import InputError
from fxopt.program import Program
from fxopt.verify import check_shapes, check_structure

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """conv, relu twice used; a module called twice; a parameter read by the graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 1)
        self.act = nn.ReLU()
        self.twice = nn.Conv2d(3, 3, 1)
        self.scale = nn.Parameter(torch.full((3, 1, 1), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.conv(x))
        return self.twice(self.twice(y)) + y * self.scale


@pytest.fixture
def program() -> Program:
    return fxopt.capture(Net().eval(), X)


def names(program: Program) -> list[str]:
    return [node.name for node in program.nodes]


def is_legal(program: Program) -> bool:
    program.graph.lint()
    return check_structure(program, program) is None and check_shapes(program, program) is None


def test_insert_before(program: Program) -> None:
    anchor = program.node("act")
    node = edit.insert_before(program, anchor, torch.neg, (program.node("conv"),), name="negated")
    edit.set_arguments(program, anchor, (node,))
    assert names(program)[:4] == ["x", "conv", "negated", "act"]
    assert torch.equal(program.run(X)[0], _by_hand(lambda net, x: net.act(-net.conv(x))))
    assert is_legal(program)


def test_insert_call_calls_the_same_module(program: Program) -> None:
    output = program.nodes[-1]
    (result,) = output.all_input_nodes
    node = edit.insert_call(program, output, program.node("act"), (result,))
    edit.set_operand(program, [output], result, node)
    assert [item.target for item in program.callers(node)] == ["act", "act"]
    assert torch.equal(program.run(X)[0], Net().eval()(X).relu().detach())
    assert is_legal(program)
    with pytest.raises(InputError, match=r"^x calls no module$"):
        edit.insert_call(program, output, program.node("x"), (result,))


def test_insert_after_takes_over_all_users(program: Program) -> None:
    node = edit.insert_after(program, program.node("act"), torch.mul, (program.node("act"), 2.0))
    assert {user.name for user in node.users} == {"twice", "mul"}
    assert list(program.node("act").users) == [node]
    assert torch.equal(program.run(X)[0], _by_hand(lambda net, x: 2.0 * net.act(net.conv(x))))
    assert is_legal(program)


def test_insert_after_a_method_and_a_module(program: Program) -> None:
    edit.insert_after(program, program.node("act"), "neg")
    module = edit.insert_after(program, program.node("act"), nn.Sigmoid(), name="act")
    assert module.target == "act_1"
    assert torch.equal(program.run(X)[0], _by_hand(lambda net, x: -torch.sigmoid(net.act(net.conv(x)))))
    assert is_legal(program)


def test_replace_keeps_the_path_of_a_module_that_nobody_else_calls(program: Program) -> None:
    new = edit.replace(program, program.node("conv"), nn.Conv2d(3, 3, 3, padding=1))
    assert new.name == "conv"
    assert program.module.get_parameter("conv.weight").shape == (3, 3, 3, 3)
    assert is_legal(program)


def test_replace_gives_a_shared_module_a_fresh_path_and_leaves_the_other_call_alone(program: Program) -> None:
    first, second = (node for node in program.nodes if node.target == "twice")
    new = edit.replace(program, second, nn.Conv2d(3, 3, 3, padding=1))
    assert str(new.target).startswith("twice_")
    assert first.target == "twice"
    assert isinstance(program.module_of(first), nn.Conv2d)
    assert program.module.get_parameter("twice.weight").shape == (3, 3, 1, 1)
    assert is_legal(program)


def test_replace_by_a_function_drops_the_module(program: Program) -> None:
    edit.replace(program, program.node("act"), torch.sigmoid)
    edit.clean(program)
    assert "act" not in dict(program.module.named_modules())
    assert torch.equal(program.run(X)[0], _by_hand(lambda net, x: torch.sigmoid(net.conv(x))))
    assert is_legal(program)


def test_replace_takes_the_programs_mode(program: Program) -> None:
    edit.insert_after(program, program.node("conv"), nn.Dropout().train(), name="drop")
    assert not program.module.get_submodule("drop").training
    edit.replace(program, program.node("drop"), nn.Dropout().train())
    assert not program.module.get_submodule("drop").training


def test_bypass(program: Program) -> None:
    edit.bypass(program, program.node("act"), program.node("conv"))
    edit.clean(program)
    assert "act" not in names(program)
    assert torch.equal(program.run(X)[0], _by_hand(lambda net, x: net.conv(x)))
    assert is_legal(program)


def test_bypass_of_the_last_node_moves_the_output(program: Program) -> None:
    edit.bypass(program, program.node("add"), program.node("act"))
    edit.clean(program)
    assert names(program) == ["x", "conv", "act", "output"]
    assert [name for name, _ in program.module.named_parameters()] == ["conv.weight", "conv.bias"]
    assert is_legal(program)


def test_set_tensor_assigns_and_never_writes(program: Program) -> None:
    other = program.copy()
    old = program.module.get_parameter("conv.weight")
    value = old.detach().clone()
    edit.set_tensor(program, program.node("conv"), "weight", value * 2)
    new = program.module.get_parameter("conv.weight")
    assert new is not old
    assert isinstance(new, nn.Parameter)
    assert torch.equal(new, value * 2)
    assert torch.equal(old, value)
    assert other.module.get_parameter("conv.weight") is old


@pytest.mark.parametrize("trains", [True, False])
def test_set_tensor_keeps_requires_grad(program: Program, trains: bool) -> None:
    program.module.get_parameter("conv.weight").requires_grad_(trains)
    edit.set_tensor(program, program.node("conv"), "weight", torch.zeros(3, 3, 1, 1))
    assert program.module.get_parameter("conv.weight").requires_grad is trains


def test_set_tensor_removes_and_adds_a_bias(program: Program) -> None:
    edit.set_tensor(program, program.node("conv"), "bias", None)
    assert "conv.bias" not in dict(program.module.named_parameters())
    edit.set_tensor(program, program.node("conv"), "bias", torch.ones(3))
    assert isinstance(program.module.get_parameter("conv.bias"), nn.Parameter)
    assert is_legal(program)


def test_set_tensor_on_a_buffer_keeps_a_buffer() -> None:
    program = fxopt.capture(nn.Sequential(nn.BatchNorm2d(3)).eval(), X)
    node = next(node for node in program.nodes if node.op == "call_module")
    edit.set_tensor(program, node, "running_mean", torch.ones(3))
    assert torch.equal(program.module.get_buffer("0.running_mean"), torch.ones(3))
    assert "0.running_mean" in program.module.state_dict()


def test_set_tensor_clones_a_shared_module_for_this_call_only(program: Program) -> None:
    first, second = (node for node in program.nodes if node.target == "twice")
    edit.set_tensor(program, second, "weight", torch.zeros(3, 3, 1, 1))
    assert first.target == "twice"
    assert second.target != "twice"
    assert program.module.get_parameter("twice.weight").abs().sum() > 0
    assert torch.equal(program.module.get_parameter(f"{second.target}.weight"), torch.zeros(3, 3, 1, 1))
    assert program.callers(first) == [first]
    assert is_legal(program)


def test_set_tensor_clones_a_module_whose_weight_the_graph_reads() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) @ self.linear.weight

    x = torch.ones(2, 3)
    program = fxopt.capture(Reads(), x)
    node = next(node for node in program.nodes if node.op == "call_module")
    weight = program.module.get_parameter("linear.weight").detach().clone()
    edit.set_tensor(program, node, "weight", torch.zeros(3, 3))
    edit.set_tensor(program, node, "bias", torch.ones(3))
    torch.testing.assert_close(program.run(x)[0], torch.ones(2, 3) @ weight)
    assert is_legal(program)


@pytest.mark.parametrize(("node", "name"), [("act", "weight"), ("x", "weight"), ("conv", "nothing"), ("add", "bias")])
def test_set_tensor_refuses_what_is_not_there(program: Program, node: str, name: str) -> None:
    with pytest.raises(InputError, match=f"{node} calls no module with a parameter or buffer '{name}'"):
        edit.set_tensor(program, program.node(node), name, torch.zeros(1))


@pytest.mark.parametrize(
    ("name", "trains", "path"),
    [
        ("extra", False, "extra"),
        ("conv", False, "conv_1"),
        ("deep.down.extra", True, "deep.down.extra"),
        ("scale", True, "scale_1"),
    ],
)
def test_insert_tensor(program: Program, name: str, trains: bool, path: str) -> None:
    act, value = program.node("act"), torch.full((1,), 3.0)
    reader = edit.insert_tensor(program, program.node("twice"), nn.Parameter(value) if trains else value, name=name)
    assert reader.target == path
    edit.insert_before(program, program.node("twice"), torch.mul, (act, reader))
    tensors = dict(program.module.named_parameters() if trains else program.module.named_buffers())
    assert torch.equal(tensors[path], torch.full((1,), 3.0))
    assert is_legal(program)


def test_set_call_keeps_the_name(program: Program) -> None:
    node = program.node("mul")
    edit.set_call(program, node, torch.sub, node.args, {"alpha": 2})
    assert program.node("mul") is node
    assert program.op(node) == "sub"
    with pytest.raises(InputError, match="conv calls no function"):
        edit.set_call(program, program.node("conv"), torch.sub, ())


def test_set_module_is_for_all_callers(program: Program) -> None:
    before = program.copy()
    other = nn.Conv2d(3, 3, 1, bias=False)
    edit.set_module(program, program.node("twice"), other)
    assert program.module_of(program.node("twice_1")) is other
    assert before.module_of(before.node("twice")) is not other
    assert is_legal(program)
    with pytest.raises(InputError, match="add calls no module"):
        edit.set_module(program, program.node("add"), other)


def test_set_parameter_keeps_what_it_is(program: Program) -> None:
    before = program.copy()
    edit.set_parameter(program, program.node("scale"), torch.full((3, 1, 1), 2.0))
    parameters = dict(program.module.named_parameters())
    assert torch.equal(parameters["scale"], torch.full((3, 1, 1), 2.0))
    assert parameters["scale"].requires_grad
    assert torch.equal(dict(before.module.named_parameters())["scale"], torch.full((3, 1, 1), 0.5))
    with pytest.raises(InputError, match="conv reads no tensor"):
        edit.set_parameter(program, program.node("conv"), torch.ones(1))


def test_clean_removes_dead_nodes_modules_and_tensors(program: Program) -> None:
    edit.insert_before(program, program.node("add"), nn.Linear(3, 3), (program.node("act"),), name="dead")
    edit.insert_tensor(program, program.node("add"), torch.ones(1), name="unread")
    assert "dead.weight" in program.module.state_dict()
    edit.clean(program)
    assert "dead" not in names(program)
    assert not {name for name in program.module.state_dict() if name.startswith(("dead", "unread"))}
    assert program.module.state_dict().keys() == Net().state_dict().keys()


EDITS: list[Callable[[Program, fx.Node], object]] = [
    lambda program, node: edit.insert_before(program, node, torch.neg, (program.node("conv"),)),
    lambda program, node: edit.insert_after(program, node, torch.neg),
    lambda program, node: edit.replace(program, node, torch.neg),
    lambda program, node: edit.replace(program, node, nn.Sigmoid()),
    lambda program, node: edit.bypass(program, node, program.node("conv")),
    lambda program, node: edit.set_arguments(program, node, (program.node("x"),)),
    lambda program, node: edit.set_call(program, program.node("mul"), torch.add, (node, 1.0)),
    lambda program, node: edit.set_module(program, program.node("conv"), nn.Conv2d(3, 3, 1)),
    lambda program, node: edit.set_parameter(program, program.node("scale"), torch.ones(3, 1, 1)),
    lambda program, node: edit.set_tensor(program, program.node("conv"), "bias", torch.ones(3)),
    lambda program, node: edit.insert_tensor(program, node, torch.ones(1), name="extra"),
]


@pytest.mark.parametrize("change", EDITS)
def test_every_edit_counts_drops_analyses_and_recompiles(
    program: Program, change: Callable[[Program, fx.Node], object]
) -> None:
    runs: list[int] = []

    def analysis(_: Program) -> int:
        runs.append(1)
        return len(runs)

    program.analysis(analysis)
    program.module(X)
    edits = program.edits
    change(program, program.node("act"))
    assert program.edits == edits + 1
    program.analysis(analysis)
    assert len(runs) == 2
    edit.clean(program)
    torch.testing.assert_close(program.module(X), program.run(X)[0])


def test_names_of_new_modules_never_collide_with_tensors_or_modules(program: Program) -> None:
    for _ in range(3):
        edit.insert_after(program, program.node("act"), nn.Sigmoid(), name="scale")
    targets = [str(node.target) for node in program.nodes if node.op == "call_module"]
    assert sorted(target for target in targets if target.startswith("scale")) == ["scale_1", "scale_2", "scale_3"]
    assert is_legal(program)


def _by_hand(body: Callable[[Net, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    net = Net().eval()
    with torch.no_grad():
        y = body(net, X)
        return net.twice(net.twice(y)) + y * net.scale
