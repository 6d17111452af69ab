"""What benchmarks/gpu/ measured as rows of the table: each figure beside its peer in the same run, or beside a ceiling
that this run measured on the same card.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import record

NAMES = ("gpu_train_speed_1b", "gpu_nano_speed", "gpu_v3_layers", "gpu_kernels")
NOTE = "GPU time by events, medians of 10 to 30 repeats, contenders one after the other in one process."
Result = Mapping[str, Any]


def rows(name: str, result: Result) -> list[dict[str, Any]]:
    """The rows of results/NAME.json, as `record.row` makes them; what failed has none."""
    makers = {
        "gpu_train_speed_1b": _training,
        "gpu_nano_speed": _nano,
        "gpu_v3_layers": _layers,
        "gpu_kernels": _kernels,
    }
    return list(makers[name](result))


def _row(what: str, unit: str, soli: float, peers: Mapping[str, float]) -> dict[str, Any]:
    return record.row(what, unit, [soli], {name: [value] for name, value in peers.items()})


def _by_name(result: Result) -> dict[str, Result]:
    return {row["what"]: row for row in result["rows"] if "failed" not in row}


def _training(result: Result) -> Iterator[dict[str, Any]]:
    rows_by_name = _by_name(result)
    size = result["size"]
    speed = {name: row["tokens_s"] for name, row in rows_by_name.items()}
    shape = f"{size['parameters'] / 1e9:.1f} B, {size['activated'] / 1e9:.1f} B activated"
    step = f"{size['sequences']} x {size['length']:,} tokens"
    peers = {name.split(",")[0]: value for name, value in speed.items() if name.startswith("transformers")}
    mfu = f" ({100 * rows_by_name['soli bf16']['mfu']:.0f} % of 989 TFLOP/s)"
    yield _row(f"training step, {shape}, bf16, {step}{mfu}", "tokens/s", speed["soli bf16"], peers)
    bf16 = {"Soli bf16": speed["soli bf16"]}
    yield _row(f"training step, {shape}, FP8, {step}", "tokens/s", speed["soli fp8"], bf16)
    dense = {"dense": speed["soli dense, equal activated, bf16"]}
    what = f"training step, {shape}, bf16, beside a dense model of as many activated parameters"
    yield _row(what, "tokens/s", speed["soli bf16"], dense)


def _nano(result: Result) -> Iterator[dict[str, Any]]:
    speed = {name: row["tokens_s"] for name, row in _by_name(result).items()}
    for name, value in speed.items():
        batch, _, switches = name.partition(" sequences of 256")
        if switches:
            peer = {"eager": speed[f"{batch} sequences of 256"]}
            what = f"training step, nano, {batch} x 256 tokens{switches}"
            yield _row(what, "tokens/s", value, peer)


def _layers(result: Result) -> Iterator[dict[str, Any]]:
    layers, ceiling = sum(result["layers"].values()), result["ceilings"]
    for name, row in _by_name(result).items():
        if "share_of_memory_ceiling" in row:
            peer = {"memory": row["tokens_s"] / row["share_of_memory_ceiling"]}
            yield _row(f"{layers} layers of V3, bf16, {name}", "tokens/s", row["tokens_s"], peer)
        else:
            peer = {"product of 8,192": ceiling["bf16_tflops"]}
            yield _row(f"{layers} layers of V3, bf16, {name}", "TFLOP/s", row["tflops"], peer)


def _kernels(result: Result) -> Iterator[dict[str, Any]]:
    ceiling = result["ceilings"]
    bf16, fp8 = {"product of 8,192": ceiling["bf16_tflops"]}, {"product of 8,192": ceiling["fp8_tflops"]}
    for name, row in _by_name(result).items():
        what = f"{name}"
        if name.startswith("mla decode"):
            yield _row(f"{what}, bf16", "TFLOP/s", row["tflops"], bf16)
        elif name.startswith("mla prefill"):
            yield _row(f"{what}, bf16, forward", "TFLOP/s", row["forward_tflops"], bf16)
            yield _row(f"{what}, bf16, forward and backward", "TFLOP/s", row["both_tflops"], bf16)
        elif name.startswith("fp8 gemm"):
            yield _row(what, "ms", row["ms"], {"torch bf16": row["bf16_ms"]})
            yield _row(f"{what}, rate", "TFLOP/s", row["tflops"], fp8)
        else:
            grouped = {"torch bf16 grouped_mm": row["bf16_grouped_mm_tflops"]}
            yield _row(what, "TFLOP/s", row["tflops"], grouped)
            yield _row(f"{what}, weights' gradient", "TFLOP/s", row["weight_gradient_tflops"], {})
