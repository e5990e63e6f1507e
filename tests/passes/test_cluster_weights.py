"""`cluster_weights`: what it clusters, what it refuses, what it saves, and where it loses nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.codebook import CodebookWeight
from fxopt.errors import InputError
from fxopt.passes import ClusterWeights, PruneWeights
from fxopt.testing import assert_equivalent, assert_pass, assert_skips

CONVOLUTIONS = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}


def few_values(model: nn.Module, count: int = 16) -> nn.Module:
    """The model in float64, its weights rounded to so many values."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            values = torch.randn(count, generator=generator, dtype=torch.float64)
            parameter.data = values[torch.randint(0, count, parameter.shape, generator=generator)]
    return model


def sample(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def clusters_exactly(model: nn.Module, x: torch.Tensor, rewrites: int = 1, **options: Any) -> fxopt.Program:
    return assert_pass(ClusterWeights(**options), model, (x,), rewrites=rewrites, skips=[], tolerance=0.0)


def held(program: fxopt.Program) -> list[CodebookWeight]:
    return [module for module in program.module.modules() if isinstance(module, CodebookWeight)]


def test_golden() -> None:
    program = assert_pass(
        ClusterWeights(bits=2),
        few_values(nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU()), 4).float(),
        (sample(1, 3, 7, 7, dtype=torch.float32),),
        after="""
            %input_1 = input : f32[1, 3, 7, 7]
            %_0_bias = get_attr[0.bias] : f32[4]
            %_0 = codebook_weight[0]() {[4, 3, 3, 3], bits=2, clusters=4} : f32[4, 3, 3, 3]
            %conv2d = conv2d(%input_1, %_0, %_0_bias, (2, 2), (0, 0), (1, 1), 1) : f32[1, 4, 3, 3]
            %_1 = relu[1](%conv2d) : f32[1, 4, 3, 3]
            return (%_1,)
        """,
        rewrites=1,
        skips=[],
        tolerance=0.0,
    )
    assert program.report.passes[0].rewrites[0].what == "cluster 0: 432 to 43 bytes"
    assert sorted(program.module.state_dict()) == ["0.bias", "0.codebook", "0.codes"]


@pytest.mark.parametrize("dimension", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_convolutions_with_few_values_are_exact(
    dimension: int, transposed: bool, groups: int, bias: bool, per: str
) -> None:
    layer: Any = CONVOLUTIONS[dimension][transposed]
    options: dict[str, Any] = {"output_padding": 1} if transposed else {}
    convolution = layer(4, 12, 3, stride=2, padding=1, dilation=2, groups=groups, bias=bias, **options)
    x = sample(2, 4, *[7] * dimension)
    clusters_exactly(few_values(nn.Sequential(convolution), 4), x, n_clusters=4, per=per)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(1, 2), "same"])
def test_convolutions_that_pad_with_values(mode: str, padding: Any) -> None:
    model = few_values(nn.Sequential(nn.Conv2d(4, 6, 3, padding=padding, padding_mode=mode)))
    program = clusters_exactly(model, sample(2, 4, 7, 7))
    assert [program.op(node) for node in program.nodes].count("pad") == 1


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_number_of_bits(bits: int) -> None:
    model = few_values(nn.Sequential(nn.Linear(40, 30)), 2**bits)
    program = clusters_exactly(model, sample(2, 40), bits=bits)
    assert held(program)[0].codes.nbytes == 1200 * bits // 8


def test_clusters_that_are_no_power_of_two() -> None:
    program = clusters_exactly(few_values(nn.Sequential(nn.Linear(40, 30)), 5), sample(2, 40), n_clusters=5)
    assert held(program)[0].bits == 3
    assert held(program)[0].codebook.shape == (1, 5)


def test_embeddings() -> None:
    model = few_values(nn.Sequential(nn.Embedding(50, 8, padding_idx=3), nn.Linear(8, 50)))
    clusters_exactly(model, torch.tensor([[1, 3, 7], [0, 49, 3]]), rewrites=2)


