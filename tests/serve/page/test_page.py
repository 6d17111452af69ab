"""The page in a real browser, control by control, on recorded traces of the bundled model."""

import json

import pytest

from tests.serve.page.driving import LIT, choose_cell, named_cell, play, token, until, until_done
from tests.serve.page.mock_server import RECORDINGS, Piece

KNIFE = json.loads((RECORDINGS / "knife-en-zh.json").read_text(encoding="utf-8"))
WOOD = 9  # " wood": the bias changed its choice in two layers, and an expert lost its place with its group


def test_translating_shows_the_answer_the_tokens_and_the_light(mock, open_page):
    page = open_page(mock)
    play(page)
    assert page.locator(".reply .words").inner_text() == KNIFE["translation"]
    assert page.locator(".reply").get_attribute("aria-busy") == "false"
    assert page.locator("#strip-a .token.prompt").count() == KNIFE["prompt_tokens"]
    assert page.locator("#strip-a .token").nth(WOOD).inner_text() == "·wood"
    assert page.evaluate(LIT, "grid-a") > 200
    assert page.inner_text("#at") == "20 of 20" and page.inner_text("#status") == "Done: 20 tokens."
    assert (page.inner_text("#total"), page.inner_text("#share")) == ("18M", "38.9 %")
    heard = {
        (layer["layer"], player["expert"])
        for trace in KNIFE["experts"]
        for layer in trace["layers"]
        for player in layer["players"]
    }
    assert page.inner_text("#heard") == f"{len(heard)} of 128"
    (body,) = mock.bodies("/soli/translate")
    soli = {"routing": "full", "masked_experts": []}
    assert body == {"text": KNIFE["source"], "to": None, "stream": True, "soli": soli}


def test_a_token_shows_its_road(mock, open_page):
    page = open_page(mock)
    play(page)
    token(page, WOOD).click()
    assert page.inner_text("#at") == "10 of 20" and page.inner_text("#play") == "Play"
    assert "The bias changed the choice in 2 of 4 layers" in page.inner_text("#panel-token")
    layer = KNIFE["experts"][WOOD]["layers"][0]
    table = page.locator("#panel-token .layer").nth(0)
    rows = [row.inner_text().split("\t") for row in table.locator("tbody tr").all()]
    players = sorted(layer["players"], key=lambda player: -player["weight"])
    assert [int(row[0]) for row in rows[:4]] == [player["expert"] for player in players]
    assert [row[3] for row in rows[:4]] == [f"{player['affinity']:.3f}" for player in players]
    assert [row[1] == "let in" for row in rows[:4]] == [player["let_in"] for player in players]  # old name
    assert float(rows[0][4].replace("−", "-")) == pytest.approx(players[0]["biased"] - players[0]["affinity"], abs=6e-4)
    demoted = {expert["expert"] for expert in layer["kept_out"]}  # old name
    assert {int(row[0]) for row in rows if row[1].startswith("kept out")} == demoted and demoted
    assert any(row[1] == "kept out: group 3 fell" for row in rows)
    runner_up = layer["near_misses"][0]
    marked = [row for row in rows if row[1] == f"next, by {runner_up['margin']:.3f}"]
    assert any(int(row[0]) == runner_up["expert"] for row in marked)
    assert f"Groups that survived: {', '.join(map(str, layer['groups']))} (of 4)." in table.inner_text()
    assert page.evaluate(
        "document.querySelector('#grid-a .over').getContext('2d').getImageData(0,0,2000,400).data.some(Boolean)"
    )
    page.locator("#panel-token .expert").first.click()  # to the expert of highest weight
    assert page.inner_text("#panel-expert h3") == f"layers.1, expert {players[0]['expert']}"


