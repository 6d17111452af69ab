"""What the GPU benchmarks share: the device, its clock, its ceilings measured in the same run, and the result's file.

Times are of the device (events), medians over repeats after a warm-up that is not counted; inputs are random, since a
GPU is faster on zeros. A ceiling is what the machine itself reaches here: bytes read and written by a large copy,
FLOP/s of large products. `--tiny` runs every line of a script on any machine, a CPU too, and records nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import record
import torch
from torch.nn import functional as F

from soli import machine


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring, with the options that every script here has."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tiny", action="store_true", help="a smoke test: small shapes, any device, nothing recorded")
    options.add_argument("--out", type=Path, help="another folder for the result than benchmarks/results")
    return options


def device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def require_gpu(tiny: bool) -> None:
    """Without --tiny a figure of a CPU would mislead."""
    if not tiny and not torch.cuda.is_available():
        sys.exit("this measures a GPU, and there is none; --tiny runs it anyway and records nothing")


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median time of one call."""
    run()
    return statistics.median(_once(run) for _ in range(repeats))


def _once(run: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def ceilings(tiny: bool) -> dict[str, float | None]:
    """What this machine reaches: GB/s of a copy, TFLOP/s of bf16 and of FP8 products (None where there are none)."""
    at, repeats = device(), 2 if tiny else 20
    copied = _copy_rate(torch.randn(2**16 if tiny else 2**30, device=at), repeats)
    side = 256 if tiny else 8192
    a, b = (torch.randn(side, side, device=at).to(torch.bfloat16) for _ in range(2))
    bf16 = 2 * side**3 / seconds(lambda: a @ b, repeats)
    fp8 = None
    if at.type == "cuda" and torch.cuda.get_device_capability()[0] >= 9:
        a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t(), torch.ones((), device=at)
        tensorwise = F.ScalingType.TensorWise
        fp8 = (
            2
            * side**3
            / seconds(
                lambda: F.scaled_mm(
                    a8, b8, one, tensorwise, one, tensorwise, output_dtype=torch.bfloat16, use_fast_accum=True
                ),
                repeats,
            )
        )
    rates = {"copy_gb_s": copied / 1e9, "bf16_tflops": bf16 / 1e12, "fp8_tflops": fp8 and fp8 / 1e12}
    return {name: value and record.rounded(value) for name, value in rates.items()}


def _copy_rate(source: torch.Tensor, repeats: int) -> float:
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), repeats)


def attempt(what: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row, or why there is none: one kernel that is missing must not cost the others their turn."""
    record.progress(what)
    try:
        return {"what": what} | {k: record.rounded(v) if isinstance(v, float) else v for k, v in run().items()}
    except Exception as error:  # Triton's and Dynamo's have no base of their own
        return {"what": what, "failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def finish(name: str, arguments: argparse.Namespace, measured: dict[str, Any]) -> None:
    """Print the result, and save it as gpu_NAME.json unless it is tiny."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    result = {
        "hardware": record.hardware()
        | {"gpu": gpu, "cuda": torch.version.cuda, "triton": machine.package_version("triton")}
    }
    result |= measured
    print(json.dumps(result, indent=1))
    if arguments.tiny:
        return
    folder = arguments.out or record.RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"gpu_{name}.json"
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {file}", file=sys.stderr)
