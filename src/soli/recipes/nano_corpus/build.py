"""The whole data step: corpus, tokenizer, mixture, packed tokens, in one folder that training reads.

Leaves pairs.tsv, mono.tsv, heldout.tsv, heldout_mono.tsv, counts.json, tokenizer.json, train.bin, valid.bin, meta.json.
meta.json comes last: a folder that has one is whole.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from soli.data.documents import ReportStep, encode_by_source
from soli.data.token_files import dtype_for, read_meta, write_meta, write_tokens
from soli.data.tokenizer import Tokenizer, tokenizer_folder
from soli.errors import SoliError
from soli.recipes.nano_corpus.config import CorpusConfig
from soli.recipes.nano_corpus.corpus import Corpus, build_corpus, write_corpus
from soli.recipes.nano_corpus.mixture import heldout_documents, mix
from soli.recipes.nano_corpus.sources.extra import read_extra


def build_data(
    config: CorpusConfig,
    out: Path,
    cache: Path,
    report: ReportStep,
    allow_missing: bool = False,
    extra: Sequence[Path] = (),
) -> dict[str, Any]:
    """Build everything into `out` and return meta.json's content. `extra`: files of a person's own pairs."""
    given_tokenizer(config)  # as the extra files, before anything is fetched or written
    extra_pairs = list(read_extra(extra))
    try:
        out.mkdir(parents=True, exist_ok=True)
        corpus = build_corpus(config, cache, report, allow_missing, extra=extra_pairs)
        (out / "meta.json").unlink(missing_ok=True)  # from here on the folder is between two states
        write_corpus(corpus, out)
        return write_token_files(corpus, config, out, report)
    except OSError as error:
        raise SoliError(f"cannot write {error.filename or out} ({error.strerror}): choose another --out") from error


def write_token_files(corpus: Corpus, config: CorpusConfig, out: Path, report: ReportStep) -> dict[str, Any]:
    """Tokenizer, train.bin, valid.bin and meta.json of a corpus."""
    tokenizer = given_tokenizer(config)
    if tokenizer is None:
        report("tokenizer", "learning")
        tokenizer = Tokenizer.train(tokenizer_sample(corpus, config), config.vocab_size)
    tokenizer.save(out)
    dtype = dtype_for(tokenizer.vocab_size)
    report("tokenizer", f"{tokenizer.vocab_size:,} entries")
    report("train.bin", "packing")
    train = write_tokens(out / "train.bin", encode_by_source(mix(corpus.pairs, corpus.mono, config), tokenizer), dtype)
    report("train.bin", f"{sum(row['tokens'] for row in train.values()):,} tokens")
    heldout = heldout_documents(corpus.heldout, corpus.heldout_mono)
    valid = write_tokens(out / "valid.bin", encode_by_source(heldout, tokenizer), dtype)
    report("valid.bin", f"{sum(row['tokens'] for row in valid.values()):,} tokens")
    write_meta(out, tokenizer.vocab_size, config.seed, train, valid, config.fim_rate, dtype)
    return read_meta(out)


def given_tokenizer(config: CorpusConfig) -> Tokenizer | None:
    """The tokenizer that the recipe names; None where one is learnt. SoliError for a folder without one."""
    return None if config.tokenizer is None else Tokenizer.from_folder(tokenizer_folder(config.tokenizer))


def tokenizer_sample(corpus: Corpus, config: CorpusConfig) -> Iterable[str]:
    """Training texts in the mixture's proportions, up to `tokenizer_characters`."""
    documents = mix(corpus.pairs, corpus.mono, config)
    random.Random(config.seed).shuffle(documents)
    room = config.tokenizer_characters
    for document in documents:
        for _, text in document.segments:
            room -= len(text)
            yield text
        if room <= 0:
            return
