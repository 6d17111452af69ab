"""Tokens per second of greedy generation: Soli beside transformers' DeepseekV3ForCausalLM, from the same folder.

Both load one bf16 folder in the same dtype and continue the same random prompts through their own `generate`. Prefill
is the time to the first token; decoding is the time of the rest. transformers runs with each of its experts
implementations, and the ratio is against the best (batched_mm copies the weights for every token, so it is spared
batch 16, where it is slowest by far). In float32 all must give the same tokens.

    python benchmarks/generate.py [--model nano]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import record

IMPLEMENTATIONS = {1: ("eager", "batched_mm", "grouped_mm"), 16: ("eager", "grouped_mm")}  # by batch
DTYPES = ("float32", "bfloat16")
PROMPT, NEW = 64, 64
Ids = list[list[int]]
Continue = Callable[[Ids, int], Ids]  # prompts and how many tokens more, to the new tokens
Side = Callable[..., Any]  # see `build`


def save_folder(model: str, folder: Path) -> None:
    """The measured model as a bf16 folder: `random` is nano's shape with random weights, else a folder or name."""
    import torch

    import soli
    from soli.model import Transformer

    if model == "random":
        network = Transformer(soli.preset("nano"), dtype=torch.bfloat16)
        network.init_weights(torch.Generator().manual_seed(0))
    else:
        network = soli.load_model(model, dtype=torch.bfloat16)
    soli.save_model(network, folder, format="bf16")


def soli_side(folder: Path, dtype: str) -> Continue:
    import torch

    import soli
    from soli.checkpoint import open_checkpoint
    from soli.data.tokenizer import Tokenizer
    from soli.engine.engine import Engine
    from soli.engine.offline import answer_all, limits_for
    from soli.engine.request import Request
    from soli.engine.text_model import TextModel

    model = soli.load_model(folder, dtype=getattr(torch, dtype))
    tokenizer = Tokenizer.from_folder(open_checkpoint("nano").folder)  # every measured model has its vocabulary
    text_model = TextModel(model, tokenizer, frozenset(), ())

    def run(prompts: Ids, new: int) -> Ids:
        engine = Engine(text_model, limits_for(text_model, len(prompts), PROMPT + new))
        answers = answer_all(engine, [Request(tuple(prompt), new) for prompt in prompts])
        return [list(answer.ids) for answer in answers if answer is not None]

    return run


def peer_side(folder: Path, dtype: str, implementation: str) -> Continue:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # it lists the MTP module, which it does not load
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation=implementation).eval()
    model.generation_config.eos_token_id = None  # exactly as many tokens as asked for

    @torch.inference_mode()
    def run(prompts: Ids, new: int) -> Ids:
        ids_BT = torch.tensor(prompts)
        mask_BT = torch.ones_like(ids_BT)
        ids_BS = model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=new, do_sample=False, pad_token_id=0)
        return ids_BS[:, PROMPT:].tolist()

    return run


def build(folder: Path, dtype: str, implementation: str | None) -> Side:
    """A contender, for `record.alone`: asked with prompts, it gives NEW tokens for each, or (prefill, decode)."""
    run = soli_side(folder, dtype) if implementation is None else peer_side(folder, dtype, implementation)

    def answer(prompts: Ids, speed: bool) -> Any:
        if not speed:
            return run(prompts, NEW)
        start = time.process_time()
        run(prompts, 1)
        first = time.process_time() - start
        run(prompts, NEW)
        rest = time.process_time() - start - 2 * first
        return len(prompts) * PROMPT / first, len(prompts) * (NEW - 1) / rest

    return answer


def draw_prompts(batch: int, vocab: int) -> Ids:
    import torch

    return torch.randint(16, vocab, (batch, PROMPT), generator=torch.Generator().manual_seed(batch)).tolist()


def check_same(sides: Mapping[str, Side], prompts: Ids) -> None:
    """In float32 every contender must give Soli's tokens, or the comparison is of different work."""
    expected = sides["soli"](prompts, False)
    for name, side in sides.items():
        if side(prompts, False) != expected:
            sys.exit(f"{name} and soli give different float32 tokens at batch {len(prompts)}: nothing was recorded")


def compare(sides: Mapping[str, Side], prompts: Ids, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """The prefill and the decode row of one dtype and batch."""
    if dtype == "float32":
        check_same(sides, prompts)
    prefill: dict[str, list[float]] = {name: [] for name in sides}

    def contender(name: str) -> Callable[[], float]:
        def measure() -> float:
            first, rest = sides[name](prompts, True)
            prefill[name].append(first)
            return rest

        return measure

    decode = record.interleaved({name: contender(name) for name in sides}, rounds)
    prefill = {name: values[1:] for name, values in prefill.items()}  # without the warm-up round
    rows = []
    for what, speeds in (("prefill", prefill), ("decode", decode)):
        peers = {name: values for name, values in speeds.items() if name != "soli"}
        label = f"{what}, nano, {dtype}, batch {len(prompts)}"
        rows.append(record.row(label, "tokens/s", speeds["soli"], peers))
    return rows


def main() -> None:
    parser = record.parser(__doc__, rounds=5)
    parser.add_argument("--model", default="random", help="random (default): nano's shape; or nano; or a folder")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as holder:
        folder = Path(holder) / "model"
        save_folder(arguments.model, folder)
        from soli.config import load_config

        vocab = load_config(folder).vocab_size
        for dtype in DTYPES:
            with ExitStack() as stack:
                sides = {"soli": stack.enter_context(record.alone(build, folder, dtype, None))}
                for name in IMPLEMENTATIONS[1]:
                    sides[f"transformers {name}"] = stack.enter_context(record.alone(build, folder, dtype, name))
                for batch, names in IMPLEMENTATIONS.items():
                    record.progress(f"{dtype}, batch {batch}")
                    contenders = {name: sides[name] for name in ("soli", *(f"transformers {n}" for n in names))}
                    rows += compare(contenders, draw_prompts(batch, vocab), dtype, arguments.rounds)
    size = {"model": arguments.model, "prompt": PROMPT, "new": NEW, "rounds": arguments.rounds}
    record.finish("generate", size | {"same_float32_tokens": True}, rows)  # check_same would have ended the run


if __name__ == "__main__":
    main()
