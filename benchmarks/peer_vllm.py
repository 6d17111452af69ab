"""vLLM's side of contenders.py, run by the Python that has vLLM: questions as JSON lines, answers "ANSWER {…}".

    python benchmarks/peer_vllm.py FOLDER

Its CPU kernel for latent attention takes a latent of 512 and a rope key of 64 alone; other shapes run without it.
"""

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # this Python has no soli of its own

from soli.serve.load_generator import TokenTimes, arrivals, drive_engine


def main() -> None:
    folder = Path(sys.argv[1])
    shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (shape["kv_lora_rank"], shape["qk_rope_head_dim"]) != (512, 64):
        os.environ["VLLM_MLA_DISABLE"] = "1"
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    model = LLM(
        str(folder), dtype="bfloat16", max_model_len=1024, enable_prefix_caching=False, max_num_seqs=16,
        max_num_batched_tokens=2048, seed=0,
    )  # fmt: skip

    def prompt_of(length: int) -> dict[str, list[int]]:
        return {"prompt_token_ids": random.choices(range(2, shape["vocab_size"]), k=length)}

    def wanted(new: int, **more: Any) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False, **more)

    def seconds(count: int, length: int, new: int) -> float:
        prompts = [prompt_of(length) for _ in range(count)]
        start = time.perf_counter()
        model.generate(prompts, wanted(new), use_tqdm=False)
        return time.perf_counter() - start

    def under_load(length: int, new: int, rate: float, count: int, seed: int) -> TokenTimes:
        engine = model.llm_engine

        def add(number: int) -> None:
            engine.add_request(str(number), prompt_of(length), wanted(new, output_kind=RequestOutputKind.DELTA))

        def step() -> list[int]:
            return [int(one.request_id) for one in engine.step() for _ in one.outputs[0].token_ids]

        return drive_engine(arrivals(rate, count, random.Random(seed)), new, add, step)

    def answer(question: str, prompt: int, new: int, prefill: int, batch: int, **more: Any) -> Any:
        if question == "load":
            return under_load(prompt, new, **more)
        if question == "batch":
            return batch * new / seconds(batch, prompt, new)
        if question == "prefill":
            return prefill / seconds(1, prefill, 1)
        first = seconds(1, prompt, 1)
        return new / (seconds(1, prompt, new + 1) - first)

    print("ANSWER {}", flush=True)
    for line in sys.stdin:
        print("ANSWER", json.dumps({"value": answer(**json.loads(line))}), flush=True)


if __name__ == "__main__":
    main()
