"""The ways in which configuration files write one thing, brought to ModelConfig's fields.

`n_routed_experts` or `num_local_experts`; `rope_scaling` with `type` (classic) or `rope_parameters` with `rope_type`
and `rope_theta` (newer writers); `llama_4_scaling` beside them or `llama_4_scaling_beta` inside; `mlp_layer_types` or
`first_k_dense_replace`. Two spellings in one file must agree.
"""

import math
from collections.abc import Mapping
from typing import Any

from soli.errors import SoliError
from soli.families import ALIASES, ModelFamily
from soli.rope_scaling import QueryScaling, RopeScaling
from soli.sections import reject, shown

BETA = "llama_4_scaling_beta"


def unify_spellings(d: dict[str, Any], family: ModelFamily) -> None:
    """Change `d`, the object of a config.json, so that each thing has its field of ModelConfig."""
    _fold_aliases(d)
    _fold_rope(d, family)
    _fold_layer_types(d)


def rope_fields(
    yarn: RopeScaling | None, queries: QueryScaling | None, theta: float, rotary_share: float, family: ModelFamily
) -> dict[str, Any]:
    """How a file says both scalings: classic, or as one new table in a family that knows no other. `rotary_share`: of
    the width of a head."""
    table = None if yarn is None else yarn.to_dict()
    if family.rope_parameters is None:
        return {"rope_scaling": table}
    table = table or {"type": "default"}
    table |= {"rope_type": table["type"], "rope_theta": theta, "partial_rotary_factor": rotary_share}
    fields = {"rope_scaling": None, "rope_parameters": table}
    if queries is None:
        return fields
    original = queries.original_max_position_embeddings
    if yarn is not None and yarn.original_max_position_embeddings != original:
        return fields | {"llama_4_scaling": queries.to_dict()}
    table |= {"original_max_position_embeddings": original, BETA: queries.beta}
    return fields


def _fold_aliases(d: dict[str, Any]) -> None:
    for alias, name in ALIASES.items():
        if alias not in d:
            continue
        value = d.pop(alias)
        if d.setdefault(name, value) != value:
            values = f"{name} is {shown(d[name])} but {alias}, its other name, is {shown(value)}"
            raise SoliError(f"{values}; keep one of them")


def _fold_rope(d: dict[str, Any], family: ModelFamily) -> None:
    """Bring `rope_scaling` and `rope_parameters`, whichever is there, to `rope_theta`, a RopeScaling and a
    QueryScaling."""
    names = [name for name in ("rope_scaling", "rope_parameters") if d.get(name) is not None]
    tables = {name: d.pop(name) for name in names}
    d.pop("rope_parameters", None)
    if not tables and family.rope_parameters is not None:
        tables = {"rope_parameters": family.rope_parameters}
    if family.rope_parameters is not None:
        _drop_rotary_share(d, d, family)
    scalings: list[RopeScaling | None] = []
    for name, value in tables.items():
        if not isinstance(value, Mapping):
            reject(name, value, "it must be a JSON object, or null")
        theta = value.get("rope_theta")
        if theta is not None and d.setdefault("rope_theta", theta) != theta:
            values = f"rope_theta is {shown(d['rope_theta'])} but {name} has {shown(theta)}"
            raise SoliError(f"{values}; keep one of them")
        table = dict(value)
        if family.rope_parameters is not None:
            _fold_query_scaling(d, name, table)
            _drop_rotary_share(d, table, family)
        scalings.append(RopeScaling.from_dict(table))
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise SoliError("rope_scaling and rope_parameters disagree; keep one of them")
    d["rope_scaling"] = scalings[0] if scalings else None
    if d.get("llama_4_scaling") is not None:
        d["llama_4_scaling"] = QueryScaling.from_dict(d["llama_4_scaling"])


def _fold_query_scaling(d: dict[str, Any], name: str, table: dict[str, Any]) -> None:
    """Move the table's `llama_4_scaling_beta`, which counts in its original length, to `llama_4_scaling`."""
    beta = table.pop(BETA, None)
    if not beta:
        return
    original = table.get("original_max_position_embeddings")
    if original is None:
        raise SoliError(f"{name} has {BETA} but no original_max_position_embeddings, which it needs")
    scaling = {"beta": beta, "original_max_position_embeddings": original}
    if d.get("llama_4_scaling") is None:
        d["llama_4_scaling"] = scaling
    elif d["llama_4_scaling"] != scaling:
        raise SoliError(f"llama_4_scaling is {shown(d['llama_4_scaling'])} but {name} has {shown(scaling)}; keep one")


def _drop_rotary_share(d: Mapping[str, Any], table: dict[str, Any], family: ModelFamily) -> None:
    """Drop a `partial_rotary_factor` that repeats the widths: it is the share of the whole head here."""
    widths = [d.get(name, family.defaults.get(name)) for name in ("qk_rope_head_dim", "qk_nope_head_dim")]
    share = table.get("partial_rotary_factor")
    if not all(type(width) is int and width > 0 for width in widths):
        return
    if isinstance(share, int | float) and math.isclose(share, widths[0] / sum(widths), rel_tol=1e-6):
        del table["partial_rotary_factor"]


def _fold_layer_types(d: dict[str, Any]) -> None:
    """Bring `mlp_layer_types`, dense layers and then sparse ones, to `first_k_dense_replace`, where that is absent."""
    types = d.get("mlp_layer_types")
    if isinstance(types, list) and types and d.get("first_k_dense_replace") is None:
        d["first_k_dense_replace"] = next((i for i, kind in enumerate(types) if kind != "dense"), len(types))
