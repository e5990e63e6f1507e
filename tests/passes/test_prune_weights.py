"""`prune_weights`: which weights go, that they stay away, what is refused, and what the files take."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fxopt
from fxopt.masking import mask_of
from fxopt.passes import PruneWeights
from fxopt.passes_base import Plan, Rewrite
from fxopt.testing import assert_equivalent, assert_pass, assert_skips

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 12), (3, 8)),
    "linear without bias": (lambda: nn.Linear(8, 12, bias=False), (3, 5, 8)),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, padding=1), (2, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3, stride=2, bias=False), (2, 8, 9, 9)),
    "conv2d with groups": (lambda: nn.Conv2d(8, 16, 3, groups=2, dilation=2, padding="same"), (2, 8, 9, 9)),
    "conv2d that pads with values": (lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"), (2, 8, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(8, 4, 2), (2, 8, 4, 4, 4)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(8, 12, 3), (2, 8, 5)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(8, 16, 3, 2, groups=2, output_padding=1), (2, 8, 5, 5)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(8, 4, 2, bias=False), (2, 8, 3, 3, 3)),
}


def sample(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(1)
    make, shape = LAYERS[name]
    return nn.Sequential(make()).double().eval(), sample(*shape)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).eval()


def masks(program: fxopt.Program) -> dict[str, torch.Tensor]:
    found = {str(node.target): mask_of(program.module_of(node)) for node in program.nodes}
    return {path: mask for path, mask in found.items() if mask is not None}


def zeroed(model: nn.Module, kept: dict[str, torch.Tensor]) -> nn.Module:
    """The model with zeros written where masks are False."""
    twin = copy.deepcopy(model)
    for path, mask in kept.items():
        twin.get_parameter(f"{path}.weight").data.mul_(mask)
    return twin


def optimized(model: nn.Module, x: torch.Tensor, *passes: Any, **options: Any) -> fxopt.Program:
    return fxopt.optimize(model, (x,), list(passes), on_failure="raise", **options)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block"])
@pytest.mark.parametrize("criterion", ["l1", "wanda"])
def test_the_pruned_program_is_the_model_with_these_weights_at_zero(name: str, pattern: Any, criterion: Any) -> None:
    model, x = build(name)
    pass_ = PruneWeights(pattern=pattern, criterion=criterion)
    program = assert_pass(pass_, model, (x,), rewrites=1, skips=[], calibration=[x])
    kept = masks(program)
    assert torch.equal(program.module(x), zeroed(model, kept)(x))
    assert int((~kept["0"]).sum()) == kept["0"].numel() // 2
    assert torch.equal(program.module.get_parameter("0.weight") != 0, kept["0"])


@pytest.mark.parametrize("name", LAYERS)
def test_patterns_are_along_the_channels_that_an_output_sums(name: str) -> None:
    model, x = build(name)
    module: Any = model[0]
    for pattern in ("2:4", "block"):
        mask = masks(optimized(model, x, PruneWeights(pattern=pattern)))["0"]
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            parts = [part.transpose(0, 1) for part in mask.chunk(module.groups)]
        else:
            parts = list(mask.chunk(getattr(module, "groups", 1)))
        for part in parts:  # [outputs, inputs, ...] of one group
            fours = part.unflatten(1, (-1, 4))
            if pattern == "2:4":
                assert (fours.sum(2) == 2).all()
            else:
                blocks = fours.unflatten(0, (-1, 4)).sum((1, 3))
                assert ((blocks == 0) | (blocks == 16)).all()


@pytest.mark.parametrize("name", LAYERS)
def test_weights_that_are_zero_go_first_and_change_nothing(name: str) -> None:
    model, x = build(name)
    weight = model.get_parameter("0.weight")
    zeros = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    weight.data[zeros] = 0
    before = model(x)
    program = optimized(model, x, PruneWeights(sparsity=float(zeros.double().mean())))
    assert torch.equal(masks(program)["0"], ~zeros)
    assert torch.equal(program.module(x), before)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, 0.9])
def test_l1_masks_are_those_of_torch(sparsity: float) -> None:
    model, x = network(), sample(2, 3, 8, 8, dtype=torch.float32)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, nn.Conv2d)}

    peer = copy.deepcopy(model)
    for path in layers:
        prune.l1_unstructured(peer.get_submodule(path), "weight", sparsity)
    ours = masks(optimized(model, x, PruneWeights(sparsity=sparsity)))
    assert all(torch.equal(ours[path], peer.get_submodule(path).weight_mask.bool()) for path in layers)

    peer = copy.deepcopy(model)
    prune.global_unstructured(
        [(peer.get_submodule(path), "weight") for path in layers], prune.L1Unstructured, amount=sparsity
    )
    ours = masks(optimized(model, x, PruneWeights(sparsity=sparsity, scope="global")))
    assert ours.keys() == layers.keys()
    assert all(torch.equal(ours[path], peer.get_submodule(path).weight_mask.bool()) for path in layers)


@pytest.mark.parametrize("sparsity", [0.01, 1 / 3, 0.5, 0.777, 0.99])
@pytest.mark.parametrize("criterion", ["l1", "wanda"])
def test_sparsity_is_met_to_one_weight(sparsity: float, criterion: Any) -> None:
    model, x = network(), sample(2, 3, 8, 8, dtype=torch.float32)
    per_layer = masks(optimized(model, x, PruneWeights(sparsity=sparsity, criterion=criterion), calibration=[x]))
    for mask in per_layer.values():
        assert abs(int((~mask).sum()) - sparsity * mask.numel()) <= 0.5
    pass_ = PruneWeights(sparsity=sparsity, criterion=criterion, scope="global")
    together = masks(optimized(model, x, pass_, calibration=[x]))
    total = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Conv2d))
    assert abs(sum(int((~mask).sum()) for mask in together.values()) - sparsity * total) <= 0.5


def test_wanda_is_weight_times_the_norm_of_the_input_within_each_output() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5)).double(), sample(40, 6) * torch.tensor([1, 9, 1, 0.1, 3, 1])
    kept = masks(optimized(model, x[:2], PruneWeights(criterion="wanda"), calibration=list(x.split(8))))["0"]
    scores = model[0].weight.detach().abs() * x.norm(dim=0)  # as the paper's code has it
    expected = torch.ones_like(kept).scatter(1, scores.argsort(1)[:, :3], False)
    assert torch.equal(kept, expected)


def test_wanda_gives_what_is_left_over_to_the_outputs_that_lose_least() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False)).double()
    model[0].weight.data = torch.tensor([[1.0, 5.0, 9.0], [2.0, 3.0, 4.0], [1.0, 6.0, 7.0]]).double()
    x = torch.eye(3).double()
    kept = masks(optimized(model, x, PruneWeights(criterion="wanda", sparsity=0.45), calibration=[x]))["0"]
    assert kept.tolist() == [[False, True, True], [False, False, True], [False, True, True]]


def test_wanda_reads_the_channels_of_each_group_and_all_calls_of_a_shared_layer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 1, groups=2, bias=False)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.conv(x) + self.conv(y)

    model = Twice().double()
    nn.init.ones_(model.conv.weight)
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).double().reshape(1, 4, 1)
    y = torch.tensor([0.0, 2.0, 0.5, 0.0]).double().reshape(1, 4, 1)
    program = fxopt.optimize(model, (x, y), [PruneWeights(criterion="wanda")], calibration=[(x, y)])
    assert len(program.report.passes[0].rewrites) == 1
    assert masks(program)["conv"].flatten(1).tolist() == [[False, True]] * 4


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda tensors: torch.optim.SGD(tensors, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        lambda tensors: torch.optim.AdamW(tensors, 0.1, weight_decay=0.1),
    ],
)
def test_training_leaves_pruned_weights_at_zero(pattern: Any, optimizer: Any) -> None:
    x = sample(4, 3, 8, 8, dtype=torch.float32)
    model = network()
    program = optimized(model, x, PruneWeights(pattern=pattern, ignore=("0",)))
    kept, module = masks(program), program.module.train()
    before = {path: module.get_parameter(f"{path}.weight").detach().clone() for path in kept}
    steps = optimizer(module.parameters())
    for _ in range(3):
        steps.zero_grad()
        module(x).square().sum().backward()
        steps.step()
    assert kept.keys() == {"3", "5"}
    for path, mask in kept.items():
        weight = module.get_parameter(f"{path}.weight")
        assert not weight[~mask].any()
        assert (weight != before[path])[mask].all()
    # what was trained is what is pruned further, saved and copied
    assert torch.equal(program.copy().module.eval()(x), program.module.eval()(x))


def test_permanent_zeros_come_back_in_training() -> None:
    x = sample(4, 3, 8, 8, dtype=torch.float32)
    program = optimized(network(), x, PruneWeights(permanent=True))
    assert not masks(program)
    assert type(program.module.get_submodule("3")) is nn.Conv2d
    weight = program.module.get_parameter("3.weight")
    zeros = weight == 0
    assert int(zeros.sum()) == weight.numel() // 2
    program.module(x).square().sum().backward()
    assert weight.grad is not None
    assert weight.grad[zeros].any()


def test_a_second_run_prunes_further_or_makes_permanent() -> None:
    x = sample(2, 3, 8, 8, dtype=torch.float32)
    half = optimized(network(), x, PruneWeights())
    why = ["108 of its 216 weights are masked already", "288 of its 576 weights are masked already"]
    assert_skips(PruneWeights(), half, None, [*why, "16 of its 32 weights are masked already"])
    assert_skips(PruneWeights(sparsity=0.3), half, None, [*why, "16 of its 32 weights are masked already"])
    more = fxopt.PassManager([PruneWeights(sparsity=0.75)]).run(half)
    for path, mask in masks(more).items():
        assert int((~mask).sum()) == round(0.75 * mask.numel())
        assert not (mask & ~masks(half)[path]).any()
    fixed = fxopt.PassManager([PruneWeights(sparsity=0.1, permanent=True)]).run(more)
    assert not masks(fixed)
    assert torch.equal(fixed.module(x), more.module(x))


def test_wanda_brings_nothing_back_that_l1_pruned() -> None:
    x = sample(2, 3, 8, 8, dtype=torch.float32)
    passes = [PruneWeights(), PruneWeights(sparsity=0.6, criterion="wanda")]
    first = optimized(network(), x, passes[0])
    both = optimized(network(), x, *passes, calibration=[x])
    assert all(not (mask & ~masks(first)[path]).any() for path, mask in masks(both).items())


def test_the_report_has_the_sparsity_of_each_layer() -> None:
    x = sample(2, 3, 8, 8, dtype=torch.float32)
    program = optimized(network(), x, PruneWeights(sparsity=0.7))
    assert [rewrite.what for rewrite in program.report.passes[0].rewrites] == [
        "prune 151 of 216 weights (69.9%) of 0",
        "prune 403 of 576 weights (70.0%) of 3",
        "prune 22 of 32 weights (68.8%) of 5",
    ]
    assert "masked" in program.text()


def test_a_plan_replays_on_another_checkpoint() -> None:
    x = sample(2, 3, 8, 8, dtype=torch.float32)
    plan = Plan.of(PruneWeights(scope="global"), fxopt.capture(network(), x))
    torch.manual_seed(9)
    other = fxopt.capture(nn.Sequential(*(copy.deepcopy(layer) for layer in network())), x)
    for rewrite in plan.rewrites:
        PruneWeights(scope="global").apply(other, rewrite)
    counts = {path: int((~mask).sum()) for path, mask in masks(other).items()}
    assert counts == {rewrite.node[1:]: rewrite.params["count"] for rewrite in plan.rewrites}
    with pytest.raises(fxopt.PassError, match="has no layer of 5 weights there"):
        PruneWeights().apply(other, Rewrite("_3", "", {"count": 1, "units": 5}))


def test_channels_that_do_not_divide_by_four_are_refused() -> None:
    x = sample(2, 3, 8, 8, dtype=torch.float32)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 6, 1, groups=6))
    why = "2:4 takes a multiple of 4 input channels for each output, not "
    assert_pass(PruneWeights(pattern="2:4"), model, (x,), rewrites=1, skips=[f"{why}3", f"{why}1"])
    fill = "blocks of 4 outputs x 4 inputs do not fill "
    assert_skips(PruneWeights(pattern="block"), model, x, [f"{fill}8 x 3", f"{fill}6 x 8", f"{fill}1 x 1"])


def test_ignored_and_tiny_layers_and_weights_that_are_not_finite_are_left() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(1, 1))
    x = sample(2, 4, dtype=torch.float32)
    why = "no weight of it is among the least 30% of its 1 weights"
    assert_pass(PruneWeights(sparsity=0.3, ignore=("0",)), model, (x,), rewrites=1, skips=["ignored", why])
    program = fxopt.capture(model, x)
    with torch.no_grad():
        program.module.get_parameter("1.weight")[0, 0] = torch.nan
    assert [skip.why for skip in Plan.of(PruneWeights(), program).skips] == [
        "its weight is not finite",
        "no weight of it is among the least 50% of its 1 weights",
    ]


def test_global_scope_may_leave_a_layer_whole() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.constant_(model[0].weight, 2.0)  # equal weights go in their order
    nn.init.constant_(model[1].weight, 1.0)
    x = sample(2, 4, dtype=torch.float32)
    why = "no weight of it is among the least 25% of all weights"
    program = assert_pass(PruneWeights(scope="global", sparsity=0.25), model, (x,), rewrites=1, skips=[why])
    assert masks(program)["1"].flatten().tolist() == [False] * 8 + [True] * 8


def test_tied_and_computed_weights_are_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head, self.free = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.Linear(4, 4)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return self.head(self.free(nn.functional.linear(self.embed(x), w)))

    inputs = torch.tensor([[0, 4]]), sample(4, 4, dtype=torch.float32)
    computed = "its weight is computed, or read from elsewhere: there is no layer to hold a mask"
    tied = "its weight is also that of embed: a mask would untie them"
    assert_pass(PruneWeights(), Tied(), inputs, rewrites=1, skips=[computed, tied])


def test_a_layer_called_twice_is_pruned_once_for_both() -> None:
    layer = nn.Linear(4, 4)
    x = sample(2, 4, dtype=torch.float32)
    program = assert_pass(PruneWeights(), nn.Sequential(layer, nn.ReLU(), layer), (x,), rewrites=1, skips=[])
    assert len({id(program.module_of(node)) for node in program.nodes if program.op(node) == "linear"}) == 1
    assert program.cost().params == 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("criterion", ["l1", "wanda"])
def test_half_precision_and_frozen_weights_stay_so(dtype: torch.dtype, criterion: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype).requires_grad_(False)
    x = sample(3, 8, dtype=dtype)
    program = assert_pass(PruneWeights(criterion=criterion), model, (x,), rewrites=2, calibration=[x])
    assert all(item.dtype is dtype and not item.requires_grad for item in program.module.parameters())
    assert torch.equal(program.module(x), zeroed(model, masks(program))(x))


def seasoned(model: nn.Module) -> nn.Module:
    """Statistics as training leaves them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(sample(module.num_features))
            module.running_var.copy_(sample(module.num_features).square() + 0.5)
    return model


