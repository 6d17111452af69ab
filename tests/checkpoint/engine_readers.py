"""What vLLM and SGLang read of a model folder, printed as JSON; run by an interpreter that has them (VLLM_PYTHON,
SGLANG_PYTHON), in a process of its own: `engine_readers.py vllm|sglang FOLDER`, and on standard input the command lines
to parse, one a line. Exits with 3 where the engine is not installed.
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


READERS = {"vllm": (read_with_vllm, parse_with_vllm), "sglang": (read_with_sglang, parse_with_sglang)}


def main(engine: str, folder: str) -> None:
    if importlib.util.find_spec(engine) is None:
        sys.exit(3)
    read, parse = READERS[engine]
    with contextlib.redirect_stdout(sys.stderr):  # engines print while they are imported
        config, quantization = read(folder)
        for line in sys.stdin:
            parse(shlex.split(line))
    print(json.dumps({"config": config, "quantization": quantization}, default=str))


if __name__ == "__main__":
    main(*sys.argv[1:])
