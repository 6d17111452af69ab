"""Tokens per second of the engine with and without drafts by the model's own MTP module, on the bundled model.

The same English sentences are translated greedily by both, in batches of 1, 4 and 16; both must give the same tokens. A
step with drafts reads two tokens for each request, and the module reads one more, so it pays where reading a second
token costs little: where weights are read from memory once for both.

    python benchmarks/speculation.py
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import record

SENTENCES = (
    "Open the file and save it under another name.",
    "The river runs to the sea.",
    "He told them that the king was dead.",
    "Select the text that you want to copy.",
    "Please close the door when you leave the room.",
    "The program could not be started.",
    "In the beginning there was light.",
    "What do you want to eat tonight?",
)
BATCHES = (1, 4, 16)
DTYPES = ("float32", "bfloat16")


def build(dtype: str, speculate: bool) -> Callable[[int], Any]:
    """A contender, for `record.alone`: given a batch size, it returns (tokens, tokens/s, acceptance)."""
    from soli.engine.engine import Engine
    from soli.engine.request import EngineLimits, Request
    from soli.engine.text_model import open_text_model

    model = open_text_model("nano", dtype=dtype, mtp=True)
    prompts = [tuple(model.tokenizer.translation_prompt(text, "zh")) for text in SENTENCES]

    def answer(batch: int) -> Any:
        limits = EngineLimits(cache_bytes=2**26, max_running=batch, prefix_sharing=False, speculate=speculate)
        engine = Engine(model, limits)
        requests = [
            Request(prompt, 64, stop_ids=model.stop_ids) for prompt in prompts * max(1, batch // len(prompts))
        ]
        tokens: dict[int, list[int]] = {engine.add(request): [] for request in requests}
        start = time.process_time()
        while engine.has_work:
            for event in engine.step():
                if event.token is not None:
                    tokens[event.request_id].append(event.token)
        seconds = time.process_time() - start
        stats = engine.stats()
        accepted = stats.accepted / stats.drafted if stats.drafted else 0.0
        return list(tokens.values()), sum(map(len, tokens.values())) / seconds, accepted

    return answer


def main() -> None:
    arguments = record.parser(__doc__, rounds=7).parse_args()
    rows: list[dict[str, Any]] = []
    acceptance: dict[str, float] = {}
    for dtype in DTYPES:
        with record.alone(build, dtype, False) as plain, record.alone(build, dtype, True) as drafting:
            for batch in BATCHES:
                without_drafts = plain(batch)
                with_drafts = drafting(batch)
                if dtype == "float32" and without_drafts[0] != with_drafts[0]:
                    sys.exit(f"drafts changed the tokens of batch {batch}: nothing was recorded")
                acceptance[f"{dtype}, batch {batch}"] = record.rounded(with_drafts[2])
                sides = {"soli": lambda n=batch: drafting(n)[1], "without": lambda n=batch: plain(n)[1]}
                measured = record.interleaved(sides, arguments.rounds)
                what = f"translating with drafts, nano, {dtype}, batch {batch}"
                row = record.row(what, "tokens/s", measured["soli"], {"without drafts": measured["without"]})
                rows.append(row)
    size = {"sentences": len(SENTENCES), "acceptance": acceptance, "rounds": arguments.rounds}
    record.finish("speculation", size, rows)


if __name__ == "__main__":
    main()
