"""YaRN as a configuration has it: the table `rope_scaling` (classic) or `rope_parameters` (newer writers). Beside it
the `llama_4_scaling` of queries, which Mistral's models have.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from soli.errors import SoliError
from soli.network_fields import ROPE_NEUTRAL, ROPE_WITHOUT_EFFECT, YARN_NEUTRAL, is_empty, reject_variants
from soli.sections import Bounds, NonNegativeFloat, PositiveFloat, PositiveInt, Section, reject, shown


@dataclass(frozen=True)
class QueryScaling(Section, section="llama_4_scaling", exact_integers=True):
    """Every query times 1 + beta ln(1 + floor(position / original_max_position_embeddings))."""

    beta: NonNegativeFloat
    original_max_position_embeddings: PositiveInt

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON has it."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class RopeScaling(Section, section="rope_scaling", exact_integers=True):
    """YaRN (arXiv 2309.00071): `original_max_position_embeddings` stretched by `factor`.

    Absent `mscale` and `mscale_all_dim` mean 1 and 0, as in the released code: cos and sin carry 0.1 ln(factor) + 1.
    """

    type: str = "yarn"
    factor: Annotated[float, Bounds(at_least=1)] = 1.0
    original_max_position_embeddings: PositiveInt = 4096
    beta_fast: float = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: NonNegativeFloat = 1.0
    mscale_all_dim: NonNegativeFloat = 0.0
    extra: dict[str, Any] = field(default_factory=dict, hash=False)  # fields Soli does not use, returned by to_dict

    def __post_init__(self) -> None:
        if self.type != "yarn":
            reject("rope_scaling.type", self.type, "Soli knows 'yarn', and null for no scaling")
        super().__post_init__()
        if self.beta_fast < self.beta_slow:
            reject("rope_scaling.beta_fast", self.beta_fast, f"it must be at least beta_slow, {self.beta_slow}")
        reject_variants(self.extra, YARN_NEUTRAL, "rope_scaling.")
        self._check_attention_factor(self.extra.get("attention_factor"))
        _reject_unknown(self.extra, {*YARN_NEUTRAL, "attention_factor"})

    def _check_attention_factor(self, value: Any) -> None:
        """Files may repeat the factor on cos and sin; another one than the mscales give is rejected."""
        computed = self.mscale_of(self.mscale) / self.mscale_of(self.mscale_all_dim)
        if value is None or (type(value) in (int, float) and math.isclose(value, computed, rel_tol=1e-6)):
            return
        remedy = f"by the mscales it is {computed:.6g}; Soli has no such variant; remove it"
        reject("rope_scaling.attention_factor", value, remedy)

    def mscale_of(self, weight: float) -> float:
        """YaRN's sqrt(1/t) = 0.1 * weight * ln(factor) + 1; one where the context is not extended."""
        return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1.0 else 1.0

    @classmethod
    def from_dict(cls, table: Any) -> Self | None:  # type: ignore[override]
        """The table as JSON has it; None when it names plain RoPE."""
        if not isinstance(table, Mapping):
            reject("rope_scaling", table, "it must be a JSON object, or null")
        kinds = [table[name] for name in ("type", "rope_type") if table.get(name) is not None] or ["default"]
        kinds = ["yarn" if kind == "deepseek_yarn" else kind for kind in kinds]
        kind = kinds[0]
        if kinds[-1] != kind:
            types = f"type {shown(kind)} and rope_type {shown(kinds[-1])}"
            raise SoliError(f"rope_scaling has {types}; keep one of them")
        if kind == "default" or (kind == "linear" and table.get("factor") == 1):
            _check_plain(table, is_typed=any(table.get(name) is not None for name in ("type", "rope_type")))
            return None
        for name in ("factor", "original_max_position_embeddings"):
            if kind == "yarn" and table.get(name) is None:
                raise SoliError(f"rope_scaling has no {name}; yarn needs it")
        known = {item.name for item in dataclasses.fields(cls)} - {"type", "extra"}
        values = {name: value for name, value in table.items() if name in known and value is not None}
        elsewhere = known | {"type", "rope_type", "rope_theta"}
        extra = {name: value for name, value in table.items() if name not in elsewhere}
        return cls(type=kind, **values, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """The classic table, unknown fields included."""
        return {
            **{item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "extra"},
            **self.extra,
        }


def _check_plain(table: Mapping[str, Any], is_typed: bool) -> None:
    """SoliError for a table of plain RoPE that asks for more than that; the parameters of YaRN have no effect there."""
    if not is_typed and table.get("factor") not in (None, 1):
        raise SoliError(f"rope_scaling has factor {shown(table['factor'])} but no type; add its type, such as yarn")
    reject_variants(table, ROPE_NEUTRAL, "rope_scaling.")
    yarn = {item.name for item in dataclasses.fields(RopeScaling)}
    _reject_unknown(table, {*yarn, *YARN_NEUTRAL, "attention_factor", "rope_type", "rope_theta"})


def _reject_unknown(table: Mapping[str, Any], known: set[str]) -> None:
    for name, value in table.items():
        if name not in known and name not in ROPE_WITHOUT_EFFECT and not is_empty(value):
            reject(f"rope_scaling.{name}", value, "Soli does not know this field, which may change the rotation")