def test_batch_norm_folds_before_and_after() -> None:
    x = sample(2, 4, 8, 8)
    model = seasoned(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)))
    model = model.double().eval()
    pruned = optimized(model, x, PruneWeights(pattern="2:4"))
    folded = fxopt.PassManager(["fold_batch_norm"], on_failure="raise").run(pruned)
    assert_equivalent(pruned, folded, (x,), tolerance=1e-12)
    assert all(torch.equal(mask, masks(pruned)[path]) for path, mask in masks(folded).items())
    assert len(masks(folded)) == 2
    assert not any(folded.op(node) == "batch_norm" for node in folded.nodes)
    kept = masks(optimized(model, x, "fold_batch_norm", PruneWeights(pattern="2:4")))
    assert [int(mask.sum()) for mask in kept.values()] == [144, 32]


def test_passes_that_would_lose_a_mask_refuse() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.one(x) + self.other(x))

    x = sample(2, 4, 6, 6)
    model = Sum().double()
    pruned = optimized(model, x, PruneWeights())
    why = "one has a mask, which a merged layer would lose: merge first, or make the mask permanent"
    plan = fxopt.explain(pruned, passes="merge_branches")[0]
    assert ([skip.why for skip in plan.skips], plan.rewrites) == ([why], [])
    with pytest.raises(
        fxopt.PipelineError,
        match=r"cannot cut or fit layers that have a mask \(one, other, last\): put it before prune_weights",
    ):
        fxopt.optimize(pruned.module, x, ["prune_channels(ratio=0.5)"])
    done = optimized(model, x, "prune_channels(ratio=0.5)", "merge_branches", PruneWeights())
    assert len(masks(done)) == 2
    permanent = optimized(model, x, PruneWeights(permanent=True), "merge_branches")
    assert len(permanent.report.passes[1].rewrites) == 1
    # what is fitted again would lose the zeros that no mask holds, too
    with pytest.raises(fxopt.PipelineError, match="put prune_channels before prune_weights"):
        optimized(model, x, PruneWeights(permanent=True), "prune_channels(ratio=0.5)")


