"""A model larger than memory on the page: where each expert was, what waiting cost, and what is in memory now; nothing
of it for a model in memory."""

from itertools import product

import pytest

from tests.serve.page.driving import choose_cell, named_cell, play, token, until
from tests.serve.page.test_page import WOOD
from tests.serve.page.test_page_axe import LOCALES, violations

INKED = """(id) => { // pixels of the marks of tiers
  const canvas = document.querySelector(`#${id} .tiers`);
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  return data.filter((value, at) => at % 4 === 3 && value > 0).length;
}"""


def number(milliseconds: float) -> str:
    return f"{milliseconds:.1f}" if milliseconds < 10 else f"{milliseconds:.0f}"


def test_a_tokens_experts_say_where_they_were(mock, open_page):
    mock.turn_paged()
    page = open_page(mock)
    play(page)
    token(page, WOOD).click()
    decisions = mock.pieces[0].tokens[WOOD]["layers"]
    experts = [expert for layer in decisions for expert in layer["players"]]
    counts = [sum(expert["tier"] == tier for expert in experts) for tier in ("memory", "reading", "disk")]
    waited = sum(layer["waited_ms"] for layer in decisions)
    text = page.inner_text("#panel-token")
    assert (
        f"Of the {len(experts)} experts that play, {counts[0]} were in memory, {counts[1]} being read and {counts[2]} "
        f"on disk; the layers waited {number(waited)} ms. " in text
    )
    read_together = decisions[0]["pass_tokens"]
    assert f"{read_together} tokens were computed together and share this." in text
    for row, layer in enumerate(decisions):
        box = page.locator("#panel-token .layer").nth(row)
        for tier in ("disk", "reading"):
            expected = {str(expert["expert"]) for expert in layer["players"] if expert["tier"] == tier}
            shown = box.locator(f"tbody .expert:has(.tier.{tier})").all_inner_texts()
            assert {number.split()[0].rstrip("↓⇣") for number in shown} == expected
        cost = f"The layer waited {layer['waited_ms']:.1f} ms"
        assert (cost in box.inner_text()) == (layer["bytes_read"] > 0)
    missing = next(expert["expert"] for expert in decisions[0]["players"] if expert["tier"] == "disk")
    choose_cell(page, 0, missing)
    page.focus("#grid-a")
    assert named_cell(page).endswith(", on disk")


def test_what_is_in_memory_now(mock, open_page):
    mock.turn_paged()
    page = open_page(mock, view="simple")
    until(page, "document.querySelector('#tiers-now').textContent.startsWith('In memory now: 40 of 128 experts; ')")
    assert page.inner_text("#tiers-now").endswith("being read: 4.")
    assert page.evaluate(INKED, "grid-a") > 100
    choose_cell(page, 1, 5)
    page.focus("#grid-a")
    assert named_cell(page).endswith(", in memory")
    until(page, "document.querySelector('#tier-now')?.textContent === 'Now this expert is in memory.'")
    token(page, WOOD).click()
    assert page.locator("#panel-token .expert .tier").count() > 0
    assert page.locator("#panel-token .cost").count() > 0


def test_a_model_in_memory_has_none_of_it(mock, open_page):
    page = open_page(mock)
    play(page)
    token(page, WOOD).click()
    assert page.locator("#tiers").is_hidden() and page.locator("#panel-token .tier").count() == 0
    assert "waited" not in page.inner_text("#panel-token")
    assert page.evaluate(INKED, "grid-a") == 0
    assert not any(path == "/soli/experts" for _, path, _ in mock.requests)
    choose_cell(page, 1, 5)
    page.wait_for_selector(".kinds li")
    assert page.locator("#tier-now").count() == 0


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme", "locale"), [*product((390, 1280), ("light", "dark"), LOCALES)])
def test_axe_finds_no_violation(mock, open_page, width, scheme, locale):
    mock.turn_paged()
    page = open_page(mock, viewport={"width": width, "height": 844}, color_scheme=scheme, locale=locale, view="simple")
    until(page, "document.querySelector('#at').textContent.match(/20.*20/)")
    token(page, WOOD).click()
    assert violations(page) == []
    page.click("#view")
    token(page, WOOD).click()
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
    tables = "[...document.querySelectorAll('.scroll')]"
    assert page.evaluate(f"{tables}.map((box) => box.scrollWidth - box.clientWidth)") == [0] * len(mock.model["layers"])
    choose_cell(page, 1, 5)
    page.wait_for_selector(".kinds li")
    assert violations(page) == []
