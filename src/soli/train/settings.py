"""A recipe's training sections as frozen values, checked once, before anything is built.

Lengths of the run are counted in tokens, never in steps, so that a changed batch leaves the schedule where it was. An
unknown section or key, a wrong type and an impossible value are refused by name. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

from soli.config import ModelConfig, RopeScaling, preset, replace
from soli.errors import SoliError
from soli.train.checks import require_one_of, require_positive, require_range
from soli.train.schedule import ExtensionSettings, ScheduleSettings

S = TypeVar("S")


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with the paper's constants (section 4.2), or Muon for matrices with AdamW for the rest."""

    name: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    momentum: float = 0.95  # Muon only
    moments: str = "fp32"  # fp32, bf16: how moments are kept between steps
    router_rate: float = 1.0  # learning rate of the routers, as a share of the schedule's

    def __post_init__(self) -> None:
        require_one_of("optimizer.name", self.name, ("adamw", "muon"))
        require_one_of("optimizer.moments", self.moments, ("fp32", "bf16"))
        for name in ("beta1", "beta2", "momentum"):
            require_range(f"optimizer.{name}", getattr(self, name), 0, 1, open_end=True)
        require_range("optimizer.weight_decay", self.weight_decay, 0)
        require_positive("optimizer.clip", self.clip)
        require_positive("optimizer.eps", self.eps)
        require_positive("optimizer.router_rate", self.router_rate)


@dataclass(frozen=True)
class BalanceSettings:
    """Bias speed gamma and its end; alpha, the sequence-wise loss's weight (sections 2.1.2 and 4.2)."""

    gamma: float = 1e-3
    gamma_tokens: int | None = None  # after this many tokens the bias stands still; None: never
    alpha: float = 1e-4

    def __post_init__(self) -> None:
        require_range("balance.gamma", self.gamma, 0)
        require_range("balance.alpha", self.alpha, 0)

    def gamma_at(self, tokens: int) -> float:
        """Bias speed of the step that starts after `tokens` tokens: 0 from `gamma_tokens` on."""
        return 0.0 if self.gamma_tokens is not None and tokens >= self.gamma_tokens else self.gamma


@dataclass(frozen=True)
class LossSettings:
    """Lambda, the weight of multi-token prediction, and its switch (section 4.2: 0.3, then 0.1)."""

    mtp_weight: float = 0.3
    mtp_weight_late: float = 0.1
    mtp_late_after_tokens: int | None = None  # None: no switch

    def __post_init__(self) -> None:
        require_range("losses.mtp_weight", self.mtp_weight, 0)
        require_range("losses.mtp_weight_late", self.mtp_weight_late, 0)

    def mtp_weight_at(self, tokens: int) -> float:
        """Lambda of the step that starts after `tokens` tokens."""
        is_late = self.mtp_late_after_tokens is not None and tokens >= self.mtp_late_after_tokens
        return self.mtp_weight_late if is_late else self.mtp_weight


@dataclass(frozen=True)
class RunSettings:
    """What does not change the recipe's mathematics: device, precision, how often to report and save, what to do when
    a step goes wrong (soli/train/anomalies.py)."""

    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...
    precision: str = "auto"  # auto, fp32, bf16: of activations; fp8: bf16 and products in E4M3
    micro_sequences: int = 16  # sequences in one forward pass; a step adds up the gradients of several
    activation_checkpointing: bool = False  # keep the blocks' inputs alone, and run each forward again for its backward
    compile: bool = False  # torch.compile for the blocks' forward and backward, all but the routed experts
    cuda_graph: bool = False  # on a GPU: launch a step's forward and backward as one, where it is one micro-batch
    log_every: int = 10  # steps
    save_every: int = 200  # steps; 0 saves at the end alone
    keep: int = 2  # checkpoints kept, beside the best
    max_minutes: float | None = None  # stop then, with the state saved; a later run goes on
    tensorboard: bool = False  # write event files beside metrics.jsonl, for the package tensorboard
    on_nan: str = "stop"  # stop, skip: a step whose loss or gradient is not finite
    spike: str = "report"  # report, skip, stop: a step whose loss or gradient norm jumps
    spike_factor: float = 10.0  # how many median deviations above the median are a jump; 0: none is

    def __post_init__(self) -> None:
        require_one_of("run.precision", self.precision, ("auto", "fp32", "bf16", "fp8"))
        for name in ("micro_sequences", "log_every", "keep"):
            require_positive(f"run.{name}", getattr(self, name))
        require_range("run.save_every", self.save_every, 0)
        if self.compile and self.precision == "fp8":
            raise SoliError("run.compile is true, but FP8 products are not compiled; set run.compile = false")
        require_one_of("run.on_nan", self.on_nan, ("stop", "skip"))
        require_one_of("run.spike", self.spike, ("report", "skip", "stop"))
        require_range("run.spike_factor", self.spike_factor, 0)


@dataclass(frozen=True)
class EvalSettings:
    """Held-out text: how often, how much, how many sample translations."""

    every: int = 200  # steps; 0 evaluates at the end alone
    tokens: int = 65536
    samples: int = 4
    sample_tokens: int = 64

    def __post_init__(self) -> None:
        require_positive("eval.tokens", self.tokens)
        for name in ("every", "samples", "sample_tokens"):
            require_range(f"eval.{name}", getattr(self, name), 0)