def test_a_masked_program_is_captured_again() -> None:
    x = sample(2, 3, 8, 8, dtype=torch.float32)
    program = optimized(network(), x, PruneWeights())
    again = fxopt.capture(program.module, x)
    assert masks(again).keys() == masks(program).keys()
    assert torch.equal(again.module(x), program.module(x))


@pytest.mark.parametrize("backend", ["onnx", "eager"])
def test_engines_answer_alike_and_compressed_files_shrink(backend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    x = sample(3, 64, dtype=torch.float32)
    sizes = {}
    for sparsity in (0.5, 0.9):
        compiled = fxopt.compile(model, (x,), passes=[PruneWeights(sparsity=sparsity)], backend=backend)
        reference = optimized(model, x, PruneWeights(sparsity=sparsity))
        assert_equivalent(reference, compiled, (x,), tolerance=1e-6)
        for compress in (False, True):
            place = tmp_path / f"{sparsity} {compress}"
            compiled.save(place, compress=compress)
            assert torch.equal(fxopt.load(place)(x), compiled(x))
            file = next(path for path in place.iterdir() if path.name.startswith("model."))
            sizes[sparsity, compress] = file.stat().st_size / sum(item.nbytes for item in model.parameters())
    # no mask is left in an engine's file
    assert sizes[0.5, False] < 1.2
    assert sizes[0.5, True] < 0.6
    assert sizes[0.9, True] < 0.25


def test_engine_of_a_program_that_trains_keeps_the_mask() -> None:
    x = sample(2, 3, 8, 8, dtype=torch.float32)
    compiled = fxopt.compile(network().train(), (x,), passes=[PruneWeights()], backend="eager", verify="structure")
    engine: Any = compiled.engine
    assert "3.mask" in dict(engine._module.named_buffers())


def test_two_of_four_is_marked_in_the_onnx_file(tmp_path: Path) -> None:
    import onnx

    from fxopt.lowering.onnx_lower import SPARSITY_KEY

    x = sample(2, 3, 8, 8, dtype=torch.float32)
    for name, passes in (("2:4", [PruneWeights(pattern="2:4"), "fold_batch_norm"]), ("plain", [PruneWeights()])):
        fxopt.compile(network(), (x,), passes=passes).save(tmp_path / name)
        marks = {item.key: item.value for item in onnx.load(tmp_path / name / "model.onnx").metadata_props}
        assert marks.get(SPARSITY_KEY) == ("3,5" if name == "2:4" else None)


def test_wanda_without_data_is_refused() -> None:
    x = sample(2, 3, 8, 8, dtype=torch.float32)
    with pytest.raises(fxopt.InputError, match='"wanda" ranks weights by the inputs that they see: pass calibration='):
        optimized(network(), x, PruneWeights(criterion="wanda"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0}, "sparsity must be a share between 0 and 1, not 0"),
        ({"sparsity": 1.0}, "sparsity must be a share between 0 and 1, not 1.0"),
        ({"sparsity": "half"}, "sparsity must be a share between 0 and 1, not 'half'"),
        ({"scope": "model"}, "scope must be one of 'layer', 'global', not 'model'"),
        ({"pattern": "4:8"}, "pattern must be one of 'unstructured', '2:4', 'block', not '4:8'"),
        ({"criterion": "l2"}, "criterion must be one of 'l1', 'wanda', not 'l2'"),
        ({"pattern": "2:4", "sparsity": 0.7}, 'pattern "2:4" has a sparsity of 0.5, not 0.7'),
        (
            {"pattern": "2:4", "scope": "global"},
            'pattern "2:4" is decided four weights at a time: leave scope at "layer"',
        ),
        ({"ignore": "head"}, "ignore must be a tuple of patterns: write ('head',) for this one alone"),
        ({"permanent": 1}, "permanent must be True or False, not 1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        PruneWeights(**options)
