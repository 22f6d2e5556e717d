"""The theorem holds, against the user's own model with the refitted head; what breaks its terms is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import tracin
from oracle import assert_close, untouched
from tracin.errors import (
    ConvergenceError,
    DataError,
    LossError,
    ModelError,
    NotFiniteError,
    OptionError,
)
from tracin.methods.representer_points.refit import fit_head

N, M, C, D = 23, 7, 3, 5
WEIGHTS = torch.tensor([0.5, 1.0, 2.5])


def net(bias: bool = True, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, D), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(D, C, bias=bias)).to(dtype)


def rows(n: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(0, C, (n,), generator=generator)


TRAIN, QUERIES = rows(N, 1), rows(M, 2)


def weighted(model: nn.Module, batch: Any) -> Tensor:
    """Class weights in float32, which cross_entropy does not take beside float64 logits."""
    return F.cross_entropy(model(batch[0]), batch[1], WEIGHTS.to(batch[0].dtype), reduction="none")


def smoothed(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1], reduction="none", label_smoothing=0.2)


def soft(model: nn.Module, batch: Any) -> Tensor:
    targets = 0.9 * F.one_hot(batch[1], C).to(batch[0].dtype) + 0.1 / C
    return -(targets * F.log_softmax(model(batch[0]), 1)).sum(1)


def squared_hinge(model: nn.Module, batch: Any) -> Tensor:
    """Curved on one side only."""
    signs = 2.0 * F.one_hot(batch[1], C) - 1
    return (1 - signs * model(batch[0])).clamp_min(0).square().sum(1)


def outputs(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return model(batch[0]), batch[1]


LOSSES = [tracin.losses.cross_entropy, weighted, smoothed, soft, squared_hinge]


def method(
    model: nn.Module | None = None, loss: Any = tracin.losses.cross_entropy, **options: Any
) -> tracin.RepresenterPoints:
    model = model or net()
    given = {"l2": 0.01, "batch_size": 5, "device": "cpu", "progress": False, **options}
    task = tracin.Task(model, loss, outputs=outputs)
    return tracin.RepresenterPoints(task, tracin.Checkpoint(model.state_dict(), step=3), **given)


def with_head(model: nn.Sequential, refit: Any) -> nn.Sequential:
    """The user's model in eval mode, with the refitted head in the place of its own."""
    head = model[-1]
    with torch.no_grad():
        weight = refit.weight.to(head.weight)
        head.weight.copy_(weight[:, :D])
        if head.bias is not None:
            head.bias.copy_(weight[:, D])
    return model.eval()


def theorem(
    refit: Any, model: nn.Sequential, queries: tuple[Tensor, Tensor], values: Tensor, tolerance: float
) -> None:
    """Σ_i score(z_i, z') is the logit of the label under the user's model with the refitted head."""
    logits = with_head(model, refit)(queries[0]).detach()
    assert_close(values.sum(1), logits.gather(1, queries[1][:, None])[:, 0], tolerance, "sums of scores")


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("l2", [1.0, 0.01, 1e-4])
def test_the_scores_sum_to_the_logit(loss: Any, bias: bool, l2: float) -> None:
    found = method(net(bias), loss, l2=l2)
    scores = found.influence(TRAIN, QUERIES)
    assert scores.values.dtype == torch.float64
    assert scores.provenance["residual"] <= 1e-10
    theorem(found.refit(TRAIN), net(bias), QUERIES, scores.values, 1e-8)


def test_the_theorem_catches_a_wrong_scale_and_a_missing_row() -> None:
    found = method()
    refit, values = found.refit(TRAIN), found.influence(TRAIN, QUERIES).values
    with pytest.raises(AssertionError, match=r"best overall factor 0\.95"):
        theorem(refit, net(), QUERIES, values * (N - 1) / N, 1e-8)
    with pytest.raises(AssertionError, match="sums of scores"):
        theorem(refit, net(), QUERIES, values[:, 1:], 1e-8)
    bent = replace(refit, weight=refit.weight * (1 + 1e-7))
    with pytest.raises(AssertionError, match="sums of scores"):
        theorem(bent, net(), QUERIES, values, 1e-8)


