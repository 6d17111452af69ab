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


def main() -> None:
    folder = Path(sys.argv[1])
    shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (shape["kv_lora_rank"], shape["qk_rope_head_dim"]) != (512, 64):
        os.environ["VLLM_MLA_DISABLE"] = "1"
    from vllm import LLM, SamplingParams

    model = LLM(
        str(folder), dtype="bfloat16", max_model_len=1024, enable_prefix_caching=False, max_num_seqs=16,
        max_num_batched_tokens=2048, seed=0,
    )  # fmt: skip

    def seconds(count: int, length: int, new: int) -> float:
        prompts = [{"prompt_token_ids": random.choices(range(2, shape["vocab_size"]), k=length)} for _ in range(count)]
        wanted = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        model.generate(prompts, wanted, use_tqdm=False)
        return time.perf_counter() - start

    def speed(question: str, prompt: int, new: int, prefill: int, batch: int) -> float:
        if question == "batch":
            return batch * new / seconds(batch, prompt, new)
        if question == "prefill":
            return prefill / seconds(1, prefill, 1)
        first = seconds(1, prompt, 1)
        return new / (seconds(1, prompt, new + 1) - first)

    print("ANSWER {}", flush=True)
    for line in sys.stdin:
        print("ANSWER", json.dumps({"tokens_per_second": speed(**json.loads(line))}), flush=True)


if __name__ == "__main__":
    main()
