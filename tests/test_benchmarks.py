"""What the benchmarks share, and the table made from their results. The measurements themselves are not run here."""

import json
import re
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import readme_table  # noqa: E402
import record  # noqa: E402


def write_result(folder: Path, name: str, **result: object) -> None:
    (folder / f"{name}.json").write_text(json.dumps(result))


def pages(folder: Path) -> list[str]:
    """Arguments for readme_table with two empty pages and a results folder of our own."""
    for name in ("short.md", "full.md"):
        (folder / name).write_text(f"before\n{readme_table.BEGIN}\nold\n{readme_table.END}\nafter\n")
    files = ("--readme", folder / "short.md", "--full", folder / "full.md", "--results", folder)
    return [str(argument) for argument in files]


@pytest.mark.parametrize(("unit", "ratio"), [("tokens/s", 2.0), ("ms", 0.5)])
def test_a_ratio_says_how_many_times_faster_soli_is(unit: str, ratio: float) -> None:
    row = record.row("x", unit, [2.0, 4.0, 60.0], {"peer": [1.0, 2.0, 3.0]})
    assert row["ratio"] == ratio
    assert row["soli"] == {"median": 4.0, "lowest": 2.0, "highest": 60.0}


@pytest.mark.parametrize(("unit", "best", "ratio"), [("tokens/s", "many", 0.5556), ("s", "few", 0.2)])
def test_the_peer_is_the_one_that_does_best(unit: str, best: str, ratio: float) -> None:
    row = record.row("x", unit, [5.0], {"few": [1.0], "many": [9.0]})
    assert (row["peer"], row["ratio"]) == (best, ratio)


