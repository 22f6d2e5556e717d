"""On a CUDA device: exact against float64 on the CPU, no waiting in the inner loop, and torch's switches given back.

Run them with ``pytest -m gpu``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
import tracin
from tracin.errors import NotFiniteError, UserCodeError
from tracin.scoring.arithmetic import full_float32
from tracin.scoring.arrivals import DEPTH, Arrivals
from tracin.scoring.guard import device_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # The first matrix product of a thread makes cuBLAS look for its context, and says so.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
    # torch calls its way to find synchronisations a prototype.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]

N, M, BATCH = 3 * (DEPTH + 3) + 1, 5, 3  # more batches than may be under way, and a short one
RATES = (0.3, 0.07)


class Pictures(nn.Module):
    """Convolutions, plain and in groups, without kinks at which float32 and float64 part."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(8, 16, 3, groups=2),
            nn.BatchNorm2d(16),
            nn.Tanh(),
        )
        self.head = nn.Linear(16 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


class Sentences(nn.Module):
    """Tokens through a GRU, for whose backward pass cuDNN asks for training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.body = nn.Embedding(12, 6), nn.GRU(6, 7, batch_first=True)
        self.head = nn.Linear(7, 5)

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.body(self.words(index))[0][:, -1])


class Bags(nn.Module):
    """Embeddings, one small (multiplied out) and one with more rows than a batch has tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.few, self.many = nn.Embedding(12, 6), nn.Embedding(3000, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, index: Tensor) -> Tensor:
        return self.head((self.few(index) * self.many(index * 200)).mean(1).tanh())


def _pictures(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 12, 12, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 5, (n,), generator=generator)


def _tokens(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 12, (n, 9), generator=generator), torch.randint(0, 5, (n,), generator=generator)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], tuple[Tensor, Tensor]]]] = {
    "cnn": (Pictures, _pictures),
    "gru": (Sentences, _tokens),
    "embeddings": (Bags, _tokens),
}


def _models(name: str) -> list[nn.Module]:
    """A model of the case for each checkpoint, in float64 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return [CASES[name][0]().double() for _ in RATES]


def _rows(name: str, n: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, y = CASES[name][1](n, seed)
    return (x.to(dtype) if x.is_floating_point() else x), y


class Asked:
    """A case on a device: the method and its rows."""

    def __init__(
        self, name: str, dtype: torch.dtype = torch.float32, loss: Any = None, **options: Any
    ) -> None:
        models = _models(name)
        checkpoints = [
            tracin.Checkpoint(copy.deepcopy(model).to(dtype).state_dict(), learning_rate=rate)
            for model, rate in zip(models, RATES, strict=True)
        ]
        self.model = models[-1].to(dtype)
        self.train, self.queries = _rows(name, N, 1, dtype), _rows(name, M, 2, dtype)
        self.method = tracin.TracInCP(
            tracin.Task(self.model, loss or tracin.losses.cross_entropy),
            tracin.Trajectory(checkpoints),
            **{"batch_size": BATCH, "device": "cuda", "progress": False, **options},
        )

    def influence(self) -> Tensor:
        return self.method.influence(self.train, self.queries).values


def _gradients(name: str) -> list[Any]:
    """Per-row gradients of train rows and queries at both checkpoints, in float64 on the CPU."""
    states = [model.state_dict() for model in _models(name)]
    sides = [_rows(name, n, seed, torch.float64) for n, seed in ((N, 1), (M, 2))]
    return [
        oracle.trajectory_gradients(_models(name)[0], tracin.losses.cross_entropy, side, states)
        for side in sides
    ]


@pytest.fixture(scope="module", params=CASES)
def judged(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    """A case's name, and its gradients by brute force."""
    return request.param, *_gradients(request.param)