def test_tokens_answer_to_the_keyboard(mock, open_page):
    page = open_page(mock)
    play(page)
    token(page, 3).click()
    for key, expected in [("ArrowRight", 4), ("ArrowLeft", 3), ("End", 19), ("Home", 0)]:
        page.keyboard.press(key)
        assert page.locator('#strip-a [aria-selected="true"]').inner_text() == token(page, expected).inner_text()
        assert page.locator('#strip-a [tabindex="0"]').count() == 1
    page.keyboard.press("Escape")
    assert page.locator('#strip-a [aria-selected="true"]').count() == 0
    assert "Choose a token" in page.inner_text("#panel-token")


def test_an_expert_shows_what_it_plays_by_pointer_and_by_keyboard(mock, open_page):
    page = open_page(mock)
    play(page)
    box = page.evaluate(
        "(() => { const r = document.querySelector('#grid-a').getBoundingClientRect(); return [r.x, r.y]; })()"
    )
    choose_cell(page, 1, 3)
    assert page.inner_text("#panel-expert h3") == "layers.2, expert 3"
    assert named_cell(page).startswith("layers.2, expert 3: played for ")
    ring = page.locator("#grid-a .ring").bounding_box()
    assert ring["x"] > box[0] and ring["y"] > box[1]
    choose_cell(page, 0, 0)
    page.mouse.click(ring["x"] + ring["width"] / 2, ring["y"] + ring["height"] / 2)
    assert page.inner_text("#panel-expert h3") == "layers.2, expert 3"
    report = mock.expert(2, 3)
    page.wait_for_selector(".kinds li")
    shares = {}
    for trace in KNIFE["experts"]:
        players = trace["layers"][1]["players"]
        share = sum(player["weight"] for player in players if player["expert"] == 3)
        shares[trace["text"]] = share / sum(player["weight"] for player in players)
    heaviest = max(shares, key=lambda text: shares[text])
    assert page.locator(".repertoire b").all_inner_texts()[0].replace("·", " ") == heaviest
    assert page.locator(".repertoire small").all_inner_texts()[0] == f"{100 * shares[heaviest]:.0f} %"
    assert page.locator(".kinds li").count() == 5
    share = round(100 * report["kinds"]["english"] / report["selected"])
    assert (
        page.locator(".kinds li").nth(1).get_attribute("aria-label")
        == f"English: {report['kinds']['english']}, {share} %"
    )
    page.locator("#panel-expert .tokens .token").first.click()  # and back to a token that it played
    assert page.locator("#panel-token").is_visible()


def test_muting_an_expert_and_running_again(mock, open_page):
    page = open_page(mock)
    play(page)
    heaviest = max(KNIFE["experts"][WOOD]["layers"][3]["players"], key=lambda player: player["weight"])["expert"]
    choose_cell(page, 3, heaviest)
    page.wait_for_selector(".kinds li")
    page.click("#mute")
    assert page.get_attribute("#mute", "aria-pressed") == "true"
    page.focus("#grid-a")
    assert named_cell(page).endswith(", muted")  # old name
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("m")
    assert page.locator(".chip").all_inner_texts() == [f"4·{heaviest} ×", f"4·{heaviest - 1} ×"]
    page.keyboard.press("m")
    page.click("#run-again")
    until_done(page)
    assert mock.bodies("/soli/translate")[-1]["soli"]["masked_experts"] == [[4, heaviest]]
    token(page, WOOD).click()
    assert str(heaviest) not in page.locator("#panel-token .layer").nth(3).locator("tr.plays .expert").all_inner_texts()
    assert page.inner_text("#panel-expert h3") == f"layers.4, expert {heaviest}"
    page.click("#tab-expert")
    assert "It has not played in this passage" in page.inner_text("#panel-expert")
    page.click("#clear-mutes")
    assert page.locator(".chip").count() == 0 and page.locator("#no-mutes").is_visible()


