"""What the tests of the page do to it, and how they wait for it."""

import time

PLAYED = """(() => {
  const [at, of] = [...document.querySelector('#at').textContent.matchAll(/\\d+/g)].map(([number]) => Number(number));
  return !document.querySelector('#run').hidden && of > 0 && at === of;
})()"""

LIT = """(id) => { // cells that differ from what a silent grid has at the same place
  const canvas = document.querySelector(`#${id} canvas`);
  const pen = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d', { willReadFrequently: true });
  pen.drawImage(canvas, 0, 0);
  const { data } = pen.getImageData(0, 0, canvas.width, canvas.height);
  let lit = 0;
  for (let i = 0; i < data.length; i += 4) if (data[i] - data[i + 2] > 60) lit += 1;
  return lit;
}"""


def until(page, condition, seconds=30.0):
    """Waits for a JavaScript expression, for long since other tests use the cores; the page's policy forbids the
    polling script of Playwright."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"still not true: {condition}"
        page.wait_for_timeout(15)


def play(page):
    """Plays as fast as the tokens come, to the end."""
    page.select_option("#speed", "Infinity")
    page.click("#run")
    until(page, PLAYED)


def until_done(page):
    until(page, "document.querySelector('#status').textContent.startsWith('Done')")


def token(page, index, strip="a"):
    return page.locator(f"#strip-{strip} .token").nth(index)


def choose_cell(page, row, expert):
    """Goes to a cell by keyboard alone."""
    page.focus("#grid-a")
    for key in ["PageUp", "Home"] + ["ArrowDown"] * row + ["ArrowRight"] * expert + ["Enter"]:
        page.keyboard.press(key)


def named_cell(page):
    """What a screen reader is told of the cell under the cursor."""
    return page.locator(f"#{page.get_attribute('#grid-a', 'aria-activedescendant')}").inner_text()
