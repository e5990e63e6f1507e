"""importance: what each criterion says about channels, held to what removing them really does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxopt
from fxopt.analysis.channels import find_channels
from fxopt.analysis.importance import CRITERIA, importance
from fxopt.errors import InputError
from fxopt.frontends.capture import capture
from fxopt.passes import PruneChannels


def two_layers(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)).double().eval()


def scores_of(model: nn.Module, data: Any, criterion: str, loss: Any = None) -> Tensor:
    """Of the first group."""
    program = capture(model, (data[0][0],), calibration=data, loss=loss)
    channels = find_channels(program)
    free = [group for group in channels.groups if group.locked is None]
    found = importance(program, channels, free, criterion)[0]
    assert isinstance(found, Tensor)
    return found


def batches(*, labels: bool = True, count: int = 3) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    pairs = []
    for _ in range(count):
        x = torch.randn(32, 6, generator=generator, dtype=torch.float64)
        pairs.append((x, torch.randint(0, 3, (32,), generator=generator)) if labels else (x,))
    return pairs


def test_gram_predicts_the_error_of_every_removal() -> None:
    model, data = two_layers(), batches(count=64)
    scores = scores_of(model, data, "gram")
    heard = torch.cat([model[1](model[0](x)).detach() for x, _ in data])
    heard = heard - heard.mean(0)
    wanted = heard @ model[2].weight.detach().T
    order = scores.argsort()
    for removed in range(1, 6):
        kept = order[removed:]
        best = torch.linalg.lstsq(heard[:, kept], wanted).solution
        error = (wanted - heard[:, kept] @ best).square().sum() / wanted.square().sum()
        assert float(scores[order[:removed]].sum()) == pytest.approx(float(error), rel=0.15)


def test_of_two_channels_that_say_the_same_gram_keeps_one() -> None:
    model = two_layers()
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):
            tensor[1] = tensor[0]
        model[2].weight[:, :2] = 5.0
    scores = scores_of(model, batches(count=300), "gram")
    pair = scores[:2].sort().values
    assert pair[0] < 0.01 * pair[1]


def test_gram_ranks_a_large_group_in_rounds() -> None:
    scores = scores_of(two_layers(150), batches(count=64), "gram")
    assert len(set(scores.tolist())) > 80
    assert bool(scores.isfinite().all())


class _Gated(nn.Module):
    """A residual block; every sample's channels can be gated where they are read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(6, 5)
        self.block = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.gated(x, torch.ones(1, 5, dtype=x.dtype))

    def gated(self, x: Tensor, gate: Tensor) -> Tensor:
        y = self.stem(x)
        z = y + self.block(functional.relu(y) * gate)
        return self.head(z * gate)


class _Plain(_Gated):
    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(y + self.block(functional.relu(y)))


@pytest.mark.parametrize("frozen", [False, True])
def test_taylor_is_the_squared_derivative_by_a_gate_of_every_sample(frozen: bool) -> None:
    model, data = _Plain().double().eval().requires_grad_(not frozen), batches()
    gated = _Gated().double()
    total = torch.zeros(5, dtype=torch.float64)
    for x, labels in data:
        gate = torch.ones(len(x), 5, dtype=torch.float64, requires_grad=True)
        loss = functional.cross_entropy(gated.gated(x, gate), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, gate)
        total += gradient.square().sum(0)
    expected = total / sum(len(x) for x, _ in data)
    torch.testing.assert_close(scores_of(model, data, "taylor"), expected)


