"""The tables of `soli data` on standard output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from soli.cli._shared.console import stdout_console
from soli.data.token_files import read_meta


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


def print_packed(folder: Path, meta: dict[str, Any]) -> None:
    """What `pack_inputs` wrote, as one table and a line for the bad lines."""
    table = _table("source", "documents", "tokens", "share", "held out")
    for name in dict.fromkeys((*meta["sources"], *meta["valid_sources"])):
        row = meta["sources"].get(name, {"tokens": 0, "documents": 0})
        heldout = meta["valid_sources"].get(name, {}).get("documents")
        share = f"{row['tokens'] / meta['train_tokens']:.1%}"
        table.add_row(escape(name), _number(row["documents"]), _number(row["tokens"]), share, _number(heldout))
    stdout_console().print(table)
    bad_lines = meta["bad_lines"]
    if bad_lines:
        print(f"bad lines left out: {sum(bad_lines.values()):,}, listed in {folder / 'bad_lines.jsonl'}")
    print(f"wrote {folder}: {meta['train_tokens']:,} training tokens, {meta['valid_tokens']:,} held out")


def print_inspection(folder: Path, inspection: dict[str, Any]) -> None:
    """What `inspect_folder` returned, for a reader."""
    console = stdout_console()
    table = _table("source", "documents", "tokens", "share", "tokens/document")
    for name, row in sorted(inspection["sources"].items(), key=lambda item: -item[1]["tokens"]):
        mean = row["tokens"] / max(1, row["documents"])
        share = row["tokens"] / max(1, inspection["train_tokens"])
        table.add_row(name, _number(row["documents"]), _number(row["tokens"]), f"{share:.1%}", f"{mean:.1f}")
    console.print(table)
    print(f"{folder}: {inspection['train_tokens']:,} training and {inspection['valid_tokens']:,} held-out tokens")
    compression = _per_language(inspection["characters_per_token"])
    print(f"vocabulary {inspection['vocab_size']:,}; characters per token: {compression}")
    lengths = inspection["document_tokens"]
    print("document lengths: " + ", ".join(f"{name} {value:,}" for name, value in lengths.items()) + " tokens")
    for sample in inspection["samples"]:
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
