"""Who can use the page: keyboard, screen reader, both themes and languages, little motion, a phone."""

import re
from itertools import pairwise

import pytest

from tests.serve.page.driving import LIT, choose_cell, play, token

NAMES = """() => [...document.querySelectorAll('button, input, select, textarea, summary, [tabindex="0"]')]
  .filter((one) => one.checkVisibility())
  .map((one) => [one.id || one.className || one.tagName, one.getAttribute('aria-label')
    || [...(one.labels ?? [])].map((label) => label.textContent).join('') || one.textContent.trim()])"""

CONTRAST = """() => {
  const pen = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
  const rgba = (colour) => {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data];
  };
  const linear = (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = (rgb) => [0.2126, 0.7152, 0.0722].reduce((sum, part, i) => sum + part * linear(rgb[i] / 255), 0);
  const ground = (one) => {
    const colour = rgba(getComputedStyle(one).backgroundColor);
    return colour[3] === 255 ? colour : ground(one.parentElement);
  };
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const [one, text] = [texts.currentNode.parentElement, texts.currentNode.data.trim()];
    if (!text || !one.checkVisibility() || one.closest('.unseen, .skip')) continue;
    const both = [luminance(rgba(getComputedStyle(one).color)), luminance(ground(one))].sort((x, y) => y - x);
    found.push([Math.round(100 * (both[0] + 0.05) / (both[1] + 0.05)) / 100, one.className, text.slice(0, 30)]);
  }
  return found;
}"""

SMALL_BUTTONS = """[...document.querySelectorAll('button')]
  .filter((one) => one.checkVisibility() && one.getBoundingClientRect().height < 24).map((one) => one.textContent)"""


@pytest.mark.parametrize(("scheme", "locale"), [("light", "en-GB"), ("dark", "zh-CN")])
def test_every_control_has_a_name_and_every_text_its_contrast(mock, open_page, scheme, locale):
    page = open_page(mock, color_scheme=scheme, locale=locale)
    play(page)
    choose_cell(page, 0, 4)
    page.wait_for_selector(".repertoire li")
    page.click("#mute")
    contrasts = page.evaluate(CONTRAST)
    token(page, 9).click()
    contrasts += page.evaluate(CONTRAST)
    assert len(contrasts) > 120 and [contrast for contrast in contrasts if contrast[0] < 4.5] == []
    names = page.evaluate(NAMES)
    assert len(names) > 40 and [control for control in names if not control[1]] == []
    chinese = page.evaluate("document.documentElement.lang") == "zh-CN"
    assert chinese == (locale == "zh-CN")
    texts = page.locator("[data-t]:visible").all_inner_texts()
    assert all(
        bool(re.search(r"[\u4e00-\u9fff]", text)) == chinese for text in texts if text not in ("中文", "English")
    )


def test_tab_visits_every_control_once_in_reading_order_and_shows_where_it_is(mock, open_page):
    page = open_page(mock)
    play(page)
    token(page, 2).click()
    page.focus(".skip")
    order = ["skip"]
    for _ in range(140):
        page.keyboard.press("Tab")
        at = page.evaluate("(({ id, className, tagName }) => id || className || tagName)(document.activeElement)")
        if at in ("BODY", "skip"):
            break
        shown = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert shown != "none", at
        order.append(at.removesuffix(" sounding"))
    terms = [stop for stop in order if stop.startswith("term")]
    assert len(terms) == page.locator(".term:visible").count() > 30
    stops = [stop for stop in order if not stop.startswith(("expert", "SUMMARY", "scroll", "term"))]
    assert stops.count("example") == 2
    stops.remove("example")
    assert stops == [
        "skip", "view", "theme", "language", "mode-translate", "text-a", "example", "direction", "compare", "run",
        "grid-a", "token prompt", "play", "step-back", "step", "replay", "seek", "speed", "link", "save", "tab-token",
    ]  # fmt: skip
    assert order.count("SUMMARY") == 4


def test_the_grid_names_each_cell_as_the_cursor_goes(mock, open_page):
    page = open_page(mock)
    play(page)
    token(page, 9).click()
    page.focus("#grid-a")
    assert page.get_attribute("#grid-a", "role") == "grid" and page.get_attribute("#grid-a", "aria-colcount") == "32"
    cells = []
    for key in ["PageUp", "Home", "End", "PageDown", "ArrowLeft"]:
        page.keyboard.press(key)
        active = page.get_attribute("#grid-a", "aria-activedescendant")
        cell = page.locator(f"#{active}")
        row = cell.locator("xpath=..").get_attribute("aria-rowindex")
        cells.append((active, cell.inner_text().split(":")[0], row, cell.get_attribute("aria-colindex")))
    assert [cell[1:] for cell in cells] == [
        ("layers.1, expert 0", "1", "1"), ("layers.1, expert 0", "1", "1"), ("layers.1, expert 31", "1", "32"),
        ("layers.4, expert 31", "4", "32"), ("layers.4, expert 30", "4", "31"),
    ]  # fmt: skip
    assert all(before[0] != after[0] for before, after in pairwise(cells))


def test_theme_and_language_can_be_switched(mock, open_page):
    page = open_page(mock, color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    play(page)
    token(page, 9).click()
    dark = page.evaluate(background)
    page.click("#theme")
    assert page.inner_text("#theme") == "Theme: light" and page.evaluate(background) != dark
    pixel = "[...document.querySelector('#grid-a canvas').getContext('2d').getImageData(0, 0, 1, 1).data]"
    assert f"rgb({', '.join(map(str, page.evaluate(pixel)[:3]))})" == page.evaluate(background)  # the canvas too
    page.click("#theme")
    assert page.evaluate(background) == dark
    page.click("#language")
    assert page.inner_text("#run") == "翻译" and "偏置改变了" in page.inner_text("#panel-token")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    page.click("#language")
    assert page.inner_text("#run") == "Translate"


def test_little_motion_means_no_flashes(mock, open_page):
    page = open_page(mock, reduced_motion="reduce")
    page.select_option("#speed", "30")
    page.click("#run")
    lit = []
    while page.inner_text("#at") != "20 of 20":
        lit.append(page.evaluate(LIT, "grid-a"))
    page.wait_for_timeout(100)
    final = page.evaluate(LIT, "grid-a")
    page.wait_for_timeout(700)
    assert page.evaluate(LIT, "grid-a") == final > 0  # nothing fades
    assert len(lit) > 2


@pytest.mark.parametrize("width", [360, 768])
def test_narrow_screens_need_no_sideways_scrolling(mock, open_page, width):
    page = open_page(mock, viewport={"width": width, "height": 800}, device_scale_factor=2, has_touch=True)
    page.check("#compare")
    play(page)
    token(page, 9).click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(SMALL_BUTTONS) == []