@dataclass(frozen=True)
class TrainSettings:
    """Everything `soli train` reads, beside the `data` section, which stays as the data step left it."""

    model: ModelConfig
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    balance: BalanceSettings
    losses: LossSettings
    run: RunSettings
    eval: EvalSettings
    extension: tuple[ExtensionSettings, ...] = ()

    def __post_init__(self) -> None:
        config = self.model
        _require_room("schedule", self.schedule.sequence_length, config)
        for phase in self.extension:
            config = phase.stretch(config)
            _require_room("extension", phase.sequence_length, config)

    @property
    def total_tokens(self) -> int:
        """Length of the run: pretraining and all extension phases."""
        return self.schedule.total_tokens + sum(phase.total_tokens for phase in self.extension)


SECTIONS: dict[str, type] = {
    "optimizer": OptimizerSettings,
    "schedule": ScheduleSettings,
    "balance": BalanceSettings,
    "losses": LossSettings,
    "run": RunSettings,
    "eval": EvalSettings,
}


def read_settings(recipe: dict[str, Any]) -> TrainSettings:
    """The training sections of a recipe, defaults filled in. SoliError names the section and key that cannot be."""
    for section in recipe:
        if section not in (known := (*SECTIONS, "data", "model", "extension")):
            raise SoliError(f"the recipe has a section [{section}]; {_suggest(section, list(known))}")
    sections: dict[str, Any] = {name: _read_section(name, cls, recipe.get(name, {})) for name, cls in SECTIONS.items()}
    extension = _read_extension(recipe.get("extension", ()))
    return TrainSettings(model=_read_model(recipe.get("model", {})), extension=extension, **sections)


def as_recipe(settings: TrainSettings, data: dict[str, Any]) -> dict[str, Any]:
    """The recipe with every default resolved, as `read_settings` reads it back."""
    sections = {name: dataclasses.asdict(getattr(settings, name)) for name in SECTIONS}
    extension = [_extension_table(phase) for phase in settings.extension]
    return {"data": data, "model": settings.model.to_dict(), **sections, "extension": extension}


def _require_room(section: str, length: int, config: ModelConfig) -> None:
    if length > config.max_position_embeddings:
        raise SoliError(
            f"{section}.sequence_length is {length}, but model.max_position_embeddings is "
            f"{config.max_position_embeddings}; shorten the one or raise the other"
        )


def _read_model(table: Any) -> ModelConfig:
    table = dict(_table("model", table))
    if "preset" not in table:
        return ModelConfig.from_dict(table)
    return replace(preset(table.pop("preset")), table)


def _read_extension(tables: Any) -> tuple[ExtensionSettings, ...]:
    if not isinstance(tables, list | tuple):
        raise SoliError(f"the recipe's extension is {tables!r}; write each phase under [[extension]]")
    phases = []
    for table in tables:
        values = dict(_table("extension", table))
        scaling = values.pop("rope_scaling", None)
        if scaling is not None:
            values["rope_scaling"] = RopeScaling.from_dict(_table("extension.rope_scaling", scaling))
        phases.append(_read_section("extension", ExtensionSettings, values))
    return tuple(phases)


def _extension_table(phase: ExtensionSettings) -> dict[str, Any]:
    scaling = None if phase.rope_scaling is None else phase.rope_scaling.to_dict()
    return {**dataclasses.asdict(phase), "rope_scaling": scaling}


def _read_section(section: str, cls: type[S], table: Any) -> S:
    kinds = typing.get_type_hints(cls)
    for key in _table(section, table):
        if key not in kinds:
            raise SoliError(f"the recipe has {section}.{key}; {_suggest(key, list(kinds))}")
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        if item.default is dataclasses.MISSING and item.name not in table:
            raise SoliError(f"the recipe has no {section}.{item.name}; give it")
    return cls(**{key: _coerce(f"{section}.{key}", value, kinds[key]) for key, value in table.items()})


def _coerce(name: str, value: Any, kind: Any) -> Any:
    """`value` as a field of type `kind`; an int may stand for a float, and 1e6 for 1000000."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if (value is None and types.NoneType in kinds) or isinstance(value, RopeScaling):
        return value
    if typing.get_origin(kinds[0]) is tuple:
        if isinstance(value, list | tuple) and all(isinstance(item, list | tuple) for item in value):
            return tuple(tuple(float(_number(name, x)) for x in item) for item in value)
        raise SoliError(f"{name} is {value!r}; it must be a list of lists of numbers")
    if kinds[0] is str:
        if isinstance(value, str):
            return value
        raise SoliError(f"{name} is {value!r}; it must be text")
    if kinds[0] is bool:
        if isinstance(value, bool):
            return value
        raise SoliError(f"{name} is {value!r}; it must be true or false")
    number = _number(name, value)
    if kinds[0] is float:
        return float(number)
    if int(number) != number:
        raise SoliError(f"{name} is {value!r}; it must be a whole number")
    return int(number)


def _number(name: str, value: Any) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == float("inf"):
        raise SoliError(f"{name} is {value!r}; it must be a number")
    return value


def _table(section: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SoliError(f"the recipe's {section} is {value!r}; it must be a section, written [{section}]")
    return value


def _suggest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
