"""The tables of `soli data` on standard output."""

import json
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from soli.cli._shared.console import number_columns, stdout_console
from soli.data.token_files import read_meta

COUNTED = ("pairs", "lines", "characters", "heldout")  # fields of a source in counts.json


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
        table.add_row(name, *(_number(row.get(field)) for field in COUNTED), _number(tokens))
    totals = [sum(row.get(field, 0) for row in counts["sources"].values()) for field in COUNTED]
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
    compression = ", ".join(f"{value:.2f} {name}" for name, value in inspection["characters_per_token"].items())
    print(f"vocabulary {inspection['vocab_size']:,}; characters per token: {compression or 'unknown'}")
    lengths = ", ".join(f"{name} {value:,}" for name, value in inspection["document_tokens"].items())
    print(f"document lengths: {lengths} tokens")
    for sample in inspection["samples"]:
        console.print(f"[dim]at {sample['at']:,}[/dim] {escape(sample['text'])}", soft_wrap=True)


def _table(*columns: str) -> Table:
    return Table(columns[0], *number_columns(*columns[1:]), box=None, pad_edge=False)


def _number(value: int | None) -> str:
    return f"{value:,}" if value else ""
