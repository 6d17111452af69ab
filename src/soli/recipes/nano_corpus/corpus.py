"""The corpus step: packages to cleaned, de-duplicated and split lines of text.

Each source is fetched and read once and its rows cached, so a build that was stopped goes on where it was. Held out are
whole Bible books and one text in `heldout_every`, by a hash of the English (so all renderings of one text fall on one
side); whatever in the training half repeats a held-out text, on either side or as a sentence inside it, is dropped.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from soli.data.documents import Pair, ReportStep
from soli.data.text import comparison_key, is_held_out
from soli.data.tsv import read_tsv, write_tsv
from soli.errors import SoliError
from soli.recipes.nano_corpus.cleaning import is_translation, sentences_en, sentences_zh, tidy
from soli.recipes.nano_corpus.config import CorpusConfig
from soli.recipes.nano_corpus.fetch import fetch
from soli.recipes.nano_corpus.sources import SOURCES, Source, SourceRow

_SHORTEST_LEAK = 16
"""Characters of a compared sentence; shorter ones ("Click OK.") recur everywhere and give nothing away."""


class Line(NamedTuple):
    language: str
    source: str
    text: str

    @property
    def label(self) -> str:
        """As its source is called in recipes and tables."""
        return f"{self.source} ({self.language})"


@dataclass
class Corpus:
    """Training and held-out text; `skipped` names the sources that could not be had."""

    pairs: list[Pair] = field(default_factory=list)
    heldout: list[Pair] = field(default_factory=list)
    mono: list[Line] = field(default_factory=list)
    heldout_mono: list[Line] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, dict[str, int]]:
        """By source: pairs and heldout; lines, heldout and characters for text of one language."""
        table: dict[str, Counter[str]] = defaultdict(Counter)
        for part, pairs in (("pairs", self.pairs), ("heldout", self.heldout)):
            for pair in pairs:
                table[pair.source][part] += 1
        for part, lines in (("lines", self.mono), ("heldout", self.heldout_mono)):
            for line in lines:
                row = table[line.label]
                row[part] += 1
                row["characters"] += len(line.text)
        return {name: dict(row) for name, row in table.items()}


def build_corpus(
    config: CorpusConfig,
    cache: Path,
    report: ReportStep,
    allow_missing: bool = False,
    sources: Sequence[Source] = SOURCES,
) -> Corpus:
    """Fetch, read, clean, de-duplicate and split every source."""
    _check_names(config, sources)
    corpus = Corpus()
    rows: dict[str, list[SourceRow]] = {}
    for source in sources:
        try:
            rows[source.label] = source_rows(source, cache, report)
        except SoliError as error:
            if not allow_missing:
                raise SoliError(
                    f"source {source.name}: {error} (or pass --allow-missing to build without it)"
                ) from error
            corpus.skipped.append(source.label)
            report(source.label, f"skipped: {error}")
    report("corpus", "splitting")
    present = [source for source in sources if source.label in rows]
    _split_pairs(corpus, [(s, row) for s in present if s.is_pairs for row in rows[s.label]], config)
    heldout = _sentence_keys(text for pair in corpus.heldout for text in (pair.en, pair.zh))
    _split_mono(corpus, {s: rows[s.label] for s in present if not s.is_pairs}, config, heldout)
    report("corpus", f"{len(corpus.pairs):,} pairs, {len(corpus.mono):,} lines of one language")
    return corpus


def _check_names(config: CorpusConfig, sources: Sequence[Source]) -> None:
    known = [source.label for source in sources]
    for table, names in (("weights", config.weights), ("caps", config.caps)):
        for name in names:
            if name not in known:
                raise SoliError(f"[data.{table}] names {name}, which is no source: write one of {', '.join(known)}")


def source_rows(source: Source, cache: Path, report: ReportStep) -> list[SourceRow]:
    """Clean rows of one source, each once, from the cache when an earlier build left them there."""
    path = cache / "rows" / f"{source.label.replace(' ', '')}.tsv"
    if not path.is_file():
        report(source.label, "fetching")
        archives = [fetch(package, cache / "packages") for package in source.packages]
        report(source.label, "reading")
        write_tsv(path, dict.fromkeys(_clean(source, source.read(archives))))
    rows = [SourceRow(*fields) for fields in read_tsv(path, 3)]
    if not rows:
        path.unlink()
        raise SoliError(
            f"nothing readable in {', '.join(p.title for p in source.packages)}: delete {cache} and build again"
        )
    report(source.label, f"{len(rows):,} rows")
    return rows


def _clean(source: Source, rows: Iterable[SourceRow]) -> Iterator[SourceRow]:
    for row in rows:
        zh, en = tidy(row.zh), tidy(row.en)
        if not source.is_pairs or is_translation(zh, en, dictionary=source.kind == "dictionary"):
            yield SourceRow(zh, en, row.tag)


def _split_pairs(corpus: Corpus, rows: Iterable[tuple[Source, SourceRow]], config: CorpusConfig) -> None:
    seen: set[tuple[str, str]] = set()
    renderings: Counter[str] = Counter()
    train: list[Pair] = []
    for source, row in rows:
        english, identity = comparison_key(row.en), (comparison_key(row.en), comparison_key(row.zh))
        if identity in seen or renderings[english] >= config.most_renderings:
            continue
        seen.add(identity)
        renderings[english] += 1
        held = row.tag in config.heldout_books or is_held_out(row.en, config.heldout_every)
        (corpus.heldout if held else train).append(Pair(source.name, row.zh, row.en))
    whole = {comparison_key(text) for pair in corpus.heldout for text in (pair.en, pair.zh)}
    inside = _sentence_keys(text for pair in corpus.heldout for text in (pair.en, pair.zh))
    for pair in train:
        if (
            comparison_key(pair.en) not in whole
            and comparison_key(pair.zh) not in whole
            and not _repeats(pair.en + "\n" + pair.zh, inside)
        ):
            corpus.pairs.append(pair)


def _split_mono(corpus: Corpus, rows: dict[Source, list[SourceRow]], config: CorpusConfig, heldout: set[str]) -> None:
    seen: set[str] = set()
    trained = {comparison_key(text) for pair in corpus.pairs for text in (pair.en, pair.zh)}
    for source, texts in rows.items():
        room = config.caps.get(source.label, 1 << 60)
        for text in (row.en or row.zh for row in texts):
            if comparison_key(text) in seen or room <= 0 or _repeats(text, heldout):
                continue
            seen.add(comparison_key(text))
            room -= len(text)
            held = is_held_out(text, config.heldout_every)
            if held and _repeats(text, trained):
                continue
            lines = corpus.heldout_mono if held else corpus.mono
            lines.extend(Line(source.kind, source.name, part) for part in cut(text, config.longest_document))


def cut(text: str, longest: int) -> list[str]:
    """A text in pieces of at most `longest` characters, cut at sentence ends; a longer sentence stays whole."""
    if len(text) <= longest:
        return [text]
    pieces = [""]
    for sentence in (part for run in sentences_zh(text) for part in sentences_en(run)):
        if pieces[-1] and len(pieces[-1]) + len(sentence) >= longest:
            pieces.append("")
        glue = " " if pieces[-1] and pieces[-1][-1].isascii() else ""
        pieces[-1] += glue + sentence
    return pieces


def _sentences(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        for run in sentences_zh(line):
            yield from sentences_en(run)


def _sentence_keys(texts: Iterable[str]) -> set[str]:
    keys = {comparison_key(part) for text in texts for part in (text, *_sentences(text))}
    return {part for part in keys if _weight(part) >= _SHORTEST_LEAK}


def _weight(text: str) -> int:
    """Length in English characters; a Chinese character counts for two."""
    return sum(1 if c.isascii() else 2 for c in text)


def _repeats(text: str, heldout: set[str]) -> bool:
    return comparison_key(text) in heldout or any(comparison_key(part) in heldout for part in _sentences(text))


def write_corpus(corpus: Corpus, folder: Path) -> None:
    """pairs.tsv, heldout.tsv (source, zh, en); mono.tsv, heldout_mono.tsv (language, source, text); counts.json."""
    write_tsv(folder / "pairs.tsv", corpus.pairs)
    write_tsv(folder / "heldout.tsv", corpus.heldout)
    write_tsv(folder / "mono.tsv", corpus.mono)
    write_tsv(folder / "heldout_mono.tsv", corpus.heldout_mono)
    counts = {"sources": corpus.counts(), "skipped": corpus.skipped}
    (folder / "counts.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
