"""How often experts are in a cache of a stated size, by policy: over real routing, and over synthetic traces of large
models' shapes.

    python benchmarks/expert_policies.py --english FILE --chinese FILE [--only nano] [--tokens 1500]
    python benchmarks/expert_policies.py --table

Real: the bundled model reads texts, a line each, of either language and of both in turn. Synthetic: a layer's expert
has a score, SKEW times the negative logarithm of its rank, which is the layer's own; to it come a part per domain,
where a text's domain changes every 200 tokens or so, and a hidden state that decays by LOCALITY per token, both normal;
the K largest after Gumbel noise are chosen. "repeats" is set to what others measured over real routing, 24 of 64 slots
a layer: LRU 68 %, the best possible 84 %. "informed" evicts by these scores, which no policy can see: what is left
from there to the best possible is the noise, which nothing predicts.

A hit rate counts what a token's layers choose, decoded one token at a time, after a quarter of the tokens filled the
cache. Nothing is timed; some minutes for each shape.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import record
from numpy.typing import NDArray

from soli.experts.policy import POLICIES, Frequency
from soli.experts.replay import BELADY, gained, replay
from soli.experts.trace import ExpertTrace

RESULT = "expert_policies"
NOTE = (
    "Share of chosen experts that are in the cache. In brackets the part of the distance from LRU, whose slots are "
    "shared out to the layers, to the best possible order of evictions."
)
REAL_SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)


class Shape(NamedTuple):
    """A model's layers with experts, experts of each, and those chosen; cache sizes in tokens' experts."""

    layers: int
    experts: int
    chosen: int
    sizes: Sequence[float]


class Kind(NamedTuple):
    """How synthetic tokens choose; see above."""

    skew: float
    locality: float
    hidden: float  # standard deviation of the hidden state
    domains: int


SHAPES = {
    "16B-A3B": Shape(26, 64, 6, (1, 2, 4, 7)),
    "DeepSeek-V3": Shape(58, 256, 8, (1, 4, 16)),
    "Kimi-K2": Shape(60, 384, 8, (1, 4, 16)),
}
KINDS = {
    "repeats": Kind(0.5, 0.9, 1.5, 1),
    "domains": Kind(0.7, 0.0, 0.0, 4),
    "independent": Kind(1.0, 0.0, 0.0, 1),
}
DOMAIN_TOKENS = 200
DOMAIN_DEVIATION = 1.5


def synthetic(shape: Shape, kind: Kind, tokens: int, seed: int = 0) -> tuple[ExpertTrace, NDArray[np.float32]]:
    """A trace, and the scores (T, L, E) that each token's successor is drawn from, as far as the token determines
    them."""
    rng = np.random.default_rng(seed)
    L, E, K, _ = shape
    own_LE = -kind.skew * np.log1p(np.stack([rng.permutation(E) for _ in range(L)]))
    deviation = DOMAIN_DEVIATION if kind.domains > 1 else 0.0
    of_domain_NLE = deviation * rng.normal(size=(kind.domains, L, E))
    hidden_LE = rng.normal(size=(L, E))
    ids_TLK = np.empty((tokens, L, K), np.int64)
    next_TLE = np.empty((tokens, L, E), np.float32)
    domain = 0
    for at in range(tokens):
        if rng.random() < 1 / DOMAIN_TOKENS:
            domain = int(rng.integers(kind.domains))
        hidden_LE = kind.locality * hidden_LE + (1 - kind.locality**2) ** 0.5 * rng.normal(size=(L, E))
        scores_LE = own_LE + of_domain_NLE[domain] + kind.hidden * hidden_LE
        ids_TLK[at] = np.argsort(-(scores_LE + rng.gumbel(size=(L, E))), axis=1)[:, :K]
        next_TLE[at] = scores_LE - (1 - kind.locality) * kind.hidden * hidden_LE
    return ExpertTrace(ids_TLK, E), next_TLE


def informed(next_TLE: NDArray[np.float32]) -> type[Frequency]:
    """The policy that knows the scores that a synthetic trace is drawn from."""

    class Informed(Frequency):
        FEW_LAYERS = 10**6  # every use counts at once

        def _estimate(self, layers: list[int]) -> NDArray[np.float64]:
            values: NDArray[np.float64] = next_TLE[self._tokens_L[layers].astype(int) - 1, layers].astype(np.float64)
            return values

    return Informed


def real_traces(english: Path, chinese: Path, tokens: int) -> Iterator[tuple[str, ExpertTrace]]:
    from soli.engine.text_model import open_text_model
    from soli.eval.expert_trace import record_experts

    text_model = open_text_model("nano")
    texts = {
        name: [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        for name, file in (("English", english), ("Chinese", chinese))
    }
    texts["both in turn"] = [text for pair in zip(*texts.values(), strict=False) for text in pair]
    for name, lines in texts.items():
        yield f"nano, {name}", record_experts(text_model, lines, expert_bytes=0, max_tokens=tokens)


def measured(what: str, trace: ExpertTrace, slots: int, policies: Sequence[str]) -> dict[str, Any]:
    """A row: hit rates by policy, and the part of the distance from LRU to the best possible."""
    skip = len(trace.expert_ids_TLK) // 4
    rates = {name: replay(trace, name, slots, skip).hit_rate for name in policies}
    distance = {name: gained(rate, rates["lru"], rates[BELADY]) for name, rate in rates.items()}
    T, L, K = trace.expert_ids_TLK.shape
    row = {
        "what": f"{what}, {slots} slots",
        "trace": what,
        "shape": {"tokens": T, "layers": L, "experts": trace.experts, "chosen": K},
        "slots": slots,
        "of_all": record.rounded(slots / trace.all_experts),
        "of_demand": record.rounded(slots / trace.demand),
        "hit_rates": {name: round(rate, 4) for name, rate in rates.items()},
        "of_distance": {name: None if part is None else round(part, 3) for name, part in distance.items()},
    }
    record.progress(line(row))
    return row


def line(row: dict[str, Any]) -> str:
    rates = [
        f"{name} {rate:.1%}" + ("" if row["of_distance"][name] is None else f" ({row['of_distance'][name]:.2f})")
        for name, rate in row["hit_rates"].items()
    ]
    return f"{row['trace']}, {row['of_demand']:.3g} x a token's experts, {row['of_all']:.1%} of all: {', '.join(rates)}"


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    names = [*POLICIES, BELADY]
    if not arguments.only or "nano" in arguments.only:
        for what, trace in real_traces(arguments.english, arguments.chinese, arguments.tokens):
            for share in REAL_SHARES:
                yield measured(what, trace, int(share * trace.all_experts), names)
    for shape_name, shape in SHAPES.items():
        for kind_name, kind in KINDS.items():
            if arguments.only and shape_name not in arguments.only:
                continue
            trace, next_TLE = synthetic(shape, kind, arguments.synthetic_tokens)
            POLICIES["informed"] = informed(next_TLE)
            for size in shape.sizes:
                slots = int(size * trace.demand)
                yield measured(f"{shape_name}, {kind_name}", trace, slots, [*names[:-1], "informed", BELADY])


def print_table() -> None:
    """The recorded rows in Markdown."""
    result = record.load(record.RESULTS / f"{RESULT}.json")
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["hit_rates"]))
    print(f"| trace | cache, tokens' experts | of all | {' | '.join(names)} |\n|---|--:|--:|{'--:|' * len(names)}")
    for row in result["rows"]:
        cells = []
        for name in names:
            part = row["of_distance"].get(name)
            rate = row["hit_rates"].get(name)
            shown = "" if part is None or name in ("lru", BELADY) else f" ({part:.2f})"
            cells.append("" if rate is None else f"{100 * rate:.1f} %{shown}")
        print(f"| {row['trace']} | {row['of_demand']:.3g} | {100 * row['of_all']:.0f} % | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--english", type=Path, help="a text file, a text per line")
    parser.add_argument("--chinese", type=Path, help="the same in Chinese")
    parser.add_argument("--tokens", type=int, default=2000, help="of each real trace (default 2000)")
    parser.add_argument("--synthetic-tokens", type=int, default=400, help="of each synthetic trace (default 400)")
    parser.add_argument("--only", nargs="*", choices=("nano", *SHAPES), help="these alone")
    parser.add_argument("--table", action="store_true", help="print what was recorded")
    arguments = parser.parse_args()
    if arguments.table:
        print_table()
        return
    if (not arguments.only or "nano" in arguments.only) and not (arguments.english and arguments.chinese):
        parser.error("the traces of nano need --english and --chinese")
    size = {"tokens": arguments.tokens, "synthetic_tokens": arguments.synthetic_tokens}
    for row in rows(arguments):
        record.merge(RESULT, NOTE, size, [row], threads=1)


if __name__ == "__main__":
    main()
