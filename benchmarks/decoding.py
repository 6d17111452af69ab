"""Beam search beside greedy decoding of translations: quality on held-out pairs, and time.

    python benchmarks/decoding.py PAIRS.tsv [--model nano] [--source NAME] [--count 500] [--beams 2 4]
        [--length-penalties 0.6] [--timed 100] [--output NAME]

PAIRS has a source's name, Chinese and English in a line each, as `soli data build` writes heldout.tsv. Quality is chrF
and BLEU of sacrebleu. Time is that of the first TIMED pairs, in batches of 32 and one sentence after another, in three
rounds in which the ways alternate; ratios are to greedy decoding in the same round, and their median is reported.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import record

from soli.engine.beam_search import BeamSearchParams
from soli.engine.text_model import TextModel, open_text_model
from soli.eval.translation import Language, Translator, translation_quality

DIRECTIONS: tuple[Language, Language] = ("zh", "en")  # what is translated to
BATCHES = {"batches of 32": 32, "one by one": 1}
ROUNDS = 3
Ways = dict[str, BeamSearchParams | None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--source", help="take the pairs of this source alone")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--beams", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--length-penalties", type=float, nargs="*", default=[0.6])
    parser.add_argument("--timed", type=int, default=100)
    parser.add_argument("--output", help="name of the JSON in results/")
    arguments = parser.parse_args()
    text_model = open_text_model(arguments.model)
    lines = [line.split("\t") for line in arguments.pairs.read_text(encoding="utf-8").splitlines()]
    pairs = [(zh, en) for source, zh, en in lines if arguments.source in (None, source)]
    pairs = random.Random(0).sample(pairs, min(arguments.count, len(pairs)))
    ways: Ways = {"greedy": None}
    for beams in arguments.beams:
        for penalty in arguments.length_penalties:
            ways[f"{beams} beams, length penalty {penalty:g}"] = BeamSearchParams(beams, penalty)
    rows = {way: quality(text_model, pairs, way, search) for way, search in ways.items()}
    if arguments.timed:
        for way, ratios in time_ratios(text_model, pairs[: arguments.timed], ways).items():
            rows[way].update(ratios)
            print(f"{way}: {ratios}", flush=True)
    if arguments.output:
        size = {"model": arguments.model, "pairs": len(pairs), "source": arguments.source, "timed": arguments.timed}
        table = [{"decoding": way} | row for way, row in rows.items()]
        record.write(arguments.output, {"hardware": record.hardware(), "size": size, "rows": table})


def quality(
    text_model: TextModel, pairs: Sequence[tuple[str, str]], way: str, search: BeamSearchParams | None
) -> dict[str, float]:
    row: dict[str, float] = {}
    for to in DIRECTIONS:
        sources = [en if to == "zh" else zh for zh, en in pairs]
        references = [zh if to == "zh" else en for zh, en in pairs]
        translations = [one.text for one in Translator(text_model, to, beam_search=search).translate(sources)]
        scores = translation_quality(translations, references, to)
        row.update({f"to {to}, chrF": scores.chrf, f"to {to}, BLEU": scores.bleu})
        print(f"to {to}, {way}: chrF {scores.chrf:.2f}, BLEU {scores.bleu:.2f}", flush=True)
    return row


def time_ratios(text_model: TextModel, pairs: Sequence[tuple[str, str]], ways: Ways) -> dict[str, dict[str, float]]:
    """For each way and batch size the median seconds, and the median ratio to greedy decoding."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(ROUNDS):
        for batches, size in BATCHES.items():
            for way, search in ways.items():
                translator = Translator(text_model, "zh", batch_size=size, beam_search=search)
                start = time.perf_counter()
                for _ in translator.translate(en for _, en in pairs):
                    pass
                seconds.setdefault((way, batches), []).append(time.perf_counter() - start)
    rows: dict[str, dict[str, float]] = {way: {} for way in ways}
    for (way, batches), measured in seconds.items():
        ratios = [mine / greedy for mine, greedy in zip(measured, seconds["greedy", batches], strict=True)]
        rows[way][f"{batches}, seconds"] = statistics.median(measured)
        rows[way][f"{batches}, times greedy"] = statistics.median(ratios)
    return rows


if __name__ == "__main__":
    main()
