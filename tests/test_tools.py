"""The checks of words, links and outputs in tools/: each rejects what it is there for."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))

import check_links  # noqa: E402
import lint_words  # noqa: E402

WORDS = [
    lint_words.Word("value", "found", "matches"),
    lint_words.Word("name", "ask_ahead", "prefetch"),  # old name
    lint_words.Word("phrase", "written out", "dequantized"),  # old name
]


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("a.py", "found = 1\n", [1]),
        ("a.py", "def f(found: int) -> int:\n    return found\n", [1]),
        ("a.py", "for found, x in []:\n    pass\n", [1]),
        ("a.py", "names_found = 1\nx.found = 2\n", []),
        ("a.py", "import b\n\nb.ask_ahead()\n", [3]),  # old name
        ("a.py", "ask_ahead_of = 1\n", []),
        ("a.py", "# weights are Written\n# out here\n", [1]),
        ("a.py", "found = 1  # old name\n", []),
        ("a.cpp", "const Row* found = nullptr;\n", [1]),
        ("a.cpp", "void f(int found, long n) {\n", [1]),
        ("a.cpp", "// written\n// out\nask_ahead(p);\n", [1, 3]),
        ("a.md", "It is written out.\n", [1]),  # old name
    ],
)
def test_rejected_words_are_seen_where_they_count(name: str, text: str, lines: list[int]) -> None:
    assert [finding.line for finding in lint_words.check(Path(name), text, WORDS)] == lines


def test_what_the_readme_explains_occurs_in_its_output() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [output] = re.findall(r"```\n\$ soli translate[^\n]*\n(.*?)```", text, flags=re.S)
    paragraph = text.split(output)[1].removeprefix("```").split("`soli serve`")[0]
    examples = [code for code in re.findall(r"`([^`]+)`", paragraph) if not code.endswith(".md")]
    assert len(examples) >= 5 and "▇" in paragraph
    for example in examples:
        assert example in output


def test_the_list_of_words_is_well_formed() -> None:
    words = lint_words.load_words()
    assert {word.kind for word in words} == {"value", "name", "phrase"}
    assert all(word.instead for word in words) and len({word[:2] for word in words}) == len(words)


def test_headings_have_the_anchors_that_links_use() -> None:
    text = "# One: two (and 3)\n```\n# no heading\n```\n## `soli` [x](y.md)\n## Same\n## Same\n"
    assert check_links.anchors(text) == {"one-two-and-3", "soli-x", "same", "same-1"}


def test_broken_links_and_long_lines_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_links, "ROOT", tmp_path)
    (tmp_path / "b.md").write_text("# There\n")
    page = tmp_path / "a.md"
    page.write_text("[x](b.md#there) [y](b.md#nowhere) ![z](c.png) <https://x.y> [w](https://x.y)\n" + "x" * 121 + "\n")
    assert list(check_links.problems(page)) == [
        "a.md:1: b.md#nowhere: no such heading",
        "a.md:1: c.png: no such file",
        "a.md:2: 121 characters, 120 are allowed",
    ]
