"""What a visitor sees first: an example, explained terms, two views, links, pictures; a server that is gone or slow."""

import re
import struct
from urllib.parse import urlencode

import pytest

from tests.serve.page.driving import choose_cell, play, token, until, until_done
from tests.serve.page.mock_server import Piece
from tests.serve.page.test_page import KNIFE, WOOD

SECOND = "你可以用这把刀切木头。"
GONE = ("ERR_EMPTY_RESPONSE", "ERR_CONNECTION_RESET", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_CONNECTION_REFUSED")
TOOLTIP = "[...document.querySelectorAll('[role=tooltip]')].filter((one) => one.checkVisibility()).map((one) => one.id)"


def test_an_example_runs_on_load_under_one_sentence(mock, open_page):
    page = open_page(mock, ready=False, view="simple")
    page.wait_for_selector("body:not(.loading)")
    until(page, f"document.querySelector('.words')?.textContent === '{KNIFE['translation']}'")
    sentence = page.inner_text("#intro")
    assert "expert" in sentence and "light up" in sentence and sentence.count(".") == 1
    assert "32 small networks" in sentence and "4 of them" in sentence  # this model's numbers
    assert [body["text"] for body in mock.bodies("/soli/translate")] == [KNIFE["source"]]
    page.locator(".example").nth(1).click()
    until_done(page)
    assert [body["text"] for body in mock.bodies("/soli/translate")] == [KNIFE["source"], SECOND]
    assert page.input_value("#text-a") == SECOND


def test_tokens_per_second_are_shown_after_an_answer(mock, open_page):
    mock.pace = 0.02
    page = open_page(mock)
    count, seconds, rate = re.fullmatch(
        r"(\d+) tokens in ([\d.]+) s: ([\d.]+) tokens per second", page.inner_text(".rate")
    ).groups()
    assert int(count) == len(KNIFE["experts"]) - KNIFE["prompt_tokens"]
    assert float(rate) == pytest.approx(int(count) / float(seconds), rel=0.1) and float(rate) < 50


def test_terms_are_explained_by_mouse_by_keyboard_and_by_touch(mock, open_page):
    page = open_page(mock, view="simple", has_touch=True)
    term = page.locator("#intro .term").nth(0)
    described = page.locator(f"#{term.get_attribute('aria-describedby')}")
    assert described.get_attribute("role") == "tooltip" and not described.is_visible()
    term.hover()
    assert described.is_visible() and "small network" in described.inner_text()
    described.hover()  # the pointer can go there
    page.wait_for_timeout(400)
    assert described.is_visible()
    page.mouse.move(5, 700)
    until(page, f"({TOOLTIP}).length === 0")
    page.focus("#language")
    page.keyboard.press("Tab")
    assert page.evaluate(TOOLTIP) == ["about-expert"]
    page.keyboard.press("Tab")
    assert page.evaluate(TOOLTIP) == ["about-layer"]
    page.keyboard.press("Escape")
    assert page.evaluate(TOOLTIP) == []
    page.locator("#legend .term").first.tap()
    assert page.evaluate(TOOLTIP) == ["about-layer"]
    page.locator("#model-name").tap()
    assert page.evaluate(TOOLTIP) == []
    page.click("#language")
    page.locator("#intro .term").nth(0).hover()
    assert "小网络" in page.inner_text("#about-expert")


def test_the_simple_view_comes_first_and_the_detailed_one_is_remembered(mock, open_page):
    page = open_page(mock, view="simple")
    assert all(page.is_visible(f"#{name}") for name in ("run", "play", "seek", "link", "save"))
    assert not any(page.is_visible(f"#{name}") for name in ("compare", "speed", "step", "direction"))
    token(page, WOOD).click()
    layer = KNIFE["experts"][WOOD]["layers"][0]
    total = sum(player["weight"] for player in layer["players"])
    players = sorted(layer["players"], key=lambda player: -player["weight"])
    texts = page.locator("#panel-token .players").nth(0).locator("button").all_inner_texts()
    assert [text.split()[-3:] for text in texts] == [
        [str(player["expert"]), f"{100 * player['weight'] / total:.0f}", "%"] for player in players
    ]
    assert page.locator("#panel-token table").count() == 0
    page.click("#view")
    assert page.is_visible("#compare") and page.locator("#panel-token table").count() == 4
    page.reload()
    page.wait_for_selector("body:not(.loading)")
    assert page.is_visible("#compare") and page.inner_text("#view") == "Simple view"
    page.click("#view")
    page.reload()
    page.wait_for_selector("body:not(.loading)")
    assert not page.is_visible("#compare") and page.evaluate("localStorage.length") == 0


def test_a_link_restores_text_token_and_muted_experts(mock, open_page):
    page = open_page(mock)
    page.fill("#text-a", SECOND)
    page.select_option("#direction", "en")
    choose_cell(page, 2, 7)
    page.click("#mute")
    play(page)
    token(page, 4).click()
    page.click("#link")
    fragment = page.evaluate("location.hash")
    assert page.evaluate("document.querySelector('#link').href").endswith(fragment)
    other = open_page(mock, view="simple", fragment=fragment)
    assert other.input_value("#text-a") == SECOND and other.input_value("#direction") == "en"
    assert other.locator('#strip-a [aria-selected="true"]').inner_text() == token(page, 4).inner_text()
    assert other.locator("#panel-token").is_visible() and other.locator(".chip").all_inner_texts() == ["3·7 ×"]
    assert other.evaluate("localStorage.length") == 0  # the link's view is not remembered
    other.evaluate("location.hash = '#mode=complete&text=The+river&token=2'")
    until(other, "document.querySelector('#mode-complete').ariaChecked === 'true'")
    until(other, "document.querySelector('#strip-a [aria-selected=true]')")
    assert mock.bodies("/v1/completions")[-1]["prompt"] == "The river" and other.locator(".chip").count() == 0


HOSTILE = [
    "#text=" + "x" * 50_000,
    "#text=%ff%fe%00%zz&mode=translate&masked=,,,.,4.,.4,-1.2,1e9.1,999999.999999,4.99,0.0&token=-1",
    "#mode=__proto__&text=constructor&view=constructor&to=javascript:alert(1)&token=99999999999999999999",
    "#" + urlencode({"text": "<img src=x onerror=alert(1)>\u202e\x00", "token": "1e3", "b": b"\xed\xa0\x80"}),
    "#masked=" + ",".join(f"1.{expert}" for expert in range(32)) * 40,
    "#view=" + "&view=detailed" * 500,
    "#%",
    "#text=+++&b=+&only-b=1",
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_fragments_do_no_harm(mock, open_page, number):
    page = open_page(mock, view="simple", fragment=HOSTILE[number])
    for body in mock.bodies("/soli/translate"):
        assert len(body["text"]) <= 8000 and len(body["soli"]["masked_experts"]) <= 32
    assert page.locator("img, body script").count() == 0 and page.title() == "Soli"
    page.fill("#text-a", KNIFE["source"])
    page.click("#run")
    until_done(page)
    assert page.locator(".words").first.inner_text() == KNIFE["translation"]


def test_the_picture_is_a_png_of_the_grid(mock, open_page, tmp_path):
    page = open_page(mock)
    token(page, WOOD).click()
    with page.expect_download() as download:
        page.click("#save")
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    content = path.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    grid = page.locator("#grid-a").bounding_box()
    assert path.suffix == ".png" and content.startswith(b"\x89PNG")
    assert width > grid["width"] and height > grid["height"]


def test_excerpts_are_of_this_visitors_texts_alone(mock, open_page):
    page = open_page(mock)
    mock.pieces.append(Piece("private words of another visitor", mock.pieces[1].tokens))
    play(page)
    expert = KNIFE["experts"][WOOD]["layers"][1]["players"][0]["expert"]
    choose_cell(page, 1, expert)
    page.wait_for_selector(".kinds li")
    own = "".join(trace["text"] for trace in KNIFE["experts"])
    for line in page.locator(".repertoire li").all():
        before, word, after = (line.locator(name).inner_text() for name in (".before", "b", ".after"))
        assert f"{before}{word}{after}".replace("·", " ").strip() in own
    assert "only numbers are kept" in page.inner_text("#panel-expert")


def test_a_chat_uses_the_full_width(mock, open_page):
    mock.model = mock.model | {"modes": ["chat", "translate"]}
    page = open_page(mock)
    main = page.locator("main").bounding_box()["width"]
    assert page.locator(".reply").bounding_box()["width"] == pytest.approx(main, abs=1)
    assert page.locator("#text-a").bounding_box()["width"] == pytest.approx(main, abs=1)
    assert page.locator(".reply").bounding_box()["y"] < page.locator("#text-a").bounding_box()["y"]
    page.fill("#text-a", "Hello")
    page.click("#run")
    until_done(page)
    assert page.locator(".reply").count() == 1  # the example makes place
    assert [message["content"] for message in mock.bodies("/v1/chat/completions")[-1]["messages"]] == ["Hello"]
    page.click("#mode-translate")
    assert page.locator("#text-a").bounding_box()["width"] < main / 2


def test_a_server_that_is_gone_is_named_and_the_page_recovers(mock, open_page):
    page = open_page(mock, complaints=GONE)
    mock.gone = True
    page.click("#run")
    page.wait_for_selector("#retry:visible")
    assert page.inner_text("#alert") == "The server does not answer; it may have been stopped."
    page.click("#language")
    assert page.inner_text("#alert") == "服务器没有回应，可能已停止。"
    page.click("#language")
    mock.gone = False
    until(page, "document.querySelector('#alert').textContent === 'The server is back.'")
    mock.requests.clear()
    page.click("#retry")
    until_done(page)
    assert page.inner_text(".words") == KNIFE["translation"] and not page.is_visible("#notice")
    assert len(mock.bodies("/soli/translate")) == 1


@pytest.mark.slow
def test_a_server_that_goes_while_nothing_is_done_is_noticed(mock, open_page):
    page = open_page(mock, complaints=GONE)
    mock.gone = True
    page.wait_for_selector("#alert:visible")
    mock.gone = False
    until(page, "document.querySelector('#notice').hidden")
    mock.gone = True
    page.wait_for_selector("#alert:visible")
    mock.model = mock.model | {"name": "another"}
    mock.gone = False
    page.wait_for_selector("#model-name:text-is('another')")  # the page was loaded again


def test_a_page_opened_before_its_server_waits_for_it(mock, open_page):
    no_server = """
      const ask = window.fetch.bind(window);
      window.fetch = (...request) => (window.back ? ask(...request) : Promise.reject(new TypeError('refused')));
    """
    page = open_page(mock, complaints=GONE, watch=no_server, ready=False)
    page.wait_for_selector("#retry:visible")
    assert "does not answer" in page.inner_text("#alert")
    page.evaluate("window.back = true")
    page.wait_for_selector("body:not(.loading)")
    until(page, "document.querySelector('#notice').hidden && document.querySelector('.words')")


def test_a_connection_that_breaks_in_an_answer_is_no_answer(mock, open_page):
    page = open_page(mock, complaints=GONE)
    mock.break_after = 3
    page.click("#run")
    page.wait_for_selector("#retry:visible")
    assert page.inner_text("#alert") in ("The server does not answer; it may have been stopped.", "The server is back.")
    mock.break_after = None
    page.click("#retry")
    until_done(page)
    assert page.inner_text(".words") == KNIFE["translation"]


@pytest.mark.slow
def test_a_slow_server_is_named_and_the_answer_still_comes(mock, open_page):
    page = open_page(mock)
    mock.stall = 7.5
    page.click("#run")
    page.wait_for_selector("#retry:visible")
    assert page.inner_text("#alert").startswith("The server is slow: nothing has come for 5 seconds.")
    mock.stall = 0.0
    until_done(page)
    assert page.inner_text(".words") == KNIFE["translation"]
    until(page, "document.querySelector('#notice').hidden")