@pytest.fixture
def loose() -> Iterator[None]:
    """A user who has TF32 on, and lets cuDNN choose by the clock."""
    backends: Any = torch.backends
    switches = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    before = [switch.fp32_precision for switch in switches]
    benchmark, backends.cudnn.benchmark = backends.cudnn.benchmark, True
    for switch in switches:
        switch.fp32_precision = "tf32"
    yield
    after = [switch.fp32_precision for switch in switches]
    flags = backends.cudnn.benchmark, backends.cudnn.enabled
    backends.cudnn.benchmark = benchmark
    for switch, value in zip(switches, before, strict=True):
        switch.fp32_precision = value
    assert after == ["tf32"] * 3, "the run changed the user's switches"
    assert flags == (True, True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.usefixtures("loose")
def test_exact(judged: tuple[str, Any, Any], dtype: torch.dtype, tolerance: float) -> None:
    name, train, queries = judged
    asked = Asked(name, dtype)
    expected = oracle.scores(train, queries, RATES)
    with oracle.untouched(asked.model, asked.train, asked.queries):
        found = asked.method.influence(asked.train, asked.queries)
    assert found.values.device.type == "cpu"
    assert found.values.dtype == dtype
    assert found.provenance["device"].startswith("cuda")
    oracle.assert_close(found.values, expected, tolerance)
    own = asked.method.self_influence(asked.train).values
    oracle.assert_close(own, oracle.self_influence(train, RATES), tolerance, "self-influence")
    top = asked.method.top_k(asked.train, asked.queries, k=4)
    oracle.assert_close(top.proponents.values, expected.topk(4).values, tolerance, "proponents")
    oracle.assert_close(top.opponents.values, -(-expected).topk(4).values, tolerance, "opponents")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_cosines_are_exact(judged: tuple[str, Any, Any], dtype: torch.dtype, tolerance: float) -> None:
    name, train, queries = judged
    found = Asked(name, dtype, normalize=True).influence()
    oracle.assert_close(found, oracle.normalized_scores(train, queries, RATES), tolerance)


@pytest.mark.parametrize("name", CASES)
def test_verify_on_the_device(name: str) -> None:
    asked = Asked(name)
    found = asked.method.verify(asked.train)
    assert found.exact, str(found)
    assert found.coverage.fraction == 1.0


@pytest.mark.usefixtures("loose")
def test_bfloat16_is_near(judged: tuple[str, Any, Any]) -> None:
    name, train, queries = judged
    asked = Asked(name, precision="bfloat16")
    found = asked.method.influence(asked.train, asked.queries)
    assert found.values.dtype == torch.float32
    assert found.provenance["precision"] == "bfloat16"
    oracle.assert_close(found.values, oracle.scores(train, queries, RATES), 5e-2)
    error = asked.method.verify(asked.train).max_relative_error
    assert error > 1e-4, "autocast did nothing"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_same_numbers_on_every_run(name: str, precision: str) -> None:
    asked = Asked(name, precision=precision)
    assert torch.equal(asked.influence(), asked.influence())
    own = [asked.method.self_influence(asked.train).values for _ in range(2)]
    assert torch.equal(*own)


@pytest.fixture
def nothing_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Any wait for the device is an error, from the first batch of a pass to its end; counts the batches sent."""
    send, settle = Arrivals.send, Arrivals.settle
    sent = [0]

    def strict_send(self: Arrivals, *args: Any) -> None:
        send(self, *args)
        sent[0] += 1
        torch.cuda.set_sync_debug_mode("error")

    def loose_settle(self: Arrivals) -> None:
        torch.cuda.set_sync_debug_mode("default")
        settle(self)

    monkeypatch.setattr(Arrivals, "send", strict_send)
    monkeypatch.setattr(Arrivals, "settle", loose_settle)
    try:
        yield sent
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", ["cnn", "embeddings"])
def test_the_inner_loop_waits_for_nothing(
    nothing_waits: list[int], name: str, normalize: bool, precision: str
) -> None:
    asked = Asked(name, normalize=normalize, precision=precision)
    asked.influence()
    asked.method.top_k(asked.train, asked.queries, k=2)
    if not normalize:
        asked.method.self_influence(asked.train)
    batches = -(-N // BATCH)
    assert nothing_waits[0] >= 2 * len(RATES) * batches


def test_a_wait_in_the_inner_loop_is_seen(nothing_waits: list[int]) -> None:
    """The instrument: a model that asks the device for a number."""

    def asking(model: nn.Module, batch: Any) -> Tensor:
        losses = tracin.losses.cross_entropy(model, batch)
        return losses * (1.0 if float(losses.detach().max()) > -1.0 else 2.0)

    with pytest.raises(UserCodeError, match="synchroniz"):
        Asked("cnn", loss=asking).influence()
    assert nothing_waits[0] > 0


def _kinked(row: float, model: nn.Module, batch: Any) -> Tensor:
    """A gradient of 0/0 in the row whose first number is ``row``."""
    losses = tracin.losses.cross_entropy(model, batch)
    gap = (batch[0].flatten(1)[:, 0] != row).to(losses.dtype)
    return losses + ((losses - losses.detach()) ** 2 + gap).sqrt()


def test_a_row_that_is_not_finite_is_named_as_on_the_cpu() -> None:
    told = []
    for device in ("cpu", "cuda"):
        asked = Asked("cnn", device=device, loss=lambda model, batch: _kinked(9.0, model, batch))
        asked.train[0][N - 4, 0, 0, 0] = 9.0
        for verb in (asked.influence, lambda asked=asked: asked.method.self_influence(asked.train)):
            with pytest.raises(NotFiniteError, match=f"row {N - 4} for") as error:
                verb()
            told.append(str(error.value))
    assert told[:2] == told[2:]


def test_a_query_that_is_not_finite_is_named_as_on_the_cpu() -> None:
    told = []
    for device in ("cpu", "cuda"):
        asked = Asked("cnn", device=device, loss=lambda model, batch: _kinked(9.0, model, batch))
        asked.queries[0][M - 1, 0, 0, 0] = 9.0
        with pytest.raises(NotFiniteError, match=f"row {M - 1} for.*queries") as error:
            asked.influence()
        told.append(str(error.value))
    assert told[0] == told[1]


def test_random_states_of_the_device_come_back() -> None:
    def drawing(model: nn.Module, batch: Any) -> Tensor:
        losses = tracin.losses.cross_entropy(model, batch)
        return losses + 0.0 * torch.rand(1, device=losses.device)

    asked = Asked("cnn", loss=drawing)
    torch.cuda.manual_seed(11)
    before = torch.cuda.get_rng_state()
    with oracle.untouched(asked.model):
        asked.influence()
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("name", CASES)
def test_cudnn_is_off_for_recurrent_models_alone_and_comes_back(name: str) -> None:
    seen = []

    def watching(model: nn.Module, batch: Any) -> Tensor:
        seen.append(torch.backends.cudnn.enabled)
        if len(seen) > 12:
            raise ZeroDivisionError("on purpose")
        return tracin.losses.cross_entropy(model, batch)

    assert torch.backends.cudnn.enabled
    asked = Asked(name, loss=watching)
    with pytest.raises(UserCodeError, match="on purpose"):
        asked.influence()
    assert set(seen) == {name != "gru"}
    assert torch.backends.cudnn.enabled


class Writing(Pictures):
    """Writes into its batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(0.5))