def test_pause_step_replay_seek_and_speed(mock, open_page):
    page = open_page(mock)
    page.select_option("#speed", "3")
    page.click("#run")
    until(page, "parseInt(document.querySelector('#at').textContent) >= 1")
    page.click("#play")
    at = page.inner_text("#at")
    assert page.inner_text("#play") == "Play" and int(at.split()[0]) < 12
    page.wait_for_timeout(500)
    assert page.inner_text("#at") == at  # paused
    page.click("#step")
    assert int(page.inner_text("#at").split()[0]) == int(at.split()[0]) + 1
    assert page.locator('#strip-a [aria-selected="true"]').count() == 1
    page.click("#step-back")
    assert page.inner_text("#at") == at
    page.focus("#seek")
    page.keyboard.press("End")
    assert page.inner_text("#at") == "20 of 20" and page.get_attribute("#seek", "aria-valuetext") == "20 of 20"
    page.select_option("#speed", "60")
    page.click("#replay")
    assert page.inner_text("#play") == "Pause"
    until(page, "document.querySelector('#play').textContent === 'Play'")
    assert page.inner_text("#at") == "20 of 20"
    assert page.locator('#strip-a [aria-selected="true"]').count() == 0
    page.select_option("#speed", "1")
    page.click("#play")  # at the end: again from the start
    assert page.inner_text("#play") == "Pause" and int(page.inner_text("#at").split()[0]) < 3


def test_two_texts_side_by_side(mock, open_page):
    page = open_page(mock)
    page.check("#compare")
    play(page)
    assert [body["text"] for body in mock.bodies("/soli/translate")] and page.locator(".grid").count() == 3
    assert {body["text"] for body in mock.bodies("/soli/translate")} == {KNIFE["source"], "你可以用这把刀切木头。"}
    assert page.inner_text("#heard").count("/") == 1
    common = int(page.inner_text("#common").split()[-2])
    assert 0 < common < 100
    page.hover("#difference canvas", position={"x": 60, "y": 60})
    assert "in A" in page.inner_text("#tip") and "in B" in page.inner_text("#tip")
    token(page, 4, "b").click()
    assert page.inner_text("#panel-token h3") == token(page, 4, "b").inner_text()


def test_the_same_text_is_all_in_common_and_a_mute_in_b_alone_is_seen(mock, open_page):
    page = open_page(mock)
    page.check("#compare")
    page.fill("#text-b", KNIFE["source"])
    page.check("#only-b")
    play(page)
    until(page, "document.querySelector('#common').textContent === 'weight in common: 100 %'")
    heaviest = max(KNIFE["experts"][WOOD]["layers"][3]["players"], key=lambda player: player["weight"])["expert"]
    choose_cell(page, 3, heaviest)
    page.click("#mute")
    page.click("#run-again")
    until(page, "document.querySelector('#common').textContent.match(/ \\d\\d %/)")
    bodies = mock.bodies("/soli/translate")[-2:]
    assert sorted(body["soli"]["masked_experts"] for body in bodies) == [[], [[4, heaviest]]]


def test_completing_and_chatting(mock, open_page):
    mock.model = mock.model | {"modes": ["chat", "translate", "complete"]}
    mock.pieces.append(Piece("And then?", mock.pieces[0].tokens, reasoning="Let me think."))
    page = open_page(mock)
    page.fill("#text-a", "The river")
    play(page)
    page.fill("#text-a", "And then?")
    play(page)
    first, second = mock.bodies("/v1/chat/completions")
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][0] == first["messages"][0] and second["messages"][2]["content"] == "And then?"
    assert first["stream"] is True and first["model"] == "nano" and first["max_tokens"] == 256
    assert page.locator(".reply .mine").count() == 2
    assert page.inner_text(".thoughts p") == "Let me think."
    page.click("#new-chat")
    assert page.locator(".reply").count() == 0
    page.focus("#mode-chat")
    page.keyboard.press("ArrowLeft")
    assert page.get_attribute("#mode-complete", "aria-checked") == "true"
    page.fill("#text-a", "The river")
    page.fill("#max-tokens", "20")
    play(page)
    assert mock.bodies("/v1/completions")[0]["max_tokens"] == 20
    assert page.locator(".words .given").inner_text() == "The river"