@pytest.mark.parametrize("loss", [tracin.losses.cross_entropy, weighted], ids=["ready", "weighted"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_head_is_stationary_for_the_loss_of_the_users_model(loss: Any, bias: bool) -> None:
    refit = method(net(bias), loss).refit(TRAIN)
    model = with_head(net(bias), refit)
    parameters = list(model[-1].parameters())
    objective = loss(model, TRAIN).mean() + 0.01 * sum(p.square().sum() for p in parameters)
    gradients = torch.autograd.grad(objective, parameters)
    norm = float(torch.cat([gradient.reshape(-1) for gradient in gradients]).norm())
    assert norm <= 1e-10 * 2 * 0.01 * float(refit.weight.norm())
    assert refit.gradient_norm <= 1e-10 * 2 * 0.01 * float(refit.weight.norm())
    assert refit.residual == pytest.approx(refit.gradient_norm / (0.02 * float(refit.weight.norm())))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_the_scores_are_those_of_the_formula_row_by_row(loss: Any) -> None:
    found = method(loss=loss)
    model = with_head(net(), found.refit(TRAIN))
    expected = torch.zeros(M, N, dtype=torch.float64)
    features = [torch.cat([model[:-1](part[0]), torch.ones(len(part[0]), 1)], 1) for part in (TRAIN, QUERIES)]
    for i in range(N):
        row = (TRAIN[0][i : i + 1], TRAIN[1][i : i + 1])
        logits = model(row[0]).detach().requires_grad_()
        stub = nn.Identity()
        slope = torch.autograd.grad(loss(stub, (logits, row[1])).sum(), logits)[0][0]
        for q in range(M):
            alpha = -slope[QUERIES[1][q]] / (2 * 0.01 * N)
            expected[q, i] = alpha * torch.dot(features[0][i], features[1][q])
    # The loss that narrows to float32 is judged in float32, and scored in float64.
    tolerance = 1e-6 if loss is smoothed else 1e-9
    assert_close(found.influence(TRAIN, QUERIES).values, expected.detach(), tolerance)


def test_targets() -> None:
    found = method()
    refit = found.refit(TRAIN)
    model = with_head(net(), refit)
    logits = model(QUERIES[0]).detach()
    predicted = net().eval()(QUERIES[0]).argmax(1)
    for target, classes in (("label", QUERIES[1]), ("predicted", predicted), (2, torch.full((M,), 2))):
        scores = found.influence(TRAIN, QUERIES, target=target)
        assert_close(scores.values.sum(1), logits.gather(1, classes[:, None])[:, 0], 1e-8, str(target))
        assert scores.provenance["target"] == target
    for wrong in (3, -1, "class"):
        with pytest.raises(OptionError, match=r"target is .* a class from 0 to 2"):
            found.influence(TRAIN, QUERIES, target=wrong)


def test_rows_of_a_class_hold_up_its_logit() -> None:
    """Under cross-entropy α is positive for the row's own label alone."""
    alpha = method().refit(TRAIN).alpha
    own = F.one_hot(TRAIN[1], C).bool()
    assert (alpha[own] > 0).all()
    assert (alpha[~own] < 0).all()
    assert torch.allclose(alpha.sum(1), torch.zeros(N, dtype=torch.float64), atol=1e-12)


def test_self_influence_is_the_diagonal_without_its_sign() -> None:
    own = method().self_influence(TRAIN)
    assert_close(own.values, method().influence(TRAIN, TRAIN).values.diagonal().abs(), 1e-12)
    assert own.provenance["verb"] == "self_influence"
    negative = method(loss=squared_hinge, l2=1e-3).self_influence(TRAIN)
    assert (negative.values >= 0).all()


@pytest.mark.parametrize("memory", ["2GiB", 40_000])
@pytest.mark.parametrize("within", [None, "label", 1])
def test_top_k_is_the_sorted_influence(memory: Any, within: Any) -> None:
    found = method(memory=memory)
    values = found.influence(TRAIN, QUERIES).values
    lists = found.top_k(TRAIN, QUERIES, k=4, within=within)
    for q in range(M):
        wanted = {"label": int(QUERIES[1][q]), 1: 1}.get(within)
        ids = [i for i in range(N) if wanted is None or int(TRAIN[1][i]) == wanted]
        assert lists.proponents.ids[q].tolist() == sorted(ids, key=lambda i: (-values[q, i], i))[:4]
        assert lists.opponents.ids[q].tolist() == sorted(ids, key=lambda i: (values[q, i], i))[:4]
        assert_close(lists.proponents.values[q], values[q, lists.proponents.ids[q]], 1e-12)
        assert_close(lists.opponents.values[q], values[q, lists.opponents.ids[q]], 1e-12)
    assert lists.provenance["k"] == 4


def test_tied_scores_go_by_id() -> None:
    """Rows whose features are all zero score exactly 0."""
    x = TRAIN[0].clone()
    x[3:20:2] = -x[3:20:2].abs()
    model = nn.Sequential(nn.ReLU(), nn.Linear(4, C, bias=False)).double()
    lists = method(model, memory=20_000).top_k((x, TRAIN[1]), QUERIES, k=N)
    for ids, values in ((side.ids, side.values) for side in (lists.proponents, lists.opponents)):
        for row in range(M):
            tied = ids[row][values[row] == 0].tolist()
            assert len(tied) >= 9
            assert tied == sorted(tied)


def test_lists_that_cannot_be() -> None:
    for k in (0, N + 1):
        with pytest.raises(OptionError, match=f"k is {k}"):
            method().top_k(TRAIN, QUERIES, k=k)
    few = (TRAIN[0][:5], torch.tensor([0, 0, 1, 2, 2]))
    with pytest.raises(OptionError, match="only 1 train rows have class 1"):
        method().top_k(few, QUERIES, k=2, within=1)


class Pictures(Dataset):
    """Rows one by one, as dicts."""

    def __init__(self, data: tuple[Tensor, Tensor]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data[0])

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"inputs": self.data[0][row], "targets": self.data[1][row]}


@pytest.mark.parametrize("loss", [tracin.losses.cross_entropy, weighted], ids=["ready", "weighted"])
def test_batches_do_not_matter(loss: Any) -> None:
    expected = method(loss=loss, batch_size=N).influence(TRAIN, QUERIES).values
    for size in (1, 4, "auto"):
        assert_close(method(loss=loss, batch_size=size).influence(TRAIN, QUERIES).values, expected, 1e-9)
    loader = DataLoader(TensorDataset(*TRAIN), batch_size=6)
    assert_close(method(loss=loss).influence(loader, QUERIES).values, expected, 1e-9)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    mixed = method(loss=loss).influence((TRAIN[0][order], TRAIN[1][order]), QUERIES).values
    assert_close(mixed, expected[:, order], 1e-9)


def test_dict_batches_and_models_that_return_more_than_logits() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> dict[str, Any]:
            features = self.net[:-1](x)
            return {"features": features, "logits": self.net[-1](features), "size": 3}

    model = Wrapped()
    task = tracin.Task(model, tracin.losses.cross_entropy)
    found = tracin.RepresenterPoints(
        task, tracin.Checkpoint(model.state_dict()), l2=0.01, batch_size=5, progress=False
    )
    assert found.head == "net.6"
    expected = method().influence(TRAIN, QUERIES).values
    assert_close(found.influence(Pictures(TRAIN), Pictures(QUERIES)).values, expected, 1e-12)
    reader = tracin.Task(
        model,
        lambda model, batch: F.cross_entropy(
            model(batch["inputs"])["logits"], batch["targets"], reduction="none"
        ),
        outputs=lambda model, batch: (model(batch["inputs"])["logits"], batch["targets"]),
    )
    own = tracin.RepresenterPoints(reader, found.checkpoint, l2=0.01, batch_size=5, progress=False)
    assert_close(own.influence(Pictures(TRAIN), Pictures(QUERIES)).values, expected, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_models_are_refitted_in_float64_and_scored_in_float32(dtype: torch.dtype) -> None:
    train, queries = rows(N, 1, dtype), rows(M, 2, dtype)
    found = method(net(dtype=dtype))
    scores = found.influence(train, queries)
    assert scores.values.dtype == torch.float32
    assert scores.provenance["residual"] <= 1e-10
    refit = found.refit(train)
    features = torch.cat([net(dtype=dtype).eval()[:-1](queries[0]).double(), torch.ones(M, 1)], 1)
    logits = (features @ refit.weight.mT).detach()
    assert_close(scores.values.sum(1), logits.gather(1, queries[1][:, None])[:, 0], 1e-5)


def test_the_model_is_left_as_it_was_and_the_checkpoint_counts() -> None:
    model, other = net(), net(seed=9)
    found = tracin.RepresenterPoints(
        tracin.Task(model, tracin.losses.cross_entropy),
        tracin.Checkpoint(other.state_dict()),
        l2=0.01,
        batch_size=5,
        progress=False,
    )
    with untouched(model, TRAIN, QUERIES):
        values = found.influence(TRAIN, QUERIES).values
        found.self_influence(TRAIN)
        found.top_k(TRAIN, QUERIES, k=2)
    assert_close(values, method(net(seed=9)).influence(TRAIN, QUERIES).values, 1e-12)


def test_the_start_of_a_convex_fit_does_not_matter_and_the_same_run_gives_the_same_bits() -> None:
    first = method()
    second = tracin.Checkpoint({**net().state_dict(), "6.weight": torch.zeros(C, D, dtype=torch.float64)})
    moved = tracin.RepresenterPoints(first.task, second, l2=0.01, batch_size=5, progress=False, device="cpu")
    values = first.influence(TRAIN, QUERIES).values
    assert_close(moved.influence(TRAIN, QUERIES).values, values, 1e-8)
    assert torch.equal(method().influence(TRAIN, QUERIES).values, values)


def test_the_record_says_how_far_the_refit_agrees_with_the_model() -> None:
    record = method().influence(TRAIN, QUERIES).provenance
    refit = method().refit(TRAIN)
    own, fitted = net().eval()(TRAIN[0]).detach(), with_head(net(), refit)(TRAIN[0]).detach()
    assert record["agreement"] == float((own.argmax(1) == fitted.argmax(1)).double().mean())
    both = torch.stack([own.reshape(-1), fitted.reshape(-1)])
    assert record["correlation"] == pytest.approx(float(torch.corrcoef(both)[0, 1]))
    assert (record["head"], record["l2"], record["train_rows"]) == ("6", 0.01, N)
    assert record["checkpoints"][0]["step"] == 3
    assert {"gradient_norm", "residual", "steps", "tolerance", "versions", "scale"} <= set(record)


def test_a_linear_model_is_its_own_head() -> None:
    model = nn.Linear(4, C).double()
    task = tracin.Task(model, tracin.losses.cross_entropy)
    found = tracin.RepresenterPoints(task, tracin.Checkpoint(model.state_dict()), l2=0.01, progress=False)
    assert not found.head
    refit = found.refit(TRAIN)
    logits = QUERIES[0] @ refit.weight[:, :4].mT + refit.weight[:, 4]
    sums = found.influence(TRAIN, QUERIES).values.sum(1)
    assert_close(sums, logits.gather(1, QUERIES[1][:, None])[:, 0], 1e-8)


def test_the_minimum_is_that_of_another_solver() -> None:
    sklearn = pytest.importorskip("sklearn.linear_model")
    features = net().eval()[:-1](TRAIN[0]).detach()
    ones = torch.cat([features, torch.ones(N, 1, dtype=torch.float64)], 1)
    # scikit-learn: Σ ℓ + ‖Θ‖² / (2 C), and λ n = 1 / (2 C).
    solver = sklearn.LogisticRegression(C=1 / (2 * 0.01 * N), fit_intercept=False, tol=1e-12, max_iter=10_000)
    solver.fit(ones.numpy(), TRAIN[1].numpy())
    assert_close(method().refit(TRAIN).weight, torch.from_numpy(solver.coef_), 1e-5, "weights")


def test_rows_that_do_not_fit_are_read_again_and_features_that_do_not_are_refused() -> None:
    wide = (torch.cat([TRAIN[0], torch.zeros(N, 400)], 1), TRAIN[1])
    asked = (torch.cat([QUERIES[0], torch.zeros(M, 400)], 1), QUERIES[1])

    class Narrow(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, :4])

    model = Narrow(*net())
    few = method(model, weighted, memory=20_000)
    assert_close(
        few.influence(wide, asked).values, method(loss=weighted).influence(TRAIN, QUERIES).values, 1e-9
    )
    with pytest.raises(OptionError, match=r"the features of 23 train rows take .* GiB, and memory= allows"):
        method(memory=2_000).influence(TRAIN, QUERIES)


class Drifting(Dataset):
    """Rows that change after so many reads."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        self.left -= 1
        return torch.cat([TRAIN[0][row], torch.full((400,), float(self.left < 0))]), TRAIN[1][row]


@pytest.mark.parametrize(
    ("after", "told"), [(3, "came back different"), (N + 5, "changed between two passes")]
)
def test_data_that_changes_is_refused(after: int, told: str) -> None:
    class Narrow(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, :4])

    with pytest.raises(DataError, match=f"train: row . {told}"):
        method(Narrow(*net()), weighted, memory=20_000).self_influence(Drifting(after))


def test_heads_that_cannot_be() -> None:
    with pytest.raises(OptionError, match=r"no module 'fc'\. The Linear layers are '0', '4', '6'"):
        method(head="fc")
    with pytest.raises(OptionError, match=r"'5' is a Tanh, and the head must be a Linear\. .* '0', '4', '6'"):
        method(head="5")
    with pytest.raises(OptionError, match="the model Conv2d has no Linear layer"):
        method(nn.Conv2d(1, 2, 3))
    with pytest.raises(ModelError, match=r"the output \[5, 5\] of '4' is not the logits \[5, 3\]"):
        method(head="4").influence(TRAIN, QUERIES)
    with pytest.raises(ModelError, match="is not the logits"):
        method(nn.Sequential(*net(), nn.Softplus())).influence(TRAIN, QUERIES)


def test_heads_that_do_more_than_one_product_are_refused() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Twice(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0 * super().forward(x)

    class Tokens(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, None])

    with pytest.raises(ModelError, match="'6' is a Doubled whose output is not weight"):
        method(nn.Sequential(*net()[:-1], Doubled(D, C).double())).influence(TRAIN, QUERIES)
    with pytest.raises(ModelError, match="'6' was called 2 times for one prediction"):
        method(Twice(*net())).influence(TRAIN, QUERIES)
    model = Tokens(nn.Linear(4, C).double())
    task = tracin.Task(model, weighted, outputs=lambda model, batch: (model(batch[0])[:, 0], batch[1]))
    with pytest.raises(ModelError, match=r"'0' gave \[23, 1, 3\] for 23 rows"):
        tracin.RepresenterPoints(
            task, tracin.Checkpoint(model.state_dict()), batch_size=N, progress=False
        ).self_influence(TRAIN)


@pytest.mark.parametrize("name", ["l2", "tolerance"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_penalties_that_are_not_positive_are_refused(name: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"{name} is {value!r}. Give a positive number"):
        method(**{name: value})


def test_losses_that_are_no_classification_are_refused() -> None:
    task = tracin.Task(net(), tracin.losses.mean_squared_error)
    with pytest.raises(
        OptionError, match="needs the logits and labels of a classifier, and this task has none"
    ):
        tracin.RepresenterPoints(task, tracin.Checkpoint(net().state_dict()), l2=0.01)


def test_losses_that_read_more_than_the_output_are_refused() -> None:
    def penalised(model: Any, batch: Any) -> Tensor:
        return outputs(model, batch)[0].logsumexp(1) + model[6].weight.square().sum()

    def penalised_by_name(model: Any, batch: Any) -> Tensor:
        return weighted(model, batch) + model.head.weight.square().sum()

    def penalised_in_all(model: Any, batch: Any) -> Tensor:
        return weighted(model, batch) + sum(p.square().sum() for p in model.parameters())

    def mixing(model: Any, batch: Any) -> Tensor:
        logits = model(batch[0])
        return F.cross_entropy(logits - logits.mean(0), batch[1], reduction="none")

    def random(model: Any, batch: Any) -> Tensor:
        return weighted(model, batch) * torch.rand(len(batch[0]))

    class Named(nn.Sequential):
        @property
        def head(self) -> nn.Module:
            return self[-1]

    for loss, told in (
        (penalised, "everything else that the model returns being None"),
        (penalised_by_name, r"the loss reads model\.head"),
        (penalised_in_all, "not a function of the head's output alone: its values differ"),
        (mixing, "the loss of row 0 depends on the logits of other rows"),
        (random, "its values differ .* draw nothing at random"),
    ):
        with pytest.raises(LossError, match=told):
            method(Named(*net()), loss).self_influence(TRAIN)


def test_a_loss_that_does_not_get_the_heads_output_is_refused() -> None:
    class Returns(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).clone()

    with pytest.raises(ModelError, match="the loss does not get the output of '6' as it is"):
        method(Returns(*net())).self_influence(TRAIN)


def test_a_loss_with_kinks_has_no_stationary_point() -> None:
    def hinge(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0])
        own = logits.gather(1, batch[1][:, None])
        return ((1 + logits - own).clamp_min(0)).sum(1)

    few = (TRAIN[0][:8], TRAIN[1][:8])
    with pytest.raises(ConvergenceError, match=r"not stationary: its gradient is .* Raise l2 or tolerance"):
        method(loss=hinge, l2=1e-3, batch_size=8).self_influence(few)


def test_bad_rows_are_named() -> None:
    broken = (TRAIN[0].clone(), TRAIN[1])
    broken[0][7] = float("nan")
    with pytest.raises(NotFiniteError, match=r"the features of row 7 are not finite \(train, "):
        method().influence(broken, QUERIES)
    with pytest.raises(NotFiniteError, match=r"row 7 are not finite \(queries, "):
        method().influence(TRAIN, broken)
    labels = TRAIN[1].clone()
    labels[9] = 3
    with pytest.raises(DataError, match="row 9 has the label 3, and the head has 3 outputs"):
        method().influence((TRAIN[0], labels), QUERIES)


def test_a_fit_that_starts_at_the_minimum_takes_no_step() -> None:
    """Features that are all zero leave the head at zero."""
    zeros = torch.zeros(4, 2, dtype=torch.float64)
    slopes = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    fit = fit_head(
        zeros,
        torch.zeros(2, 2, dtype=torch.float64),
        lambda logits: (logits.sum(1), slopes),
        lambda logits: torch.zeros_like,
        l2=0.1,
    )
    assert (fit.steps, fit.gradient_norm, fit.residual) == (0, 0.0, 0.0)


def test_wrong_labels_come_first() -> None:
    """A tenth of the labels of well separated classes is wrong: they stand at the top of the list."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(120) % C
    x = 3 * F.one_hot(labels, 4).double() + 0.5 * torch.randn(
        120, 4, generator=generator, dtype=torch.float64
    )
    given = labels.clone()
    given[:12] = (labels[:12] + 1) % C
    own = method().self_influence((x, given))
    assert len(set(own.ranking()[:24].tolist()) & set(range(12))) >= 10
