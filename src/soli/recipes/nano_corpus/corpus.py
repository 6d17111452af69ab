"""The corpus step: packages to cleaned, de-duplicated and split lines of text.

Each source is fetched and read once and its rows cached, so that a stopped build continues where it was. What is
dropped as no translation is filtering.py's; what is held out, and dropped for being too near to it, is splitting.py's.
"""

from __future__ import annotations

import json
import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from soli.data.documents import Pair, ReportStep
from soli.data.tsv import read_tsv, write_tsv
from soli.errors import SoliError
from soli.recipes.nano_corpus.cleaning import is_translation, tidy
from soli.recipes.nano_corpus.config import CorpusConfig
from soli.recipes.nano_corpus.digests import ArchiveRecord, version_note
from soli.recipes.nano_corpus.fetch import describe, fetch
from soli.recipes.nano_corpus.filtering import drop_suspects
from soli.recipes.nano_corpus.sources import SOURCES, Source, SourceRow
from soli.recipes.nano_corpus.sources.extra import PUBLIC
from soli.recipes.nano_corpus.sources.included import everyday_pairs
from soli.recipes.nano_corpus.splitting import Line, split_lines, split_pairs


@dataclass
class Corpus:
    """Training and held-out text; `skipped` names the sources that could not be had."""

    pairs: list[Pair] = field(default_factory=list)
    heldout: list[Pair] = field(default_factory=list)
    mono: list[Line] = field(default_factory=list)
    heldout_mono: list[Line] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)  # pairs by source and by filtering.py's rule
    archives: list[ArchiveRecord] = field(default_factory=list)  # that are in the cache

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
    extra: Iterable[tuple[str, SourceRow]] = (),
    everyday: Sequence[Pair] | None = None,
) -> Corpus:
    """Fetch, read, clean, de-duplicate and split every source; the pairs of (source, pair) in `extra` come first.

    `everyday` are held out as well; None: the sentences that come with the recipe.
    """
    extra_rows: dict[str, list[SourceRow]] = defaultdict(list)
    for name, row in extra:
        extra_rows[name].extend(_clean([row], "pairs"))
    _check_names(config, [*(source.label for source in sources), *PUBLIC, *extra_rows])
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
    corpus.archives = _archives(sources, cache / "packages", report)
    report("corpus", "splitting")
    present = [source for source in sources if source.label in rows]
    if extra_rows:
        report("extra", f"{sum(map(len, extra_rows.values())):,} pairs")
    pairs = [(name, row) for name in extra_rows for row in _plausible(corpus, name, extra_rows[name])]
    for source in present:
        if source.is_pairs:
            plausible = _plausible(corpus, source.name, rows[source.label], source.kind == "dictionary")
            pairs.extend((source.name, row) for row in plausible)
    of_lines = {source: rows[source.label] for source in present if not source.is_pairs}
    corpus.pairs, corpus.heldout = split_pairs(pairs, everyday_pairs() if everyday is None else everyday, config)
    corpus.mono, corpus.heldout_mono = split_lines(of_lines, corpus.pairs, corpus.heldout, config)
    report("corpus", f"{len(corpus.pairs):,} pairs, {len(corpus.mono):,} lines of one language")
    return corpus


def _archives(sources: Sequence[Source], cache: Path, report: ReportStep) -> list[ArchiveRecord]:
    """The archives in the cache, each once; another version than the recipe was made with is reported."""
    packages = dict.fromkeys(package for source in sources for package in source.packages)
    records = [(package, describe(package, cache)) for package in packages]
    for package, record in records:
        note = version_note(record) if record is not None else None
        if note is not None:
            report(package.title, note)
    return [record for _, record in records if record is not None]


def _plausible(corpus: Corpus, name: str, rows: list[SourceRow], dictionary: bool = False) -> list[SourceRow]:
    """The rows of one source that no rule of filtering.py drops; the others are counted in the corpus."""
    plausible, dropped = drop_suspects(rows, dictionary=dictionary)
    if dropped:
        corpus.dropped[name] = {"before": len(rows), **dropped}
    return plausible


def _check_names(config: CorpusConfig, names_of_sources: Iterable[str]) -> None:
    known = list(dict.fromkeys(names_of_sources))
    for table, names in (("weights", config.weights), ("directions", config.directions), ("caps", config.caps)):
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
        try:
            rows_as_read = dict.fromkeys(_clean(source.read(archives), source.kind))
        except (ValueError, LookupError, struct.error) as error:
            files = ", ".join(map(str, archives))
            raise SoliError(f"the content of {files} is damaged ({error}): delete it and build again") from error
        write_tsv(path, rows_as_read)
    rows = [SourceRow(*fields) for fields in read_tsv(path, 3)]
    if not rows:
        path.unlink()
        raise SoliError(
            f"nothing readable in {', '.join(p.title for p in source.packages)}: delete {cache} and build again"
        )
    report(source.label, f"{len(rows):,} rows")
    return rows


def _clean(rows: Iterable[SourceRow], kind: str) -> Iterator[SourceRow]:
    for row in rows:
        zh, en = tidy(row.zh), tidy(row.en)
        if kind in ("en", "zh") or is_translation(zh, en, dictionary=kind == "dictionary"):
            yield SourceRow(zh, en, row.tag)


def write_corpus(corpus: Corpus, folder: Path) -> None:
    """pairs.tsv, heldout.tsv (source, zh, en); mono.tsv, heldout_mono.tsv (language, source, text); counts.json."""
    write_tsv(folder / "pairs.tsv", corpus.pairs)
    write_tsv(folder / "heldout.tsv", corpus.heldout)
    write_tsv(folder / "mono.tsv", corpus.mono)
    write_tsv(folder / "heldout_mono.tsv", corpus.heldout_mono)
    counts = {
        "sources": corpus.counts(),
        "skipped": corpus.skipped,
        "dropped": corpus.dropped,
        "archives": [asdict(record) for record in corpus.archives],
    }
    (folder / "counts.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
