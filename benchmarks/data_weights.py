"""The weights of nano-zh-en's sources, compared by small models trained on equally many tokens of each mixture.

Every mixture is drawn from one corpus (soli data build nano-zh-en) with one tokenizer, and trains the same small
mixture of experts from the same first weights. The measure is bits per UTF-8 byte of the translation given the source
text, on held-out pairs by domain; so it can also compare vocabularies. A run repeats no text often: what many epochs of
a small source do to a model is not measured here.

    python benchmarks/data_weights.py --data data/nano-zh-en --tokens 1000000 [--mixture everyday-4 ...]
    python benchmarks/data_weights.py --table

Runs that the results file already holds with the same tokens are left out. One thread; some minutes a mixture.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import record
import torch

from soli.analysis.parameters import count, training_flops
from soli.data.documents import Document, Pair, encode_by_source, encode_documents, pair_documents
from soli.data.recipe import load_recipe
from soli.data.token_files import write_meta, write_tokens
from soli.data.tokenizer import Tokenizer
from soli.data.tsv import read_tsv
from soli.eval.scoring import score_sequences
from soli.model.transformer import Transformer
from soli.recipes import read_data_config
from soli.recipes.nano_corpus.config import CorpusConfig
from soli.recipes.nano_corpus.mixture import mix
from soli.recipes.nano_corpus.splitting import Line
from soli.train.settings import TrainSettings, read_settings
from soli.train.setup import prepare
from soli.train.trainer import take_step

RESULT = "data_weights"
PAIRS_PER_DOMAIN = 300
MODEL = {
    "model_type": "deepseek_v3", "vocab_size": 6144, "hidden_size": 128, "num_hidden_layers": 3,
    "first_k_dense_replace": 1, "intermediate_size": 384, "moe_intermediate_size": 96, "n_routed_experts": 16,
    "n_shared_experts": 1, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "num_nextn_predict_layers": 0,
    "num_attention_heads": 4, "q_lora_rank": None, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
    "v_head_dim": 32, "initializer_range": 0.02, "max_position_embeddings": 512,
}  # fmt: skip

DOCUMENTATION = ("libreoffice-help", "libreoffice-help-tw", "gnome-user-docs", "debmake-doc", "python-docs-gh")
DOMAINS: dict[str, tuple[str, ...]] = {
    "everyday": ("everyday",),
    "sentences": ("tatoeba-gh", "hsk-sentences", "distilled"),
    "game": ("cataclysm-dda-data",),
    "documentation": DOCUMENTATION,
    "cloud API": ("tencentcloud-sdk",),
    "dictionary": ("cc-cedict",),
    "Bible": ("bible-web", "bible-bbe"),
}
OTHERS = "interface"  # the domain of every source that DOMAINS does not name

BEFORE = {
    "cc-cedict": 0.3, "cataclysm-dda-data": 3.0, "bible-web": 0.6, "bible-bbe": 0.6,
    "libreoffice-help": 2.0, "homeassistant": 2.0, "gnome-user-docs": 2.0,
}  # fmt: skip
EVERYDAY = ("tatoeba-gh", "hsk-sentences", "xquad-gh", "distilled")
ONE_LANGUAGE = (
    "python3.11-doc (en)", "postgresql-doc-15 (en)", "wordnet-base (en)", "janeausten (en)", "dict-devil (en)",
    "libreoffice-help (en)", "chinese-poetry (zh)", "sanguo-yanyi (zh)", "libreoffice-help (zh)",
)  # fmt: skip
LESS = {"cc-cedict": 0.15, "tencentcloud-sdk": 0.2, "bible-web": 0.15, "bible-bbe": 0.15}
EVERYDAY_4 = dict.fromkeys(EVERYDAY, 4.0)
LESS_GAME = EVERYDAY_4 | LESS | {"cataclysm-dda-data": 1.5}
LESS_PROSE = LESS_GAME | dict.fromkeys(ONE_LANGUAGE, 0.25)
MIXTURES: dict[str, dict[str, float]] = {
    "before": {},
    "everyday-4": EVERYDAY_4,
    "less-prose": LESS_PROSE,
    "everyday-8": LESS_PROSE | dict.fromkeys(EVERYDAY, 8.0),
    "less-game": LESS_GAME,
}


def settings_for(tokens: int, vocab_size: int) -> TrainSettings:
    """The small model's run: rates and shares of the schedule as in the recipe, steps of 4,096 tokens."""
    whole, warmup, constant = (round(tokens * share / 4096) * 4096 for share in (1, 0.04, 0.5))
    schedule = {
        "sequence_length": 128, "batch_sequences": 32, "learning_rate": 5e-3, "final_learning_rate": 2e-4,
        "warmup_tokens": warmup, "constant_tokens": constant, "cosine_tokens": whole - warmup - constant,
    }  # fmt: skip
    return read_settings(
        {
            "model": MODEL | {"vocab_size": vocab_size},
            "optimizer": {"name": "muon", "router_rate": 0.1},
            "schedule": schedule,
            "balance": {"gamma": 1e-3, "alpha": 1e-4},
            "run": {"micro_sequences": 32, "save_every": 0},
            "eval": {"tokens": 4096, "samples": 0},
        }
    )