def test_constant_weights_and_single_rows() -> None:
    model = nn.Sequential(nn.Linear(300, 1), nn.Linear(1, 300)).double()
    nn.init.constant_(model[0].weight, 0.3)
    nn.init.zeros_(model[1].weight)
    clusters_exactly(model, sample(2, 300), rewrites=2, n_clusters=2)


def test_weights_are_clustered_optimally() -> None:
    from fxopt.kmeans import centroids

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30)).eval()
    program = assert_pass(ClusterWeights(bits=3), model, (sample(2, 20, dtype=torch.float32),), rewrites=1)
    expected = torch.from_numpy(centroids(model[0].weight.detach().reshape(1, -1).numpy(), 8)).float()
    assert torch.equal(held(program)[0].codebook, expected)
    distances = (model[0].weight.detach()[..., None] - expected[0]).abs()
    assert torch.equal(held(program)[0](), expected[0][distances.argmin(-1)])


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.conv(x).relu()) + self.conv(x)


def test_a_layer_called_at_several_places_keeps_one_weight_and_bias() -> None:
    model = few_values(CalledTwice(), 4)
    program = clusters_exactly(model, sample(2, 3, 5, 5), bits=2)
    assert sorted(program.module.state_dict()) == ["conv.bias", "conv.codebook", "conv.codes"]
    assert [program.op(node) for node in program.nodes].count("codebook_weight") == 1


def test_called_directly_behind_itself() -> None:
    linear = nn.Linear(6, 6)
    clusters_exactly(few_values(nn.Sequential(linear, linear, linear), 4), sample(2, 6), bits=2)


def test_tied_weights_stay_tied_with_biases_of_their_own() -> None:
    model = nn.Sequential(nn.Embedding(20, 8), nn.ReLU(), nn.Linear(8, 20))
    model[2].weight = model[0].weight
    few_values(model, 4)
    model[2].weight = model[0].weight
    program = clusters_exactly(model, torch.tensor([[1, 19, 0]]), bits=2)
    assert len(held(program)) == 1
    assert sum(item.numel() for item in program.module.parameters()) == 4 + 20
    assert program.report.passes[0].rewrites[0].what.startswith("cluster 0, 2: ")


def test_bytes_are_counted_as_they_are_held() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU()).eval()
    before = fxopt.capture(model, sample(2, 8, 6, 6, dtype=torch.float32)).cost()
    after = fxopt.optimize(model, sample(2, 8, 6, 6, dtype=torch.float32), "cluster_weights").cost()
    assert before.bytes - after.bytes == 1152 * 4 - (1152 // 2 + 16 * 4)
    assert after.macs == before.macs


def test_later_passes_leave_the_codes_alone() -> None:
    model = few_values(nn.Sequential(nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU())).eval()
    x = sample(2, 8, 6, 6)
    program = fxopt.optimize(model, x, ["cluster_weights", "default"])
    assert len(held(program)) == 1
    assert [skip.why for skip in program.report.passes[2].skips] == ["behind conv2d; before relu"]
    assert_equivalent(model, program, x)


def test_a_second_run_says_that_it_is_clustered() -> None:
    model = few_values(nn.Sequential(nn.Linear(20, 20)))
    program = fxopt.optimize(model, sample(2, 20), "cluster_weights")
    assert_skips(ClusterWeights(), program, whys=["clustered already"])


def test_ignored_layers() -> None:
    model = few_values(nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20)))
    assert_pass(ClusterWeights(ignore=("1",)), model, (sample(2, 20),), rewrites=1, skips=["ignored"], tolerance=0.0)


@pytest.mark.parametrize(
    ("pass_", "why"),
    [
        (ClusterWeights(), "nothing to gain: 48 bytes as it is, 70 clustered"),
        (ClusterWeights(bits=2, per="channel"), "nothing to gain: 48 bytes as it is, 67 clustered"),
    ],
)
def test_layers_too_small_to_gain(pass_: ClusterWeights, why: str) -> None:
    assert_skips(pass_, nn.Linear(3, 4), sample(2, 3, dtype=torch.float32), [why])