def test_rounds_take_turns_in_changing_order_and_the_first_is_not_counted() -> None:
    calls: list[str] = []

    def contender(name: str):
        return lambda: calls.append(name) or float(len(calls))

    measured = record.interleaved({name: contender(name) for name in "abc"}, rounds=4)
    rounds = [calls[at : at + 3] for at in range(0, 15, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 1
    assert all(len(values) == 4 and min(values) > 3 for values in measured.values())


def test_time_is_processor_time_not_wall_time() -> None:
    import time

    assert record.timed(lambda: time.sleep(0.05))() < 0.04


@pytest.mark.parametrize(
    ("value", "text"),
    [(12345.6, "12,346 s"), (123.4, "123 s"), (12.34, "12.3 s"), (1.234, "1.23 s"), (0.0123, "0.012 s")],
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    assert record.figure(value, "s") == text


def test_the_machine_is_recorded() -> None:
    machine = record.hardware()
    assert machine["cores"] >= 1 and machine["memory_gib"] > 0 and machine["torch"]
    assert record.machine.package_version("no-such-package") is None


def headline(row: str, peer: str) -> readme_table.Headline:
    return readme_table.Headline("generate", row, f"label of {row}", peer)


def test_the_tables_replace_what_is_between_the_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme_table, "HEADLINES", (headline("decode", "fast"),))
    rows = [
        record.row("decode", "tokens/s", [50.0], {"slowest": [10.0], "fast": [100.0]}),
        record.row("detail", "ms", [3.0], {"fast": [6.0]}),
        record.row("alone", "MiB", [70.0]),
        record.row("memory", "MiB", [70.0], {"fast": [35.0]}) | {"rounds": 1},
    ]
    machine = record.hardware() | {"dirty": False}
    write_result(tmp_path, "generate", hardware=machine, size={"rounds": 5}, rows=rows, note=record.NOTE)
    arguments = pages(tmp_path)
    assert readme_table.main([*arguments, "--check"]) == 1
    assert "old" in (tmp_path / "short.md").read_text()
    assert readme_table.main(arguments) == 0
    assert readme_table.main([*arguments, "--check"]) == 0
    short, full = ((tmp_path / name).read_text() for name in ("short.md", "full.md"))
    assert short.startswith("before\n") and short.endswith("after\n") and "old" not in short
    link = "[label of decode](benchmarks/README.md#generation-beside-transformers)"
    assert f"| {link} | 50.0 tokens/s | 100 tokens/s (fast) | 0.50×, slower |" in short
    assert "detail" not in short and "slowest" not in short
    assert "| detail | 3.00 ms | 6.00 ms (fast) | 2.00× |" in full
    assert "slowest" in full and "| alone | 70.0 MiB |  |  |" in full
    assert "| memory (one round) | 70.0 MiB | 35.0 MiB (fast) | 0.50×, more |" in full
    assert f"commit {machine['commit'][:7]}" in full and "uncommitted" not in full


@pytest.mark.parametrize(
    ("dirty", "rounds", "message"), [(True, 5, "uncommitted changes"), (False, 1, "fewer than 3 rounds")]
)
def test_headlines_are_of_clean_trees_and_several_rounds(
    dirty: bool, rounds: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readme_table, "HEADLINES", (headline("decode", "fast"),))
    rows = [record.row("decode", "tokens/s", [50.0], {"fast": [100.0]})]
    machine = record.hardware() | {"dirty": dirty}
    write_result(tmp_path, "generate", hardware=machine, size={"rounds": rounds}, rows=rows)
    with pytest.raises(SystemExit, match=message):
        readme_table.main(pages(tmp_path))
    monkeypatch.setattr(readme_table, "HEADLINES", ())
    assert readme_table.main(pages(tmp_path)) == 0
    full = " ".join((tmp_path / "full.md").read_text().split())
    assert ("**with uncommitted changes**" in full) is dirty


def test_the_ratio_is_that_of_the_figures_shown() -> None:
    """Every row of the pages: the ratio is the quotient of the two figures before it, up to their rounding."""
    for page in (record.ROOT / "README.md", record.HERE / "README.md"):
        rows = re.findall(r"\| ([\d,.]+) (\S+) \| ([\d,.]+) \S+ \([^|]*\) \| ([\d.]+)×", page.read_text())
        assert len(rows) >= 6
        for soli, unit, peer, ratio in rows:
            quotient = float(soli.replace(",", "")) / float(peer.replace(",", ""))
            expected = quotient if unit in record.MORE_IS_BETTER else 1 / quotient
            assert float(ratio) == pytest.approx(expected, rel=0.03, abs=0.006)


def test_results_recorded_under_old_labels_are_read(tmp_path: Path) -> None:
    row = record.row("16 at once, beside the memory's speed", "tokens/s", [1.0], {"as written": [2.0]})  # old name
    write_result(tmp_path, "cpu", note="Time that passes.", rows=[row | {"ratio": 9.0}])  # old name
    result = record.load(tmp_path / "cpu.json")
    [line] = result["rows"]
    assert line["what"] == "batch 16, beside memory bandwidth" and result["note"] == "Wall time."
    assert (line["peer"], line["ratio"]) == ("eager", 0.5)


def test_nanos_figures_may_be_few(tmp_path: Path) -> None:
    arguments = pages(tmp_path)
    assert readme_table.main(arguments) == 0  # nothing measured yet
    write_result(
        tmp_path,
        "nano",
        hardware=record.hardware(),
        figures={"en-zh": {"chrf": 21.26, "bleu": 9.0}, "mtp_acceptance": 0.424},
    )
    assert readme_table.main(arguments) == 0
    full = (tmp_path / "full.md").read_text()
    assert "| English to Chinese, held-out pairs | chrF 21.3, BLEU 9.0 |" in full
    assert "42%" in full and "Chinese to English" not in full


def test_a_page_without_markers_is_refused(tmp_path: Path) -> None:
    arguments = pages(tmp_path)
    (tmp_path / "short.md").write_text("no markers")
    with pytest.raises(SystemExit, match="needs the line"):
        readme_table.main(arguments)
    assert (tmp_path / "short.md").read_text() == "no markers"


def test_a_contender_runs_in_its_own_process() -> None:
    import os

    with record.alone(contender_of_process, 3) as ask:
        number, product = ask(14)
    assert product == 42 and number != os.getpid()


def contender_of_process(factor: int):
    import os

    return lambda value: (os.getpid(), factor * value)


def test_the_table_of_formats_leaves_out_what_was_not_measured() -> None:
    import formats

    measured = {"bytes": 27_800_000, "weight_error": 0.0065, "bits_per_byte": 1.83652, "kl": 0.00065}
    measured |= {"bits_per_byte_change": 0.0001, "same_choice": 0.986}
    rows = [
        {"format": "int8", "chrf": {"en-zh": 9.5, "zh-en": 21.9}, **measured},
        {"format": "x", "chrf": {}, **measured},
    ]
    size = {"tokens": 19509, "texts": 300, "pairs": 150}
    lines = formats.tables({"model": "nano", "hardware": record.hardware(), "size": size, "rows": rows}).splitlines()
    assert lines[2] == "| `int8` | 27.8 | 0.65% | 1.8365 | +0.01% | 0.00065 | 98.6% | 9.5 | 21.9 |"
    assert lines[3].endswith("| 98.6% |  |  |") and "19,509 tokens" in " ".join(lines[-2:])


def test_contenders_are_compared_on_the_same_tokens(tmp_path: Path) -> None:
    import formats

    contenders = formats.build("nano", tmp_path, formats.FORMATS[1:3])
    exact, other = contenders
    texts = ["A short text.", "An even shorter one", "木头"]
    tokens = formats.score(contenders, texts)
    assert exact.kl == 0 and exact.same == tokens and 0 < other.kl / tokens < 0.1
    assert 0.003 < formats.weight_error(exact, other) < 0.01 and formats.weight_error(exact, exact) == 0
    from soli.eval.scoring import score_texts

    by_eval = score_texts(exact.text_model, texts).bits_per_byte["all"]
    size = sum(len(text.encode()) for text in texts)
    assert formats.row(exact, exact, tokens, size)["bits_per_byte"] == pytest.approx(by_eval, abs=1e-4)
