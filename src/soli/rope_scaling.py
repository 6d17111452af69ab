"""YaRN as a configuration has it: the table `rope_scaling` (classic) or `rope_parameters` (newer writers)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from soli.errors import SoliError
from soli.sections import Bounds, NonNegativeFloat, PositiveFloat, PositiveInt, Section, reject, shown

# Fields that would change the rotation if they held anything else; Soli has no such variant.
ONLY_VALUES = {"attention_factor": None, "truncate": True, "partial_rotary_factor": 1.0}


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
        reject_variants(self.extra, ONLY_VALUES, "rope_scaling.")

    @classmethod
    def from_dict(cls, table: Any) -> Self | None:  # type: ignore[override]
        """The table as JSON has it; None when it names plain RoPE."""
        if not isinstance(table, Mapping):
            reject("rope_scaling", table, "it must be a JSON object, or null")
        kinds = [table[name] for name in ("type", "rope_type") if table.get(name) is not None] or ["default"]
        kind = kinds[0]
        if kinds[-1] != kind:
            types = f"type {shown(kind)} and rope_type {shown(kinds[-1])}"
            raise SoliError(f"rope_scaling has {types}; keep one of them")
        if kind == "default":
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


def reject_variants(extra: Mapping[str, Any], only: Mapping[str, Any], prefix: str = "") -> None:
    """SoliError when a field that Soli does not use asks for another network than the one it would build."""
    for name, value in only.items():
        if extra.get(name) not in (None, value):
            reject(prefix + name, extra[name], f"Soli has no such variant; remove it or set {value!r}")
