"""How `soli data` shows itself: a line per source while it works (on stderr), then tables (on stdout)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from soli.cli._shared.console import stdout_console
from soli.data.packing import read_meta


class Progress:
    """A spinner with the current step in a terminal, and one line for each step that ended; plain lines elsewhere."""

    def __init__(self, quiet: bool = False) -> None:
        self._console = Console(stderr=True, highlight=False, quiet=quiet)
        self._status = self._console.status("starting")
        self._began = time.monotonic()

    def __enter__(self) -> Progress:
        self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._status.stop()

    def report(self, name: str, event: str) -> None:
        """Take a report of the data step; an event that ends in -ing is under way, any other is a result."""
        if event.endswith("ing"):
            self._status.update(f"{name}: {event}")
            return
        elapsed = time.monotonic() - self._began
        self._console.print(f"{elapsed:5.0f} s  {name:<24} {escape(event)}")


def print_counts(folder: Path, as_json: bool) -> None:
    """counts.json and meta.json of a finished build, as one table or one JSON object."""
    counts = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
    meta = read_meta(folder)
    if as_json:
        print(json.dumps({**counts, "meta": meta}, indent=2))
        return
    table = _table("source", "pairs", "lines", "characters", "held out", "tokens")
    for name, row in counts["sources"].items():
        tokens = meta["sources"].get(name, {}).get("tokens", 0)
        table.add_row(
            name, *(_number(row.get(k)) for k in ("pairs", "lines", "characters", "heldout")), _number(tokens)
        )
    totals = [
        sum(row.get(k, 0) for row in counts["sources"].values()) for k in ("pairs", "lines", "characters", "heldout")
    ]
    table.add_row("all", *map(_number, totals), _number(meta["train_tokens"]))
    stdout_console().print(table)
    for name in counts["skipped"]:
        print(f"without {name}, which could not be fetched")
    print(f"wrote {folder}: {meta['train_tokens']:,} training tokens, {meta['valid_tokens']:,} held out")


def print_packed(folder: Path, found: dict[str, Any]) -> None:
    """What `pack_inputs` wrote, as one table and a line for the bad lines."""
    table = _table("source", "documents", "tokens", "share", "held out")
    for name in dict.fromkeys((*found["sources"], *found["valid_sources"])):
        row = found["sources"].get(name, {"tokens": 0, "documents": 0})
        held = found["valid_sources"].get(name, {}).get("documents")
        share = f"{row['tokens'] / found['train_tokens']:.1%}"
        table.add_row(escape(name), _number(row["documents"]), _number(row["tokens"]), share, _number(held))
    stdout_console().print(table)
    bad = found["bad_lines"]
    if bad:
        print(f"bad lines left out: {sum(bad.values()):,}, listed in {folder / 'bad_lines.jsonl'}")
    print(f"wrote {folder}: {found['train_tokens']:,} training tokens, {found['valid_tokens']:,} held out")


def print_inspection(folder: Path, found: dict[str, Any]) -> None:
    """What `inspect_folder` found, for a person."""
    console = stdout_console()
    table = _table("source", "documents", "tokens", "share", "tokens/document")
    for name, row in sorted(found["sources"].items(), key=lambda item: -item[1]["tokens"]):
        mean = row["tokens"] / max(1, row["documents"])
        share = row["tokens"] / max(1, found["train_tokens"])
        table.add_row(name, _number(row["documents"]), _number(row["tokens"]), f"{share:.1%}", f"{mean:.1f}")
    console.print(table)
    print(f"{folder}: {found['train_tokens']:,} training and {found['valid_tokens']:,} held-out tokens")
    print(f"vocabulary {found['vocab_size']:,}; characters per token: {_per_language(found['characters_per_token'])}")
    lengths = found["document_tokens"]
    print("document lengths: " + ", ".join(f"{name} {value:,}" for name, value in lengths.items()) + " tokens")
    for sample in found["samples"]:
        console.print(f"[dim]at {sample['at']:,}[/dim] {escape(sample['text'])}", soft_wrap=True)


def _per_language(values: dict[str, float]) -> str:
    return ", ".join(f"{value:.2f} {language}" for language, value in values.items()) or "unknown"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _number(value: int | None) -> str:
    return f"{value:,}" if value else ""