def pack_mixture(corpus: Path, config: CorpusConfig, tokenizer: Tokenizer, tokens: int, folder: Path) -> dict[str, Any]:
    """train.bin with the first `tokens` tokens of an epoch of the mixture; tokens by source, and of a whole epoch."""
    pairs = [Pair(*row) for row in read_tsv(corpus / "pairs.tsv", 3)]
    lines = [Line(*row) for row in read_tsv(corpus / "mono.tsv", 3)]
    documents = mix(pairs, lines, config)
    tokenizer.save(folder)
    train = write_tokens(folder / "train.bin", up_to(tokens, encode_by_source(documents, tokenizer)))
    valid = write_tokens(folder / "valid.bin", encode_by_source(documents[-1000:], tokenizer))
    write_meta(folder, tokenizer.vocab_size, config.seed, train, valid, config.fim_rate)
    return {name: row["tokens"] for name, row in train.items()}


def up_to(tokens: int, encoded: Iterable[tuple[str, list[int]]]) -> Iterator[tuple[str, list[int]]]:
    """Documents until they hold so many tokens."""
    remaining = tokens
    for source, ids in encoded:
        yield source, ids
        remaining -= len(ids)
        if remaining <= 0:
            return


def train(settings: TrainSettings, config: CorpusConfig, data: Path, folder: Path) -> Transformer:
    run = prepare(settings, {"fim_rate": config.fim_rate}, data, folder)
    while run.progress.tokens < settings.schedule.total_tokens:
        loss = take_step(run).loss
        if run.progress.step % 50 == 0:
            record.progress(f"{run.progress.tokens:,} tokens: {loss:.3f} nats per token")
    return run.model