def test_taylor_with_a_loss_of_the_callers() -> None:
    def loss(output: Tensor, target: dict[str, Tensor]) -> Tensor:
        return functional.mse_loss(output, target["value"] + target["shift"])

    plain, named = [], []
    for x, _ in batches():
        value = torch.randn(len(x), 3, dtype=torch.float64)
        plain.append((x, value))
        named.append({"input": x, "value": value - 1, "shift": torch.ones(3, dtype=torch.float64)})
    model = two_layers()
    expected = scores_of(model, plain, "taylor")
    program = capture(model, (plain[0][0],), calibration=named, loss=loss)
    channels = find_channels(program)
    (found, *_) = importance(program, channels, [item for item in channels.groups if item.locked is None], "taylor")
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "needs data: pass calibration="),
        (batches(labels=False), "needs targets: let each calibration batch hold them behind the inputs"),
        ([(batches()[0][0], torch.zeros(5, dtype=torch.int64))], "targets .* do not fit the first output .*pass loss="),
        ([(batches()[0][0], torch.zeros(32))], "neither classes .* nor values of the output's shape: pass loss="),
        ([(batches()[0][0] * torch.inf, batches()[0][1])], "is not finite"),
    ],
)
def test_taylor_says_what_it_lacks(data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fxopt.explain(
            two_layers(), (batches()[0][0],), [PruneChannels(ratio=0.5, criterion="taylor")], calibration=data
        )


def test_gram_needs_data() -> None:
    with pytest.raises(InputError, match="needs data: pass calibration="):
        fxopt.explain(two_layers(), (batches()[0][0],), [PruneChannels(ratio=0.5, criterion="gram")])


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_queries_and_keys_are_ranked_too(criterion: str) -> None:
    torch.manual_seed(0)
    attention = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    data = [(torch.randn(4, 5, 16), torch.randn(4, 5, 16)) for _ in range(2)]
    program = capture(attention, (data[0][0],), calibration=data)
    channels = find_channels(program)
    free = [group for group in channels.groups if group.locked is None]
    assert len(free) == 3  # queries with keys, values, the hidden channels
    for found in importance(program, channels, free, criterion):
        if criterion == "bn_scale":
            assert found == "no batch norm to rank by"
        else:
            assert isinstance(found, Tensor)
            assert bool((found > 0).all())


def test_gram_does_not_take_what_a_few_samples_leave_undecided_for_spare() -> None:
    model = two_layers(40)
    few = scores_of(model, [tuple(item[:12] for item in pair) for pair in batches(count=1)], "gram")
    many = scores_of(model, batches(count=200), "gram")
    # twelve samples span eleven directions, so without care all but eleven channels would cost nothing
    assert float(few.sort().values[:20].sum()) > 0.5 * float(many.sort().values[:20].sum())


def test_gram_does_not_take_channels_for_needless_that_rest_on_the_calibration_data() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    with torch.no_grad():
        model[0].weight[:4, 3:] = 0
        model[0].weight[4:, :3] = 0
        model[0].weight[4:] *= 2
    seen = batches(count=64)
    for x, _ in seen:
        x[:, 3:] = 0  # nothing of what the last four channels are for
    scores = scores_of(model, seen, "gram")
    assert float(scores[4:].min()) > 0.1 * float(scores[:4].min())


def test_gram_is_the_same_before_and_after_a_norm_is_folded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        model[3].running_var.copy_(torch.logspace(-4, 2, 5))
        model[3].weight.uniform_(0.5, 2)
    folded = fxopt.optimize(model.double().eval(), batches()[0][0], ["fold_batch_norm"]).module
    assert not any(isinstance(item, nn.BatchNorm1d) for item in folded.modules())
    torch.testing.assert_close(
        scores_of(model, batches(), "gram"), scores_of(folded.eval(), batches(), "gram"), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_no_criterion_writes_into_the_weights(criterion: str) -> None:
    model, data = two_layers(), batches()
    program = capture(model, (data[0][0],), calibration=data)
    before = {name: item.clone() for name, item in program.module.state_dict().items()}
    channels = find_channels(program)
    importance(program, channels, [group for group in channels.groups if group.locked is None], criterion)
    assert all(torch.equal(item, before[name]) for name, item in program.module.state_dict().items())


def test_gram_where_a_norm_behind_scales_positions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.BatchNorm1d(5), nn.Linear(12, 8))
    data = [(torch.randn(16, 5, 8, dtype=torch.float64),) for _ in range(4)]
    assert bool(scores_of(model.double().eval(), data, "gram").isfinite().all())
