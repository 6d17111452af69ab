"""Pairs from packages that keep their texts in one file per language: JSON trees, YAML trees, lists of sentences.

A text's key is its file (without the language) and its place in the tree; what has the same key in English and in
Chinese is a pair. Texts of Taiwan are converted to the mainland's words and characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soli.recipes.nano_corpus.cleaning import Simplifier
from soli.recipes.nano_corpus.fetch import read_members
from soli.recipes.nano_corpus.sources.row import SourceRow, rows_by_key

Texts = dict[tuple[str, ...], str]
Parser = Callable[[bytes], Texts]


def parse_json(content: bytes) -> Texts:
    """Every string of a JSON tree by its path."""
    return dict(leaves(json.loads(content.decode("utf-8-sig"))))


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path, text) of every string below dictionaries and lists."""
    if isinstance(tree, dict):
        for name, branch in tree.items():
            yield from leaves(branch, (*path, str(name)))
    elif isinstance(tree, list):
        for number, branch in enumerate(tree):
            yield from leaves(branch, (*path, str(number)))
    elif isinstance(tree, str):
        yield path, tree


def parse_yaml_tree(content: bytes) -> Texts:
    """Plain and quoted one-line scalars of a YAML mapping by their path, which is what translation files hold.

    Anchors, lists and folded blocks are left out: no YAML library is needed for the rest.
    """
    texts: Texts = {}
    path: list[tuple[int, str]] = []
    for line in content.decode("utf-8").splitlines():
        match = _YAML_ENTRY.match(line)
        if match is None:
            continue
        indent, name, value = len(match[1]), match[2].strip("'\""), match[3].strip()
        while path and path[-1][0] >= indent:
            path.pop()
        path.append((indent, name))
        if value and value[0] not in "|>&*[{#":
            texts[tuple(part for _, part in path)] = _unquoted(value)
    return texts


_YAML_ENTRY = re.compile(r"^( *)([\w.\-'\"]+):(.*)$")


def _unquoted(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] == "'":
        return value[1:-1].replace("''", "'")
    if len(value) >= 2 and value[0] == value[-1] == '"':
        return value[1:-1].replace('\\"', '"')
    return value.split(" #")[0].rstrip()


@dataclass(frozen=True)
class LocaleFiles:
    """Which files of a package hold texts: a regular expression with the group `language` (and any others, which
    together name the file), the languages' own names, and how one file is read."""

    pattern: str
    english: str
    simplified: str
    taiwan: str | None = None
    parse: Parser = parse_json
    glob: str = "*"
    language_at_root: bool = False  # each file is {language: tree}

    def read(self, archives: list[Path]) -> Iterator[SourceRow]:
        """Pairs of simplified Chinese, then Taiwan's."""
        files = self._files(archives)
        for language in (self.simplified, self.taiwan):
            simplify = Simplifier("tw2sp") if language == self.taiwan else str
            for page, texts in files.get(language or "", {}).items():
                yield from rows_by_key(texts, files.get(self.english, {}).get(page, {}), simplify)

    def _files(self, archives: list[Path]) -> dict[str, dict[tuple[str, ...], Texts]]:
        """language -> file -> texts."""
        pattern = re.compile(self.pattern)
        files: dict[str, dict[tuple[str, ...], Texts]] = {}
        for archive in archives:
            for name, content in read_members(archive, self.glob):
                match = pattern.search(name)
                if match is None or match["language"] not in (self.english, self.simplified, self.taiwan):
                    continue
                page = tuple(part or "" for group, part in match.groupdict().items() if group != "language")
                texts = self.parse(content)
                if self.language_at_root:
                    texts = {key[1:]: text for key, text in texts.items()}
                files.setdefault(match["language"], {}).setdefault(page, {}).update(texts)
        return files


HOME_ASSISTANT = LocaleFiles(
    r"components/(?P<component>[^/]+)/translations/(?P<page>(?:[^/]+\.)?)(?P<language>en|zh-Han[st])\.json$",
    *("en", "zh-Hans", "zh-Hant"),
    glob="homeassistant/components/*/translations/*.json",
)
HOME_ASSISTANT_FRONTEND = LocaleFiles(
    r"translations/(?P<page>(?:\w+/)?)(?P<language>en|zh-Han[st])-[0-9a-f]{16,}\.json$",
    *("en", "zh-Hans", "zh-Hant"),
    glob="hass_frontend/static/translations/*.json",
)
AIRFLOW = LocaleFiles(
    r"locales/(?P<language>en|zh-CN|zh-TW)/(?P<page>\w+)\.json$", "en", "zh-CN", "zh-TW", glob="*/i18n/locales/*.json"
)
MATRIX = LocaleFiles(
    r"strings/(?P<language>en_EN|zh_Han[st])\.json$", "en_EN", "zh_Hans", "zh_Hant", glob="*/i18n/strings/*.json"
)
OPENSTREETMAP = LocaleFiles(  # not Taiwan's, which names other places in its examples
    r"locales/(?P<language>en|zh-CN)\.min\.json$",
    *("en", "zh-CN"),
    glob="*/dist/locales/*.json",
    language_at_root=True,
)
OSRM = LocaleFiles(r"translations/(?P<language>en|zh-Hans)\.json$", "en", "zh-Hans", glob="*/languages/translations/*")
NODE_RED = LocaleFiles(
    r"locales/(?P<language>en-US|zh-CN|zh-TW)/(?P<page>\w+)\.json$", "en-US", "zh-CN", "zh-TW", glob="*/locales/*.json"
)
SCRATCH = LocaleFiles(
    r"package/(?P<page>(?:editor|www)/[^/]+)/(?P<language>en|zh-cn)\.json$", "en", "zh-cn", glob="package/*.json"
)
KOLIBRI = LocaleFiles(
    r"locale/(?P<language>en|zh_Hans)/LC_MESSAGES/(?P<page>[\w.]+)-messages\.json$",
    *("en", "zh_Hans"),
    glob="kolibri/locale/*/LC_MESSAGES/*.json",
)
RANCHER = LocaleFiles(
    r"translations/(?P<language>en-us|zh-hans)\.yaml$", "en-us", "zh-hans", parse=parse_yaml_tree, glob="*.yaml"
)


def read_spoken_names(archives: list[Path]) -> Iterator[SourceRow]:
    """Unicode's spoken name of each character, without the keywords listed beside it."""
    names: dict[str, Texts] = {}
    for name, content in read_members(archives[0], "package/annotations/*/annotations.json"):
        language = Path(name).parent.name
        if language in ("en", "zh"):
            names[language] = {path: text for path, text in parse_json(content).items() if path[-2:] == ("tts", "0")}
    return rows_by_key(names.get("zh", {}), names.get("en", {}))
