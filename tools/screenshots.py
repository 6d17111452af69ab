"""Regenerates the pictures in docs/images: `python tools/screenshots.py`. Needs playwright, pillow and chromium.

The pictures of nano show `soli serve nano` at work; the one at DeepSeek-V3's size shows made-up decisions (real routers
with random weights, see tests/serve/page/giant.py), since nobody has V3 at hand. Fonts: fonts-texgyre, fonts-inter and
fonts-noto-cjk from Debian.
"""

import io
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
LARGEST = 300_000  # bytes
FRAME_MS, LAST_FRAME_MS = 250, 2000  # of the moving picture
SEEK = """at => {
  const slider = document.querySelector("#seek");
  slider.value = at;
  slider.dispatchEvent(new Event("input", {bubbles: true}));
}"""
TOKENS = 13  # of the page's first example, "Where is the library?", with its translation
SHOWN = 9  # the place of 书 in it: what the bias changed is seen in two layers
WARM_UP_TEXTS = (
    "The old man walked slowly to the river.", "Please close the window, it is cold.", "我们明天早上八点出发。",
    "The train leaves at 10:45.", "他把书放在桌子上。", "In 1998 the city had 200 schools.",
)  # fmt: skip

sys.path.insert(0, str(ROOT))


@contextmanager
def nano() -> Iterator[str]:
    """`soli serve nano` on a free port, with a few sentences translated so that its experts have something to show."""
    command = [sys.executable, "-m", "soli", "serve", "nano", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        address = re.search(r"http://[\d.:]+", next(line for line in server.stderr if "http://" in line))
        assert address is not None
        for text in WARM_UP_TEXTS:
            translate(address[0], text)
        yield address[0]
        server.terminate()
        server.stderr.read()


def translate(url: str, text: str) -> None:
    """One translation with its routing, asked for until the model is loaded."""
    body = json.dumps({"text": text, "soli": {"routing": "full"}}).encode()
    request = urllib.request.Request(f"{url}/soli/translate", body, {"Content-Type": "application/json"})
    for _ in range(600):
        try:
            urllib.request.urlopen(request).read()
            return
        except OSError:
            time.sleep(0.1)
    sys.exit(f"{url} does not translate")


def opened(browser: Browser, url: str, view: str = "detailed", **options: Any) -> Page:
    """The page in a view, when the example that it runs by itself has been answered."""
    options = {"viewport": {"width": 1440, "height": 1000}, "locale": "en-GB", **options}
    page = browser.new_context(**options).new_page()
    page.goto(f"{url}/#view={view}")
    page.wait_for_selector("body:not(.loading)")
    while not page.is_visible("#run"):
        page.wait_for_timeout(50)
    return page


def wait_for(page: Page, at: int) -> None:
    """Until at least `at` tokens have been shown."""
    while int(re.findall(r"\d+", page.inner_text("#at"))[0]) < at:
        page.wait_for_timeout(10)


def save(page: Page, name: str, height: int | None = None) -> None:
    """Writes docs/images/NAME: the window, or the page's top `height` pixels."""
    page.mouse.move(0, 0)
    page.evaluate("window.scrollTo(0, 0)")
    page.wait_for_timeout(200)
    width = page.viewport_size["width"] if page.viewport_size else 1440
    clip = {"x": 0, "y": 0, "width": width, "height": height} if height else None
    path = IMAGES / name
    page.screenshot(path=path, full_page=height is not None, clip=clip)  # type: ignore[arg-type]
    page.context.close()
    check_size(path)


def check_size(path: Path) -> None:
    if path.stat().st_size > LARGEST:
        sys.exit(f"{path} has {path.stat().st_size} bytes, more than {LARGEST}")
    print(f"{path.relative_to(ROOT)}  {path.stat().st_size // 1000} kB")


def token_path(browser: Browser, url: str) -> None:
    page = opened(browser, url, color_scheme="light")
    page.click("#run")
    wait_for(page, TOKENS)
    page.locator(".token").nth(SHOWN).click()
    save(page, "page-road.png", 1290)


def moving(browser: Browser, url: str) -> None:
    """The page token by token, as an animated WebP: one frame per token, whatever this machine's speed."""
    options = {"viewport": {"width": 1200, "height": 565}, "color_scheme": "dark", "reduced_motion": "reduce"}
    page = opened(browser, url, **options)
    page.click("#run")
    wait_for(page, TOKENS)
    frames = []
    for at in range(1, TOKENS + 1):
        page.evaluate(SEEK, at)
        page.wait_for_timeout(300)
        with Image.open(io.BytesIO(page.screenshot())) as picture:
            frames.append(picture.convert("RGB").resize((960, 452), Image.Resampling.LANCZOS))
    page.context.close()
    path = IMAGES / "page-nano.webp"
    durations = [*[FRAME_MS] * (len(frames) - 1), LAST_FRAME_MS]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=60, method=4)
    check_size(path)


def simple(browser: Browser, url: str) -> None:
    page = opened(browser, url, view="simple", color_scheme="light", viewport={"width": 1280, "height": 900})
    wait_for(page, TOKENS)
    page.locator(".token").nth(SHOWN).click()
    save(page, "page-simple.png", 900)


def live(browser: Browser, url: str) -> None:
    page = opened(browser, url, color_scheme="dark")
    page.click("#run")
    wait_for(page, TOKENS - 3)
    page.click("#play")
    save(page, "page-nano.png", 660)


def compared(browser: Browser, url: str) -> None:
    page = opened(browser, url, color_scheme="light")
    page.check("#compare")
    page.click("#run")
    wait_for(page, TOKENS)
    page.wait_for_timeout(1500)
    save(page, "page-compare.png", 940)


def masked(browser: Browser, url: str) -> None:
    page = opened(browser, url, color_scheme="dark", locale="zh-CN")
    page.click("#run")
    wait_for(page, TOKENS)
    page.focus("#grid-a")
    for key in ["ArrowDown"] * 3 + ["ArrowRight"] * 24 + ["Enter"]:
        page.keyboard.press(key)
    page.wait_for_selector(".kinds li")
    page.click("#mute")
    page.click("#run-again")
    wait_for(page, TOKENS)
    page.wait_for_timeout(1500)
    save(page, "page-expert-zh.png", 1130)


def phone(browser: Browser, url: str) -> None:
    small = {"width": 390, "height": 844}
    page = opened(
        browser, url, viewport=small, device_scale_factor=2, is_mobile=True, has_touch=True, color_scheme="dark"
    )
    page.tap("#run")
    wait_for(page, TOKENS)
    page.locator(".token").nth(SHOWN).tap()
    save(page, "page-phone.png", 1060)


def giant(browser: Browser) -> None:
    from tests.serve.page.giant import giant_model, giant_piece
    from tests.serve.page.mock_server import MockServer

    with MockServer(model=giant_model(), pieces=[giant_piece(60)]) as server:
        page = opened(browser, server.url, color_scheme="dark")
        page.click("#mode-complete")
        page.fill("#text-a", "The old river")
        page.click("#run")
        wait_for(page, 30)
        page.click("#play")
        page.evaluate("document.querySelectorAll('.rate').forEach(rate => rate.remove())")  # no model computed these
        save(page, "page-v3-size.png")


def main() -> None:
    chromium = shutil.which("chromium") or sys.exit("chromium is not installed: apt-get install chromium")
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as playwright, nano() as url:
        browser = playwright.chromium.launch(executable_path=chromium)
        for picture in (moving, simple, live, token_path, compared, masked, phone):
            picture(browser, url)
        giant(browser)


if __name__ == "__main__":
    main()
