"""The judge is judged: against finite differences, against itself, and by errors planted on purpose."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import oracle
from cases import BY_NAME, CASES, Case

FEW = [
    "mlp_relu",
    "conv2d_groups",
    "lstm_time_first_bidirectional_t3",
    "tied_embeddings",
    "loss_with_penalty",
]


def gradients(case: Case, how=oracle.gradients_alone, n: int = 3, dtype: torch.dtype = torch.float64):
    rows = case.rows(n, seed=1, dtype=dtype)
    return oracle.trajectory_gradients(
        case.model(dtype), case.loss, rows, case.states(dtype), case.names(), how
    )


@pytest.mark.parametrize("name", FEW)
def test_agrees_with_finite_differences(name: str) -> None:
    case, step = BY_NAME[name], 1e-6
    found = gradients(case)[1]
    model, rows = case.model(), case.rows(3, seed=1)
    model.load_state_dict(case.states()[1])
    model.eval()
    for parameter_name, parameter in oracle.trainable(model).items():
        flat = parameter.detach().reshape(-1)
        for index in range(0, flat.numel(), 5):
            sides = []
            for sign in (1, -1):
                flat[index] += sign * step
                sides.append(case.loss(model, rows).detach())
                flat[index] -= sign * step
            slope = (sides[0] - sides[1]) / (2 * step)
            torch.testing.assert_close(found[parameter_name][:, index], slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_alone_and_in_the_batch_agree(case: Case) -> None:
    """What the cases promise: the loss of a row does not depend on the rows around it."""
    if case.name == "embedding_scale_grad_by_freq":
        pytest.skip("its gradient divides by counts over the whole batch: the reason why it may be refused")
    alone, together = gradients(case), gradients(case, oracle.gradients_in_graph)
    for one, other in zip(alone, together, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_case_can_tell_right_from_wrong(case: Case) -> None:
    """Every case has a gradient, checkpoints that differ, and rows that differ."""
    first, second = gradients(case)
    rates = case.rates()
    scores = oracle.scores([first, second], [first, second], rates)
    assert scores.abs().max() > 1e-6
    unlike = (oracle.scores([grads], [grads], [1.0]) for grads in (first, second))
    assert not torch.allclose(*unlike)
    assert not torch.allclose(scores[0], scores[1])


def test_a_planted_error_is_caught() -> None:
    case = BY_NAME["mlp_relu"]
    found, rates = gradients(case), case.rates()
    right = oracle.scores(found, found, rates)
    oracle.assert_close(right.clone(), right, 1e-10)
    wrong = {
        "a rate twice": oracle.scores(found, found, [0.3, 0.3]),
        "a mean for a sum": right / 3,
        "rows swapped": right.roll(1, 1),
        "one entry": right + 1e-6 * right.max() * torch.eye(3),
        "a bias dropped": oracle.scores(
            *[[{k: v for k, v in g.items() if k != "0.bias"} for g in found]] * 2, rates
        ),
    }
    for planted in wrong.values():
        with pytest.raises(AssertionError, match="off by"):
            oracle.assert_close(planted, right, 1e-10)
    with pytest.raises(AssertionError, match="not finite"):
        oracle.assert_close(right * float("nan"), right, 1e-10)
    with pytest.raises(AssertionError, match="shape"):
        oracle.assert_close(right[:2], right, 1e-10)


def test_self_influence_and_normalized_follow_from_scores() -> None:
    case = BY_NAME["mlp_relu"]
    found, rates = gradients(case), case.rates()
    oracle.assert_close(
        oracle.self_influence(found, rates), oracle.scores(found, found, rates).diagonal(), 1e-12
    )
    cosines = oracle.normalized_scores(found, found, [0.3, 0.07])
    oracle.assert_close(cosines.diagonal(), torch.full((3,), 0.37, dtype=torch.float64), 1e-12)
    nothing = [
        {name: grad * torch.tensor([[0.0], [1.0], [1.0]]) for name, grad in grads.items()} for grads in found
    ]
    assert (oracle.normalized_scores(nothing, found, [0.3, 0.07])[:, 0] == 0).all()


@pytest.mark.parametrize(
    "harm",
    [
        lambda model: model[0].weight.data.add_(1e-7),
        lambda model: model[1].register_forward_hook(lambda *_: None),
        lambda model: model[0].weight.register_hook(lambda grad: grad),
        lambda model: model[2].eval(),
        lambda model: model[0].bias.requires_grad_(False),
        lambda model: setattr(model[0], "weight", nn.Parameter(model[0].weight.detach().clone())),
        lambda model: setattr(model[0].weight, "grad", torch.zeros_like(model[0].weight)),
        lambda model: setattr(model[2], "left_behind", 1),
        lambda model: torch.rand(1),
    ],
)
def test_untouched_sees_every_harm(harm) -> None:
    model = BY_NAME["mlp_relu"].model()
    with oracle.untouched(model):
        model(torch.zeros(1, 4, dtype=torch.float64))
    with (
        pytest.raises(AssertionError, match="changed by the run"),
        torch.random.fork_rng(),
        oracle.untouched(model),
    ):
        harm(model)


def test_untouched_sees_written_data_and_passes_errors_on() -> None:
    model, data = BY_NAME["mlp_relu"].model(), (torch.zeros(2, 4),)
    with pytest.raises(AssertionError, match="user's data"), oracle.untouched(model, data):
        data[0].add_(1)
    with pytest.raises(KeyboardInterrupt), oracle.untouched(model):
        raise KeyboardInterrupt
