"""axe-core finds no violation: phone and desktop width, light and dark, both languages, both views, every state."""

from itertools import product
from typing import Any

import pytest

from tests.serve.page.driving import choose_cell, play, token, until, until_done

LOCALES = ("en-GB", "zh-CN")
GONE = ("ERR_EMPTY_RESPONSE", "ERR_CONNECTION_RESET")


def violations(page: Any) -> list[str]:
    """Each violation with the elements that have it. WCAG 2.2's target size is off by default, so it is named."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe
    options = {"rules": {"target-size": {"enabled": True}}}
    report = axe().run(page, options=options).response["violations"]
    return [f"{rule['id']}: {node['target']} {node['failureSummary']}" for rule in report for node in rule["nodes"]]


@pytest.mark.parametrize(
    ("width", "scheme", "locale"),
    [
        (390, "dark", "zh-CN"),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in product((390, 1280), ("light", "dark"), LOCALES)),
    ],
)
def test_no_violation_in_either_view(mock, open_page, width, scheme, locale):
    viewport = {"width": width, "height": 844}
    page = open_page(mock, viewport=viewport, color_scheme=scheme, locale=locale, view="simple")
    until(page, "document.querySelector('#at').textContent.match(/20.*20/)")
    assert violations(page) == []
    token(page, 9).click()
    assert violations(page) == []
    page.focus("#grid-a")
    for key in ("Home", "PageUp", "Enter", "m"):
        page.keyboard.press(key)
    page.wait_for_selector(".kinds li")
    page.locator("#intro .term").first.focus()
    assert violations(page) == []
    page.click("#view")
    token(page, 9).click()
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
    tables = "[...document.querySelectorAll('.scroll')]"
    overflows = page.evaluate(f"{tables}.map((box) => box.scrollWidth - box.clientWidth)")
    assert overflows == [0] * len(mock.model["layers"])  # each layer's table is seen whole


@pytest.mark.parametrize("width", [390, pytest.param(1280, marks=pytest.mark.slow)])
def test_no_violation_while_chatting_and_comparing(mock, open_page, width):
    mock.model = mock.model | {"modes": ["chat", "translate", "complete"]}
    mock.pieces[0].reasoning = "Let me think."
    page = open_page(mock, viewport={"width": width, "height": 844}, color_scheme="dark")
    page.fill("#text-a", "Hello")
    play(page)
    assert violations(page) == []
    page.click("#mode-translate")
    page.check("#compare")
    play(page)
    until_done(page)
    choose_cell(page, 0, 3)
    page.wait_for_selector(".kinds li")
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.slow
def test_no_violation_when_the_server_is_gone_or_wants_a_key(mock, open_page):
    page = open_page(mock, complaints=(*GONE, "401"), viewport={"width": 390, "height": 844})
    mock.gone = True
    page.wait_for_selector("#retry:visible")
    assert violations(page) == []
    mock.gone = False
    until(page, "document.querySelector('#notice').hidden")
    mock.key = "secret"
    page.click("#run")
    page.wait_for_selector("#key-dialog[open]")
    assert violations(page) == []
