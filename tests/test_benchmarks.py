"""What the benchmarks share, and the table made from their results. The measurements themselves are not run here."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import readme_table  # noqa: E402
import record  # noqa: E402


def written(folder: Path, name: str, **result: object) -> None:
    (folder / f"{name}.json").write_text(json.dumps(result))


def pages(folder: Path) -> list[str]:
    """Arguments for readme_table with two empty pages and a results folder of our own."""
    for name in ("short.md", "full.md"):
        (folder / name).write_text(f"before\n{readme_table.BEGIN}\nold\n{readme_table.END}\nafter\n")
    files = ("--readme", folder / "short.md", "--full", folder / "full.md", "--results", folder)
    return [str(argument) for argument in files]


@pytest.mark.parametrize(("unit", "ratio"), [("tokens/s", 2.0), ("ms", 0.5)])
def test_a_ratio_says_how_many_times_faster_soli_is(unit: str, ratio: float) -> None:
    found = record.row("x", unit, [2.0, 4.0, 60.0], {"peer": [1.0, 2.0, 3.0]})
    assert found["ratio"] == ratio
    assert found["soli"] == {"median": 4.0, "lowest": 2.0, "highest": 60.0}


@pytest.mark.parametrize(("unit", "best", "ratio"), [("tokens/s", "many", 0.5556), ("s", "few", 0.2)])
def test_the_peer_is_the_one_that_does_best(unit: str, best: str, ratio: float) -> None:
    found = record.row("x", unit, [5.0], {"few": [1.0], "many": [9.0]})
    assert (found["peer"], found["ratio"]) == (best, ratio)


def test_rounds_take_turns_in_changing_order_and_the_first_is_not_counted() -> None:
    calls: list[str] = []

    def contender(name: str):
        return lambda: calls.append(name) or float(len(calls))

    found = record.interleaved({name: contender(name) for name in "abc"}, rounds=4)
    rounds = [calls[at : at + 3] for at in range(0, 15, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 1
    assert all(len(values) == 4 and min(values) > 3 for values in found.values())


def test_time_is_the_processors_not_the_walls() -> None:
    import time

    assert record.timed(lambda: time.sleep(0.05))() < 0.04


@pytest.mark.parametrize(
    ("value", "text"),
    [(12345.6, "12,346 s"), (123.4, "123 s"), (12.34, "12.3 s"), (1.234, "1.23 s"), (0.0123, "0.012 s")],
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    assert record.figure(value, "s") == text


def test_the_machine_is_told_in_full() -> None:
    found = record.hardware()
    assert found["cores"] >= 1 and found["memory_gib"] > 0 and found["torch"]
    assert record.version("no-such-package") is None


def test_the_table_keeps_the_page_and_says_who_is_slower(tmp_path: Path) -> None:
    rows = [
        record.row("decode", "tokens/s", [50.0], {"slowest": [10.0], "fast": [100.0]}, headline=True),
        record.row("detail", "ms", [3.0], {"fast": [6.0]}),
        record.row("alone", "MiB", [70.0]),
        record.row("memory", "MiB", [70.0], {"fast": [35.0]}),
    ]
    written(tmp_path, "generate", hardware=record.hardware(), size={"rounds": 5}, rows=rows)
    arguments = pages(tmp_path)
    assert readme_table.main([*arguments, "--check"]) == 1
    assert "old" in (tmp_path / "short.md").read_text()
    assert readme_table.main(arguments) == 0
    assert readme_table.main([*arguments, "--check"]) == 0
    short, full = ((tmp_path / name).read_text() for name in ("short.md", "full.md"))
    assert short.startswith("before\n") and short.endswith("after\n") and "old" not in short
    line = "| decode | 50.0 tokens/s | 100 tokens/s (fast) | 0.50×, slower | [generate.py](benchmarks/generate.py) |"
    assert line in short
    assert "| memory | 70.0 MiB | 35.0 MiB (fast) | 0.50×, more |" in short  # a loss is no detail
    assert "detail" not in short and "slowest" not in short
    assert "| detail | 3.00 ms | 6.00 ms (fast) | 2.00× | [generate.py](generate.py) |" in full
    assert "slowest" in full and "| alone | 70.0 MiB |  |  |" in full
    assert f"commit {record.hardware()['commit'][:7]}" in short


def test_nanos_figures_come_first_and_may_be_few(tmp_path: Path) -> None:
    arguments = pages(tmp_path)
    assert readme_table.main(arguments) == 0  # nothing measured yet
    written(
        tmp_path,
        "nano",
        hardware=record.hardware(),
        figures={"en-zh": {"chrf": 21.26, "bleu": 9.0}, "mtp_acceptance": 0.424},
    )
    assert readme_table.main(arguments) == 0
    short = (tmp_path / "short.md").read_text()
    assert "| nano, English to Chinese, held-out pairs | chrF 21.3, BLEU 9.0 |" in short
    assert "42%" in short and "Chinese to English" not in short


def test_a_page_without_markers_is_refused(tmp_path: Path) -> None:
    arguments = pages(tmp_path)
    (tmp_path / "short.md").write_text("no markers")
    with pytest.raises(SystemExit, match="needs the line"):
        readme_table.main(arguments)
    assert (tmp_path / "short.md").read_text() == "no markers"


def test_a_contender_lives_in_its_own_process() -> None:
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
    made = formats.tables({"model": "nano", "hardware": record.hardware(), "size": size, "rows": rows}).splitlines()
    assert made[2] == "| `int8` | 27.8 | 0.65% | 1.8365 | +0.01% | 0.00065 | 98.6% | 9.5 | 21.9 |"
    assert made[3].endswith("| 98.6% |  |  |") and "19,509 tokens" in made[-1]


def test_contenders_are_compared_on_the_same_tokens(tmp_path: Path) -> None:
    import formats

    contenders = formats.build("nano", tmp_path, formats.FORMATS[1:3])
    exact, other = contenders
    texts = ["A short text.", "An even shorter one", "木头"]
    tokens = formats.read(contenders, texts)
    assert exact.kl == 0 and exact.same == tokens and 0 < other.kl / tokens < 0.1
    assert 0.003 < formats.weight_error(exact, other) < 0.01 and formats.weight_error(exact, exact) == 0
    from soli.eval.quality import read_texts

    by_eval = read_texts(exact.spoken, texts).bits_per_byte["all"]
    size = sum(len(text.encode()) for text in texts)
    assert formats.row(exact, exact, tokens, size)["bits_per_byte"] == pytest.approx(by_eval, abs=1e-4)
