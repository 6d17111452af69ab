"""Beam search beside greedy decoding of translations, on held-out pairs.

    python benchmarks/decoding.py PAIRS.tsv [--model nano] [--source NAME] [--count 250] [--beams 2 4] [--output NAME]

PAIRS has a source's name, Chinese and English in a line each, as `soli data build` writes heldout.tsv. Beam search
keeps the WIDTH likeliest beginnings of each length, and of the texts that ended takes the one whose log-probability
over its length to the power ALPHA is highest. Whole texts are computed at every step, without a cache: what is measured
is quality, by chrF and BLEU of sacrebleu.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import record
import torch

from soli.engine.text_model import TextModel, open_text_model
from soli.eval.translation import Language, Translator, one_line, translation_quality, translation_request

ALPHAS = (0.0, 0.6, 1.0)
DIRECTIONS: tuple[Language, Language] = ("zh", "en")  # what is translated to
Ended = list[tuple[float, list[int]]]  # log-probability and tokens of the texts that ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--source", help="take the pairs of this source alone")
    parser.add_argument("--count", type=int, default=250)
    parser.add_argument("--beams", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--output", help="name of the JSON in results/")
    arguments = parser.parse_args()
    text_model = open_text_model(arguments.model)
    lines = [line.split("\t") for line in arguments.pairs.read_text(encoding="utf-8").splitlines()]
    pairs = [(zh, en) for source, zh, en in lines if arguments.source in (None, source)]
    pairs = random.Random(0).sample(pairs, min(arguments.count, len(pairs)))
    rows: dict[str, dict[str, float]] = {}
    for to in DIRECTIONS:
        sources = [en if to == "zh" else zh for zh, en in pairs]
        references = [zh if to == "zh" else en for zh, en in pairs]
        texts = {"greedy": [one.text for one in Translator(text_model, to).translate(sources)]}
        for width in arguments.beams:
            ended = [beam_search(text_model, source, to, width) for source in sources]
            for alpha in ALPHAS:
                texts[f"beam {width}, alpha {alpha}"] = [best(text_model, one, alpha) for one in ended]
        for way, translations in texts.items():
            quality = translation_quality(translations, references, to)
            rows.setdefault(way, {}).update({f"to {to}, chrF": quality.chrf, f"to {to}, BLEU": quality.bleu})
            print(f"to {to}, {way}: chrF {quality.chrf:.2f}, BLEU {quality.bleu:.2f}", flush=True)
    if arguments.output:
        size = {"model": arguments.model, "pairs": len(pairs), "source": arguments.source}
        table = [{"decoding": way} | row for way, row in rows.items()]
        record.write(arguments.output, {"hardware": record.hardware(), "size": size, "rows": table})


@torch.inference_mode()
def beam_search(text_model: TextModel, source: str, to: Language, width: int) -> Ended:
    """Texts that ended, of the `width` likeliest of each length; ends when `width` of them have."""
    prompt, limit = translation_request(text_model, source, to)
    scores_W, texts, ended = torch.zeros(1), [[]], []
    stop_ids = sorted(text_model.stop_ids)
    for _ in range(limit):
        ids_WT = torch.tensor([prompt + text for text in texts])
        logits_WV = text_model.model.head(text_model.model.backbone(ids_WT).hidden_BTD[:, -1])
        totals_WV = scores_W[:, None] + logits_WV.float().log_softmax(-1)
        ended += [(float(totals_WV[row, stop]), text) for row, text in enumerate(texts) for stop in stop_ids]
        ended = sorted(ended, reverse=True)[: 2 * width]
        totals_WV[:, stop_ids] = float("-inf")
        scores_W, places_W = totals_WV.flatten().topk(width)
        rows = [divmod(place, totals_WV.shape[1]) for place in places_W.tolist()]
        texts = [[*texts[row], token] for row, token in rows]
        if len(ended) >= width and float(scores_W[0]) < ended[width - 1][0]:  # none can come before `width` others
            break
    return ended


def best(text_model: TextModel, ended: Ended, alpha: float) -> str:
    """The text of the highest log-probability over length (the end counts) to the power alpha."""
    _, tokens = max(ended, key=lambda one: one[0] / (len(one[1]) + 1) ** alpha)
    return one_line(text_model.tokenizer.decode(tokens))


if __name__ == "__main__":
    main()
