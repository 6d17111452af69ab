"""The page as files, without a browser: complete, small, in two languages, and with no way to make HTML of text."""

import re
import tomllib
from pathlib import Path

import pytest

from soli.serve.app import PAGE_FOLDER, page_files

SOURCES = {path.name: path.read_text(encoding="utf-8") for path in PAGE_FOLDER.iterdir()}
SCRIPTS = {name: text for name, text in SOURCES.items() if name.endswith(".js")}


def test_every_referenced_file_is_served_and_every_served_file_is_referenced():
    named = set(re.findall(r"/static/[\w.-]+", SOURCES["index.html"]))
    named |= {f"/static/{name}" for text in SCRIPTS.values() for name in re.findall(r"from '\./([\w.]+)'", text)}
    assert named | {"/"} == set(page_files())


def test_headers_allow_the_page_and_nothing_else():
    for path, file in page_files().items():
        policy = file.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy, path
        assert file.headers["X-Content-Type-Options"] == "nosniff"
    assert page_files()["/static/main.js"].headers["Content-Type"].startswith("text/javascript")


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_files_are_small_and_reference_no_other_origin(name):
    assert SOURCES[name].count("\n") < 350
    assert re.findall(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)[\w.]+\.\w", SOURCES[name]) == []


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_no_script_parses_html_or_stores_anything_but_the_view(name):
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|Function\(|Storage|indexedDB|cookie"
    )
    assert re.findall(forbidden, SCRIPTS[name]) == (["Storage"] * 3 if name == "view.js" else [])
    assert set(re.findall(r"Storage\.\w+\((\w+)", SCRIPTS[name])) <= {"NAME"}


def tables() -> dict[str, dict[str, str]]:
    languages = {}
    for language, body in re.findall(r"^const (EN|ZH) = \{\n(.*?)^\};", SCRIPTS["strings.js"], re.S | re.M):
        languages[language] = dict(re.findall(r"(\w+): '((?:[^'\\]|\\.)*)'", body))
    return languages


def test_both_languages_have_the_same_strings_and_placeholders():
    english, chinese = tables()["EN"], tables()["ZH"]
    assert len(english) > 90 and set(english) == set(chinese)
    for key, text in english.items():
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", chinese[key])), key
    assert all(
        re.search(r"[\u4e00-\u9fff]|API|English|^\{\w+\}", text)
        for key, text in chinese.items()
        if key != "languageLabel"
    )


def test_every_string_is_used_and_every_used_string_exists():
    rest = "".join(text for name, text in SOURCES.items() if name != "strings.js")
    computed = {"themeAuto", "themeLight", "themeDark", "en", "zh"}
    computed |= {f"road{view}{part}" for view in ("About", "Simple") for part in ("Prompt", "Answer")}
    words = set(re.findall(r"['\"](\w+)['\"]", rest)) | computed
    assert [key for key in tables()["EN"] if key not in words] == []
    used = set(re.findall(r"\b(?:t|rich)\('(\w+)'", rest))
    used |= set(re.findall(r'data-(?:t|t-label|rich|name)="(\w+)"', rest))
    assert used - set(tables()["EN"]) == set()


def test_every_marked_term_is_explained_in_both_languages_and_every_explanation_is_reachable():
    explained = dict(re.findall(r"(\w+): '(about\w+)'", SCRIPTS["terms.js"]))
    by_attribute = set(re.findall(r'data-about="(\w+)"', SOURCES["index.html"]))
    for language, strings in tables().items():
        marked = {name for text in strings.values() for name in re.findall(r"\[(\w+)[\]|]", text)}
        assert marked | by_attribute == set(explained), language
        assert set(explained.values()) == {key for key in strings if key.startswith("about")}


def test_the_page_is_installed_with_the_package():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))
    assert "serve/page/*" in project["tool"]["setuptools"]["package-data"]["soli"]
