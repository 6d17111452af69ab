"""What a model has, and what a token costs, as one value: `soli.count("deepseek-v3")`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soli.analysis import parameters
from soli.analysis.notebook_views import html_table, html_text
from soli.analysis.parameters import Count, Flops
from soli.arguments import checks_arguments
from soli.config import ModelConfig, replace, resolve
from soli.errors import SoliError
from soli.quantities import scaled
from soli.sections import reject, shown


@dataclass(frozen=True, repr=False)
class ModelCount(Count):
    """The parameters of `config` in all (`total`), those a token uses (`activated`) and by `components`, with bytes in
    files; FLOPs of a token, bytes that it leaves in the bf16 cache, FP8 bytes of experts that it reads. `note`: where
    the count is of something else than what was asked for."""

    config: ModelConfig
    flops: Flops
    cache_bytes_per_token: int
    expert_bytes_read_per_token_fp8: int
    note: str | None = None

    @property
    def headline(self) -> str:
        """Total, activated, and their ratio, in a line."""
        share = 100 * self.activated / self.total
        return f"{scaled(self.total)} parameters, {scaled(self.activated)} activated for each token: {share:.1f} %"

    def __repr__(self) -> str:
        sizes = f"{scaled(self.bytes_bf16, 'B')} in bf16, {scaled(self.bytes_fp8, 'B')} in FP8"
        return f"<{self.headline}; {sizes}; cache {self.cache_bytes_per_token:,} bytes per token>"

    def _repr_html_(self) -> str:
        rows = [
            [one.name, f"{one.total:,}", f"{one.activated:,}", scaled(one.bytes_bf16, "B"), scaled(one.bytes_fp8, "B")]
            for one in [*self.components, self]
        ]
        note = html_text(self.note) if self.note else ""
        return html_text(self.headline) + html_table(["", "parameters", "activated", "bf16", "FP8"], rows) + note


@checks_arguments("soli.count")
def count(
    model: str | Path | ModelConfig,
    changes: Mapping[str, Any] | None = None,
    *,
    mtp: bool = False,
    context: int = 4096,
) -> ModelCount:
    """Count a preset, a model folder, a downloaded model by its ID, or a configuration; no weights are read.

    `changes`: fields of config.json to change first, {"n_routed_experts": 10}. `mtp`: with the multi-token prediction
    modules. `context`: tokens in view, for the FLOPs of attention. SoliError for a name or a field there is not.
    """
    if not isinstance(model, str | Path | ModelConfig):
        raise SoliError(f"model is {shown(model)}: give a preset, a folder, an ID or a soli.ModelConfig")
    if type(context) is not int or not 1 <= context <= 2**62:
        reject("context", context, "it must be a whole number from 1 to 2^62")
    config, note = what_if(model if isinstance(model, ModelConfig) else resolve(model), dict(changes or {}))
    return ModelCount(
        **vars(parameters.count(config, mtp)),
        config=config,
        flops=parameters.flops(config, context, mtp),
        cache_bytes_per_token=parameters.cache_bytes(config, mtp),
        expert_bytes_read_per_token_fp8=parameters.expert_read_bytes(config),
        note=note,
    )


def what_if(config: ModelConfig, changes: dict[str, Any]) -> tuple[ModelConfig, str | None]:
    """The changed configuration. Groups that no longer fit the experts are dropped with a note, unless named in
    `changes`: groups limit which experts may be selected, never how many, so the count is the same."""
    try:
        return replace(config, changes), None
    except SoliError as error:
        if {"n_group", "topk_group"} & changes.keys():
            raise
        try:
            ungrouped = replace(config, {**changes, "n_group": 1, "topk_group": 1})
        except SoliError:
            raise error from None
    return ungrouped, f"{config.n_group} groups do not fit these experts: counted without groups"
