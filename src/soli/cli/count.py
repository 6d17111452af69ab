"""`soli count`: parameters, bytes, cache and FLOPs of presets, folders and what-ifs, as a table or as JSON."""

from typing import Annotated, Any

import typer
from rich import box
from rich.table import Column, Table

from soli.analysis.counting import ModelCount
from soli.analysis.counting import count as count_model
from soli.cli._shared.console import print_json, stdout_console
from soli.config import ModelConfig
from soli.quantities import scaled
from soli.sections import parse_assignments


def count(
    model: Annotated[str, typer.Argument(help="A preset (deepseek-v3, kimi-k2, ...) or a folder with a config.json.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A what-if; may be repeated.")
    ] = None,
    mtp: Annotated[bool, typer.Option("--mtp", help="Count the multi-token prediction modules in.")] = False,
    context: Annotated[int, typer.Option(min=1, max=2**62, help="Tokens in view, for the FLOPs of attention.")] = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Count a model from its configuration alone; no weights are read.

    Ten experts of which two are selected: soli count deepseek-v3 --set n_routed_experts=10 --set num_experts_per_tok=2
    """
    counted = count_model(model, parse_assignments(changes or []), mtp=mtp, context=context)
    if as_json:
        print_json(_as_dict(model, counted), indent=2)
    else:
        _print_table(counted, mtp)


def _as_dict(model: str, counted: ModelCount) -> dict[str, Any]:
    return {
        "model": model,
        "total": counted.total,
        "activated": counted.activated,
        "activated_share": counted.activated / counted.total,
        "activated_without_embedding": counted.activated - counted.embedding,
        "router_biases": counted.router_biases,
        "mtp": counted.mtp_files,
        "mtp_own": counted.mtp_own,
        "mtp_activated": counted.mtp_activated,
        "bytes": {"bf16": counted.bytes_bf16, "fp8": counted.bytes_fp8},
        "cache_bytes_per_token": counted.cache_bytes_per_token,
        "expert_bytes_read_per_token_fp8": counted.expert_bytes_read_per_token_fp8,
        "flops_per_token": {
            **vars(counted.flops),
            "decode": counted.flops.decode,
            "prefill": counted.flops.prefill,
        },
        "components": counted.components,
        "note": counted.note,
    }


def _print_table(counted: ModelCount, mtp: bool) -> None:
    console = stdout_console()
    console.print(counted.headline, style="bold", soft_wrap=True)
    totals = {
        "parameters": f"{counted.total:,}",
        "activated": f"{counted.activated:,}",
        "bf16": scaled(counted.bytes_bf16, "B"),
        "FP8": scaled(counted.bytes_fp8, "B"),
    }
    columns = [Column(title, footer, justify="right", no_wrap=True) for title, footer in totals.items()]
    table = Table(Column("", "total"), *columns, box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
    for c in counted.components:
        table.add_row(c.name, f"{c.total:,}", f"{c.activated:,}", scaled(c.bytes_bf16, "B"), scaled(c.bytes_fp8, "B"))
    console.print(table)
    for label, text in _costs(counted, mtp):
        console.print(f"[bold]{label:<16}[/bold]{text}", soft_wrap=True)
    if counted.note:
        console.print(f"[bold yellow]{'note':<16}[/bold yellow]{counted.note}", soft_wrap=True)


def _costs(counted: ModelCount, mtp: bool) -> list[tuple[str, str]]:
    """The lines under the table: what is selected, and what one token costs beside parameters."""
    config, flops, cache = counted.config, counted.flops, counted.cache_bytes_per_token
    lines = []
    if config.num_moe_layers:
        experts = f"{config.num_experts_per_tok} of {config.n_routed_experts} routed experts"
        lines.append(("experts", f"{experts} are selected in each of {config.num_moe_layers} layers"))
        read = scaled(counted.expert_bytes_read_per_token_fp8, "B")
        lines.append(("experts read", f"{read} per token in FP8, when none is in memory"))
    if counted.router_biases:
        lines.append(("router biases", f"{counted.router_biases:,}, in the total but not in the activated"))
    parts = f"{scaled(flops.matmul, 'FLOP')} in matrices, {scaled(flops.attention_decode, 'FLOP')} in attention"
    lines += [
        ("cache", f"{cache:,} bytes per token in bf16: {_cached_values(config, mtp)}"),
        ("decode", f"{parts} over {flops.context:,} cached tokens, per token"),
        ("prefill", f"{scaled(flops.prefill, 'FLOP')} per token, mean over a sequence of {flops.context:,}"),
    ]
    if config.index_topk is not None:
        scores = f"{config.num_indexers()} of {config.num_hidden_layers} layers select {config.index_topk:,} tokens"
        lines.append(("attention", f"{scores}, by {config.index_n_heads} heads of {config.index_head_dim} values"))
    if config.num_nextn_predict_layers:
        own = (
            f"{scaled(counted.mtp_own)} of its own{' (in the table)' if mtp else ''}, and copies of embedding and head"
        )
        lines.append(("MTP", f"{scaled(counted.mtp_files)} more in files: {own}"))
    return lines


def _cached_values(config: ModelConfig, mtp: bool) -> str:
    """What a token leaves in the cache, as text."""
    modules = config.num_nextn_predict_layers if mtp else 0
    latents = f"{config.num_hidden_layers + modules} layers x {config.kv_lora_rank + config.qk_rope_head_dim} values"
    indexers = config.num_indexers(modules)
    return f"{latents} + {indexers} indexers x {config.index_head_dim} values" if indexers else latents
