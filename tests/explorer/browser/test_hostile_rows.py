"""A row that holds markup is shown as text, wherever it is shown."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from explorer.browser.driving import served, until

STUDY = """
import torch
from torch import nn
import tracin

WORDS = ["good", "fine", "glad", "bad", "sad", "poor"]
HOSTILE = '<img src=x onerror="alert(1)"><script>alert(2)</script></script><b>{}</b>'


class Reviews(torch.utils.data.Dataset):
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, row):
        counts = torch.zeros(6)
        counts[row % 6] = 1.0 + row / 100
        return counts, int(row % 6 > 2)


def study():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(6, 2)
    data = Reviews(60)
    x = torch.stack([data[row][0] for row in range(60)])
    y = torch.tensor([data[row][1] for row in range(60)])
    states = []
    for step in range(1, 4):
        loss = nn.functional.cross_entropy(model(x), y)
        for parameter, gradient in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()))):
            parameter.data -= 0.5 * gradient
        state = {name: value.clone() for name, value in model.state_dict().items()}
        states.append(tracin.Checkpoint(state, learning_rate=0.5, step=step))
    return tracin.Study(
        tracin.Task(model, tracin.losses.cross_entropy), tracin.Trajectory(states), train=data, test=Reviews(12),
        class_names=["<i>praise</i>", "&lt;blame&gt;"],
        render=lambda row: HOSTILE.format(WORDS[int(row[0].argmax())]),
        read=lambda text: torch.tensor([float(text.count(word)) for word in WORDS]),
    )
"""
TEXT = '<img src=x onerror="alert(1)"><script>alert(2)</script></script><b>good</b>'
MADE = "document.querySelectorAll('main img, main script, main b b, main i i, .face b, .face img').length"


@pytest.fixture(scope="module")
def reviews(browser, tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("reviews")
    (folder / "reviews.py").write_text(STUDY)
    with served(folder / "reviews.py", environment={}) as address:
        yield address


def test_markup_of_a_row_and_of_a_class_is_text_on_every_page(reviews, visit):
    page = visit(f"{reviews}#/explain/test/0").page
    page.wait_for_selector(".card .face.words")
    assert page.locator(".query .face").inner_text() == TEXT
    assert TEXT[:20] in page.locator(".card .face").first.inner_text()
    assert "<i>praise</i>" in page.locator(".facts").inner_text()
    assert page.evaluate(MADE) == 0
    page.evaluate("location.hash = '#/audit'")
    page.get_by_role("button", name="All", exact=True).click()
    page.wait_for_selector(".suspect .face.words")
    assert page.locator(".suspect .face").first.inner_text().startswith("<img src=x")
    assert page.locator(".from-to").inner_text().count("praise") == 1
    assert page.evaluate(MADE) == 0


def test_a_text_of_ones_own_is_traced_as_text(reviews, visit):
    page = visit(f"{reviews}#/explain").page
    page.wait_for_selector(".list-count:not(:empty)")
    page.get_by_role("button", name="Explain your own text").click()
    page.get_by_role("textbox", name="Text to explain").fill("<u>sad</u> and bad")
    page.get_by_role("button", name="Explain it").click()
    page.get_by_role("heading", name="Your example").wait_for()
    assert page.locator(".query .face").inner_text() == "<u>sad</u> and bad"
    assert "&lt;blame&gt;" in page.locator(".facts").inner_text()


def test_a_search_finds_words_of_a_text(reviews, visit):
    page = visit(f"{reviews}#/explain").page
    page.wait_for_selector(".list-count:not(:empty)")
    page.get_by_role("button", name="All", exact=True).click()
    page.get_by_role("searchbox", name="Search rows").fill("poor")
    until(page, "document.querySelector('.list-count').textContent === '2 test rows'")