def test_rows_that_lie_on_the_device_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "writing", (Writing, _pictures))
    asked = Asked("writing")
    expected = asked.influence()
    on_device = tuple(part.cuda() for part in asked.train)
    queries = tuple(part.cuda() for part in asked.queries)
    with oracle.untouched(asked.model, on_device, queries):
        found = asked.method.influence(on_device, queries).values
    oracle.assert_close(found, expected.double(), 1e-6)


def test_auto_takes_the_gpu_and_a_model_there_stays_there() -> None:
    asked = Asked("cnn", device="auto")
    assert device_of(asked.model, "auto").type == "cuda"
    assert asked.method.influence(asked.train, asked.queries).provenance["device"].startswith("cuda")
    assert {tensor.device.type for tensor in asked.model.parameters()} == {"cpu"}
    asked.model.cuda()
    with oracle.untouched(asked.model):
        asked.influence()
    assert {tensor.device.type for tensor in asked.model.parameters()} == {"cuda"}


def _ledger(name: str, dtype: torch.dtype, device: str) -> Tensor:
    """First-order and ideal scores of three steps of SGD, [2, M, N]."""
    model, (x, y) = _models(name)[0].to(device, dtype), _rows(name, N, 1, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    task = tracin.Task(model, tracin.losses.cross_entropy)
    with tracin.OnlineTracIn(task, optimizer, _rows(name, M, 2, dtype), N) as online:
        for ids in torch.arange(N).split(N // 3 + 1):
            with online.step(ids):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[ids].to(device)), y[ids].to(device)).backward()
                optimizer.step()
        return torch.stack([online.scores(kind).values for kind in ("first_order", "ideal")])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-9)])
@pytest.mark.parametrize("name", CASES)
def test_a_ledger_is_that_of_the_cpu(name: str, dtype: torch.dtype, tolerance: float) -> None:
    with full_float32(torch.device("cuda")):
        found = _ledger(name, dtype, "cuda")
    oracle.assert_close(found, _ledger(name, torch.float64, "cpu"), tolerance)


@pytest.mark.usefixtures("loose")
@pytest.mark.parametrize("name", CASES)
def test_a_loop_that_rounds_is_no_residue(name: str) -> None:
    """TF32 is how torch trains convolutions and recurrent layers unless told otherwise."""
    oracle.assert_close(_ledger(name, torch.float32, "cuda"), _ledger(name, torch.float64, "cpu"), 3e-2)