def test_the_key_is_requested_and_held_in_memory_only(mock, open_page):
    mock.key = "secret"
    page = open_page(mock, complaints=("401",), ready=False)
    page.wait_for_selector("#key-dialog[open]")
    assert page.get_attribute("#key-input", "type") == "password"
    page.fill("#key-input", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key-refused:visible")
    page.fill("#key-input", "secret")
    page.keyboard.press("Enter")
    page.wait_for_selector("body:not(.loading)")
    assert page.input_value("#key-input") == "" and page.locator("#key-button").is_visible()
    play(page)
    assert page.locator(".reply .words").inner_text() == KNIFE["translation"]
    mock.key = "changed"  # in the middle of a session: requested again, then the run continues
    page.click("#run")
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key-input", "changed")
    page.keyboard.press("Enter")
    until_done(page)


def test_a_model_without_routed_experts_answers_all_the_same(mock, open_page):
    mock.model = mock.model | {"layers": [], "experts": 0, "chosen": 0, "groups": 1, "kept_groups": 1}
    mock.pieces = [Piece(KNIFE["source"], [trace | {"layers": []} for trace in KNIFE["experts"]])]
    page = open_page(mock)
    assert "every parameter plays for every token" in page.inner_text("#no-routing")
    page.click("#run")
    until(page, f"document.querySelector('.words')?.textContent === '{KNIFE['translation']}'")
    page.click("#language")
    assert "每个参数" in page.inner_text("#no-routing") and not page.is_visible("#stage")


def test_a_server_that_is_still_loading_is_waited_for(mock, open_page):
    mock.loading = 1
    page = open_page(mock, complaints=("503",), ready=False)
    page.wait_for_selector("#alert:visible")
    assert page.inner_text("#alert") == "The server is loading its model."
    page.wait_for_selector("body:not(.loading)")
    assert not page.is_visible("#alert")


def test_stopping_closes_the_stream(mock, open_page):
    mock.pace = 0.2
    page = open_page(mock)
    page.click("#run")
    page.wait_for_selector("#strip-a .token.answer")
    page.click("#stop")
    until(page, "document.querySelector('#status').textContent === 'Stopped.'")
    assert page.locator("#run").is_visible() and page.locator("#strip-a .token.answer").count() < 8
    page.wait_for_timeout(600)
    assert mock.dropped == 1


def test_failures_are_shown(mock, open_page):
    mock.fail_after = 3
    page = open_page(mock)
    page.click("#run")
    page.wait_for_selector("#alert:visible")
    assert page.inner_text("#alert") == "That did not work: the step failed"
    page.fill("#text-a", "   ")
    page.click("#run")
    assert "Write some text first" in page.inner_text("#alert") and len(mock.bodies("/soli/translate")) == 1


def test_what_the_model_writes_is_never_html(mock, open_page):
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    prompt = "\u202eevil\x1b[31m"
    tokens = [trace | {"text": evil if trace["part"] == "answer" else prompt} for trace in KNIFE["experts"]]
    mock.pieces = [Piece(KNIFE["source"], tokens)]
    mock.model = mock.model | {"name": "<b>nano</b>"}
    page = open_page(mock)
    play(page)
    assert page.locator(".reply .words").inner_text() == evil * 8 and page.inner_text("#model-name") == "<b>nano</b>"
    token(page, 15).click()
    choose_cell(page, 0, 0)
    page.wait_for_timeout(200)
    assert page.locator("img, body script, b:has(b)").count() == 0 and page.title() == "Soli"
    assert token(page, 0).inner_text() == "⟨202e⟩evil⟨1b⟩[31m"


@pytest.mark.parametrize("seconds", (0, -0.004, 0.016))
def test_as_fast_as_they_come_needs_no_time_to_pass(mock, open_page, seconds):
    page = open_page(mock)
    script = """async (seconds) => {
      const { Player } = await import('/static/player.js');
      const player = new Player({ length: () => 5, more: () => false, changed: () => {} });
      player.speed = Infinity;
      return [player.advance(seconds), player.position];
    }"""
    assert page.evaluate(script, seconds) == [5, 5]