def test_one_element() -> None:
    why = "nothing to gain: 4 bytes as it is, 65 clustered"
    assert_skips(ClusterWeights(), nn.Linear(1, 1, bias=False), sample(2, 1, dtype=torch.float32), [why])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    model = nn.Linear(20, 20)
    model.weight.data[3, 4] = value
    program = fxopt.capture(model, sample(2, 20, dtype=torch.float32))
    plan = fxopt.explain(program, passes="cluster_weights")[0]
    assert [skip.why for skip in plan.skips] == ["its weight is not finite"]
    assert not plan.rewrites


def test_layers_without_a_functional_form() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(8, 8, 3, stride=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(x, [12])

    program = fxopt.capture(Sized(), sample(2, 8, 5, dtype=torch.float32), frontend="symbolic")
    assert_skips(ClusterWeights(), program, whys=["up is called with an output size"])
    renorm = nn.Sequential(nn.Embedding(20, 20, max_norm=1.0))
    program = fxopt.capture(renorm, torch.tensor([1, 2]), frontend="symbolic")
    assert_skips(ClusterWeights(), program, whys=["0 normalises its weight as it is read"])


def test_weights_that_something_else_reads() -> None:
    class Peek(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(20, 20)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + self.linear.weight.sum()

    program = fxopt.capture(Peek(), sample(2, 20, dtype=torch.float32))
    assert_skips(ClusterWeights(), program, whys=["its weight is read by linear_weight too"])


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("options", [{}, {"permanent": True}, {"criterion": "wanda", "scope": "global"}])
def test_pruned_weights_stay_zero_in_training_too(per: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Unflatten(1, (48, 1)), nn.Conv1d(48, 32, 1), nn.Flatten())
    model, x = model.double().eval(), sample(64, 64)
    passes = [PruneWeights(sparsity=0.6, **options), ClusterWeights(bits=3, per=per)]  # type: ignore[arg-type]
    pruned = fxopt.optimize(model, x, passes[:1], calibration=[x])
    program = fxopt.optimize(model, x, passes, calibration=[x])
    assert [rewrite.what.endswith("pruned weights stay zero") for rewrite in program.report.passes[-1].rewrites] == [
        True,
        True,
    ]
    before = [
        layer.weight * getattr(layer, "mask", 1) for layer in pruned.module.children() if hasattr(layer, "weight")
    ]
    found = held(program)
    for weight, module in zip(before, found, strict=True):
        assert module.codebook.shape[1] == 7
        assert torch.equal(module() == 0, weight == 0)
    module = program.module.train()
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
    for weight, layer in zip(
        before, [item for item in module.modules() if isinstance(item, CodebookWeight)], strict=True
    ):
        assert torch.equal(layer() == 0, weight == 0)
    compiled = fxopt.compile(model.float(), x.float(), passes=passes, calibration=[x.float()], backend="onnx")
    assert compiled.report.passes[-1].rewrites


def test_zeros_that_are_rare_are_values_like_others() -> None:
    layer = nn.Linear(64, 64, bias=False).double()
    layer.weight.data[0, :8] = 0
    program = fxopt.optimize(nn.Sequential(layer).eval(), sample(2, 64), [ClusterWeights()])
    assert held(program)[0].codebook.shape == (1, 16)
    layer.weight.data[:8] = 0
    program = fxopt.optimize(nn.Sequential(layer).eval(), sample(2, 64), [ClusterWeights()])
    assert held(program)[0].codebook.shape == (1, 15)
    # all that is not zero is clustered as if it were alone
    alone = nn.Linear(64, 56, bias=False).double()
    alone.weight.data = layer.weight.data[8:]
    expected = fxopt.optimize(nn.Sequential(alone).eval(), sample(2, 64), [ClusterWeights(n_clusters=15)])
    torch.testing.assert_close(held(program)[0]()[8:], held(expected)[0](), rtol=1e-9, atol=1e-9)


def test_other_layers_and_computed_weights() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(20, 20, batch_first=True)
            self.weight = nn.Parameter(torch.randn(20, 20))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.gru(x)[0], self.weight * 2)

    whys = ["the weights of gru are not clustered", "its weight comes from mul"]
    assert_skips(ClusterWeights(), Other(), sample(2, 3, 20, dtype=torch.float32), whys)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20)).to(dtype)
    program = assert_pass(ClusterWeights(bits=3), model, (sample(2, 20, dtype=dtype),), rewrites=1, skips=[])
    assert held(program)[0]().dtype is dtype
    distances = (model[0].weight.double()[..., None] - held(program)[0].codebook.double()[0]).abs()
    assert torch.equal(held(program)[0]().double(), held(program)[0].codebook.double()[0][distances.argmin(-1)])


