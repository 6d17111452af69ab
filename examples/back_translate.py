"""Back-translation: a model translates sentences that have no translation, and those that it can translate back become
training pairs (Sennrich et al., 2016, arXiv 1511.06709).

    python examples/back_translate.py SENTENCES.txt pairs.tsv
    soli data build nano-zh-en --extra pairs.tsv --set data.directions.back-translated=en-zh

SENTENCES.txt has a sentence per line, all of one language, and pairs.tsv gets source, Chinese and English between tabs.
A model that is trained on them reads the model's sentence and predicts the one that a person wrote: `en-zh` for Chinese
sentences, `zh-en` for English ones.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from soli import LLM
from soli.data.tsv import write_tsv
from soli.engine.text_model import TextModel
from soli.errors import SoliError
from soli.input_files import read_text
from soli.train.losses import token_nll


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentences", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--least", type=float, default=-2.6, help="mean log-probability of a sentence translated back")
    parser.add_argument("--source", default="back-translated", help="the name in the pairs")
    arguments = parser.parse_args()
    sentences = read_text(arguments.sentences).split("\n")
    sentences = list(dict.fromkeys(" ".join(line.split()) for line in sentences if line.strip()))
    llm = LLM(arguments.model)
    rows = []
    for translation in llm.translate(sentences, beam_width=arguments.beams):
        # `to` is None for a line without letters, which stays as it is.
        if translation.to is None or repeats_itself(translation.text):
            continue
        back = "zh" if translation.to == "en" else "en"
        if log_probability(llm.text_model, translation.text, translation.source, back) >= arguments.least:
            sides = {translation.to: translation.text, back: translation.source}
            rows.append((arguments.source, sides["zh"], sides["en"]))
    write_tsv(arguments.pairs, rows)
    print(f"{len(rows):,} of {len(sentences):,} sentences", file=sys.stderr)
    llm.close()


def repeats_itself(text: str, length: int = 3) -> bool:
    """Whether so many successive words occur twice."""
    words: Sequence[str] = re.findall(r"[a-z']+|[\u3400-\u9fff]", text.lower())
    runs = [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]
    return len(set(runs)) < len(runs)


@torch.inference_mode()
def log_probability(text_model: TextModel, text: str, translation: str, to: str) -> float:
    """Mean natural logarithm of the probability of the translation's tokens, its end included."""
    model, tokenizer = text_model.model, text_model.tokenizer
    prompt = tokenizer.translation_prompt(text, to)
    ids_1T = torch.tensor([[*prompt, *tokenizer.encode(translation), tokenizer.eos_id]])
    if ids_1T.shape[1] > text_model.positions:
        return float("-inf")
    hidden_1TD = model.backbone(ids_1T[:, :-1]).hidden_BTD[:, len(prompt) - 1 :]
    return -token_nll(hidden_1TD, model.lm_head.weight, ids_1T[:, len(prompt) :]).mean().item()


if __name__ == "__main__":
    try:
        main()
    except (OSError, SoliError) as error:
        sys.exit(f"back_translate.py: {error}")