def heldout_by_domain(corpus: Path) -> dict[str, list[Pair]]:
    """Held-out pairs of each domain, at most PAIRS_PER_DOMAIN evenly spaced ones; of the everyday sentences all."""
    domain_of = {source: domain for domain, sources in DOMAINS.items() for source in sources}
    domains: dict[str, list[Pair]] = {domain: [] for domain in (*DOMAINS, OTHERS)}
    for row in read_tsv(corpus / "heldout.tsv", 3):
        domains[domain_of.get(row[0], OTHERS)].append(Pair(*row))
    return {
        domain: pairs if domain == "everyday" else pairs[:: -(-len(pairs) // PAIRS_PER_DOMAIN)]
        for domain, pairs in domains.items()
    }


def bits_per_byte(model: Transformer, tokenizer: Tokenizer, documents: Sequence[Document]) -> float:
    """Bits of the second segment and the document's end, given what precedes, over the segment's UTF-8 bytes.

    The bits of the whole document less those of the document up to its second special token.
    """
    encoded = [ids for _, ids in encode_documents(documents, tokenizer)]
    marks = [tokenizer.token_id(document.segments[1][0]) for document in documents]
    prompts = [ids[: ids.index(mark) + 1] for ids, mark in zip(encoded, marks, strict=True)]
    bits = [sum(one.bits for one in score_sequences(model, ids, context=2)) for ids in (encoded, prompts)]
    return (bits[0] - bits[1]) / sum(len(document.segments[1][1].encode()) for document in documents)


def score(model: Transformer, tokenizer: Tokenizer, domains: dict[str, list[Pair]]) -> dict[str, dict[str, float]]:
    """Bits per byte of each domain and direction."""
    scores: dict[str, dict[str, float]] = {}
    for domain, pairs in domains.items():
        to_chinese, to_english = zip(*map(pair_documents, pairs), strict=True)
        scores[domain] = {
            "en-zh": bits_per_byte(model, tokenizer, to_chinese),
            "zh-en": bits_per_byte(model, tokenizer, to_english),
        }
    return scores


def measure(corpus: Path, name: str, tokens: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Train one mixture and score it."""
    config = read_data_config(load_recipe("nano-zh-en"))
    assert isinstance(config, CorpusConfig)
    config = dataclasses.replace(config, weights=BEFORE | MIXTURES[name])
    settings = settings_for(tokens, tokenizer.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        sources = pack_mixture(corpus, config, tokenizer, tokens, Path(folder))
        start = time.monotonic()
        model = train(settings, config, Path(folder), Path(folder) / "run").eval()
    size = count(settings.model)
    return {
        "mixture": name, "weights": config.weights, "tokens": tokens, "vocab_size": tokenizer.vocab_size,
        "parameters": size.total, "activated": size.activated,
        "flops": tokens * training_flops(settings.model, settings.schedule.sequence_length),
        "minutes": round((time.monotonic() - start) / 60, 1),
        "share": {name: round(amount / sum(sources.values()), 4) for name, amount in sorted(sources.items())},
        "bits_per_byte": score(model, tokenizer, heldout_by_domain(corpus)),
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Bits per byte, the mean of both directions, a row for each mixture."""
    domains = list(rows[0]["bits_per_byte"])
    lines = [f"| mixture | vocabulary | {' | '.join(domains)} |", "|---|--:|" + "--:|" * len(domains)]
    for row in rows:
        cells = [f"{sum(row['bits_per_byte'][domain].values()) / 2:.3f}" for domain in domains]
        lines.append(f"| {row['mixture']} | {row['vocab_size']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/nano-zh-en"), help="what soli data build left")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of each run (default 1,000,000)")
    parser.add_argument("--mixture", action="append", choices=MIXTURES, help="may be repeated; default: all")
    parser.add_argument("--tokenizer", type=Path, help="folder of another tokenizer (default: the corpus's own)")
    parser.add_argument("--table", action="store_true", help="print the recorded results alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    file = record.RESULTS / f"{RESULT}.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    tokenizer = Tokenizer.from_folder(options.tokenizer or options.data)
    finished = {(row["mixture"], row["tokens"], row["vocab_size"]) for row in rows}
    for name in () if options.table else options.mixture or MIXTURES:
        if (name, options.tokens, tokenizer.vocab_size) in finished:
            continue
        rows.append(measure(options.data, name, options.tokens, tokenizer))
        note = "Bits per byte of the translation given the source text, on held-out pairs; one seed."
        record.write(RESULT, {"hardware": record.hardware(), "note": note, "rows": rows})
        record.progress(f"{name}: {rows[-1]['bits_per_byte']['everyday']}, {rows[-1]['minutes']} minutes")
    if rows:
        print(table(rows))


if __name__ == "__main__":
    main()