def test_centroids_train_and_frozen_ones_do_not() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20))
    model[2].weight.requires_grad = False
    x = sample(8, 20, dtype=torch.float32)
    module = fxopt.optimize(model, x, "cluster_weights").module
    trains = {name: item.requires_grad for name, item in module.named_parameters()}
    assert trains == {"0.codebook": True, "0.bias": True, "2.codebook": False, "2.bias": True}
    codes = module.get_buffer("0.codes").clone()
    optimizer = torch.optim.SGD([item for item in module.parameters() if item.requires_grad], 0.1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (module(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(module.get_buffer("0.codes"), codes)


def test_sensitive_weights_are_kept_more_exactly() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 20)).eval()
    x = sample(64, 40, dtype=torch.float32)
    x[:, 20:] *= 1e-2  # what reads these hardly matters, however large it is
    model[0].weight.data[:, 20:] *= 4
    batches = list(zip(x.split(16), torch.randint(0, 20, (64,)).split(16), strict=True))
    errors = {}
    for sensitivity in ("none", "fisher"):
        pass_ = ClusterWeights(bits=2, sensitivity=sensitivity)  # type: ignore[arg-type]
        program = assert_pass(pass_, model, (x[:2],), rewrites=1, skips=[], calibration=batches)
        errors[sensitivity] = float((program.module(x) - model(x)).square().mean().detach())
    assert errors["fisher"] < 0.5 * errors["none"]


def test_all_layers_are_weighted_by_the_gradients_of_the_trained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import fxopt.analysis.weight_sensitivity as home
    import fxopt.passes.cluster_weights as used

    calls = []

    def counted(program: fxopt.Program) -> Any:
        calls.append(program)
        return home.squared_gradients(program)

    monkeypatch.setattr(used, "squared_gradients", counted)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20)).eval()
    batches = [(sample(8, 20, dtype=torch.float32), torch.arange(8))]
    fxopt.optimize(model, sample(2, 20, dtype=torch.float32), ClusterWeights(sensitivity="fisher"), calibration=batches)
    assert len(calls) == 1


def test_a_weight_that_the_loss_does_not_reach() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(20, 20), nn.Linear(20, 20)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.left(x), self.right(x)

    batches = [(sample(8, 20, dtype=torch.float32), torch.arange(8))]
    assert_pass(
        ClusterWeights(sensitivity="fisher"),
        Fork().eval(),
        (sample(2, 20, dtype=torch.float32),),
        rewrites=1,
        skips=["the loss does not depend on its weight on the calibration data"],
        calibration=batches,
    )


