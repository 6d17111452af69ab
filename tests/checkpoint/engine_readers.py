"""What vLLM and SGLang read of model folders, printed as JSON; run by an interpreter that has them (VLLM_PYTHON,
SGLANG_PYTHON), in a process of its own: `engine_readers.py vllm|sglang FOLDER ...`, and on standard input the command
lines to parse, one a line. `engine_readers.py generate FOLDER` has vLLM continue the token ids on standard input, where
it runs on a CPU. Exits with 3 where the engine is not installed.
"""

import contextlib
import importlib.util
import json
import shlex
import sys
from typing import Any


def read_with_vllm(folder: str) -> tuple[dict[str, Any], Any]:
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.transformers_utils.config import get_config

    config = get_config(folder, trust_remote_code=False).to_dict()
    quantization = config.get("quantization_config")
    if quantization is None:
        return config, None
    reader = get_quantization_config(quantization["quant_method"])
    parsed = reader.from_config(quantization)
    return config, [parsed.is_checkpoint_fp8_serialized, parsed.activation_scheme, parsed.weight_block_size]


def read_with_sglang(folder: str) -> tuple[dict[str, Any], Any]:
    from sglang.srt.utils.hf_transformers import get_config

    config = get_config(folder, trust_remote_code=False).to_dict()
    quantization = config.get("quantization_config")
    if quantization is None:
        return config, None
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    parsed = Fp8Config.from_config(quantization)
    return config, [parsed.is_checkpoint_fp8_serialized, parsed.activation_scheme, parsed.weight_block_size]


def parse_with_vllm(arguments: list[str]) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    assert arguments[:2] == ["vllm", "serve"]
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.add_argument("model_tag")
    parser.parse_args(arguments[2:])


def parse_with_sglang(arguments: list[str]) -> None:
    import argparse

    from sglang.srt.server_args import ServerArgs

    assert arguments[:3] == ["python", "-m", "sglang.launch_server"]
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    parser.parse_args(arguments[3:])


def generate(folder: str) -> None:
    """Log-probabilities of the ids on standard input, and eight greedy tokens after them.

    vLLM's CPU operators are off: with those of 0.32.0 all positions but the first have other answers than with its
    torch code, which agrees with Soli and transformers."""
    import os

    own = {"VLLM_MLA_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= own | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        sys.exit(3)
    compilation = {"custom_ops": ["none"], "mode": 0}
    llm = LLM(folder, dtype="float32", max_model_len=256, enforce_eager=True, compilation_config=compilation)
    prompt = {"prompt_token_ids": json.load(sys.stdin)}
    [answer] = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=0))
    logprobs = [next(iter(of_token.values())).logprob for of_token in answer.prompt_logprobs[1:]]
    print(json.dumps({"logprobs": logprobs, "ids": list(answer.outputs[0].token_ids)}))


READERS = {"vllm": (read_with_vllm, parse_with_vllm), "sglang": (read_with_sglang, parse_with_sglang)}


def main(engine: str, *folders: str) -> None:
    if importlib.util.find_spec("vllm" if engine == "generate" else engine) is None:
        sys.exit(3)
    if engine == "generate":
        return generate(*folders)
    read, parse = READERS[engine]
    with contextlib.redirect_stdout(sys.stderr):  # engines print while they are imported
        read_folders = [read(folder) for folder in folders]
        for line in sys.stdin:
            parse(shlex.split(line))
    print(json.dumps(read_folders, default=str))


if __name__ == "__main__":
    main(*sys.argv[1:])