def test_fisher_without_data_or_targets_is_refused() -> None:
    x = sample(2, 20, dtype=torch.float32)
    with pytest.raises(InputError, match=r"cluster_weights\(sensitivity='fisher'\) .* pass calibration="):
        fxopt.optimize(nn.Linear(20, 20), x, "cluster_weights(sensitivity='fisher')")
    with pytest.raises(InputError, match="this needs targets"):
        fxopt.optimize(nn.Linear(20, 20), x, "cluster_weights(sensitivity='fisher')", calibration=[x])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_clusters": 1}, "n_clusters must be a whole number from 2 to 256, not 1"),
        ({"n_clusters": 257}, "n_clusters must be a whole number from 2 to 256, not 257"),
        ({"n_clusters": True}, "n_clusters must be a whole number from 2 to 256, not True"),
        ({"bits": 9}, "bits must be a whole number from 1 to 8, not 9"),
        ({"bits": 4, "n_clusters": 16}, "give n_clusters or bits, not both"),
        ({"per": "layer"}, "per must be one of 'tensor', 'channel', not 'layer'"),
        ({"sensitivity": "taylor"}, "sensitivity must be one of 'none', 'fisher', not 'taylor'"),
        ({"ignore": "head"}, r"ignore must be a tuple of patterns: write \('head',\)"),
        ({"ignore": (1,)}, r"ignore must be a tuple of patterns, not \(1,\)"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClusterWeights(**options)


def network() -> nn.Module:
    """A network with small and large, grouped, shared and tied layers, in evaluation mode."""
    torch.manual_seed(0)
    shared = nn.Conv2d(32, 32, 3, padding=1)
    return nn.Sequential(
        nn.Conv2d(8, 32, 3, padding=1, padding_mode="circular"),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        shared,
        nn.ReLU(),
        shared,
        nn.Conv2d(32, 64, 3, groups=4, bias=False),
        nn.ConvTranspose2d(64, 16, 2, stride=2),
        nn.Flatten(),
        nn.Linear(16 * 64, 10),
    ).eval()


@pytest.mark.parametrize("pass_", [ClusterWeights(), ClusterWeights(bits=3, per="channel")], ids=str)
def test_onnx(pass_: ClusterWeights, tmp_path: Path) -> None:
    model, x = network(), sample(3, 8, 6, 6, dtype=torch.float32)
    program = fxopt.optimize(model, x, pass_)
    compiled = fxopt.compile(model, x, passes=pass_, backend="onnx")
    assert_equivalent(program, compiled, x, tolerance=1e-4)
    compiled.save(tmp_path / "engine")
    loaded = fxopt.load(tmp_path / "engine")
    assert_equivalent(compiled, loaded, sample(5, 8, 6, 6, dtype=torch.float32), tolerance=0.0)
    # what the graph takes does not grow with the weights, of which none may be there in another form
    assert (tmp_path / "engine" / "model.onnx").stat().st_size < program.cost().bytes + 12_000


def test_the_promised_bits_in_every_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, x = nn.Sequential(nn.Linear(500, 800, bias=False)), sample(2, 500, dtype=torch.float32)
    program = fxopt.optimize(model, x, "cluster_weights")
    save_file(program.module.state_dict(), tmp_path / "weights.safetensors")
    onnx = fxopt.compile(model, x, passes="cluster_weights", backend="onnx")
    onnx.save(tmp_path / "onnx")
    for file in (tmp_path / "weights.safetensors", tmp_path / "onnx" / "model.onnx"):
        assert 8 * file.stat().st_size / 400_000 < 4.1
    other = fxopt.optimize(nn.Sequential(nn.Linear(500, 800, bias=False)), x, "cluster_weights").module
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(other(x), program.module(x))


def test_eager_artifact(tmp_path: Path) -> None:
    model, x = network(), sample(3, 8, 6, 6, dtype=torch.float32)
    compiled = fxopt.compile(model, x, passes="cluster_weights", backend="eager")
    compiled.save(tmp_path / "engine")
    assert_equivalent(compiled, fxopt.load(tmp_path / "engine"), sample(5, 8, 6, 6, dtype=torch.float32), tolerance=0.0)


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_a_clustered_program_is_captured_again(frontend: Any) -> None:
    program = fxopt.optimize(network(), sample(3, 8, 6, 6, dtype=torch.float32), "cluster_weights")
    again = fxopt.capture(program.module, sample(3, 8, 6, 6, dtype=torch.float32), frontend=frontend)
    assert_equivalent(program, again, sample(3, 8, 6, 6, dtype=torch.float32))
    assert again.cost().bytes <= program.cost().bytes + 100
