"""Sizes of [parallel], as a plan varies them. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MeshSizes:
    """How devices share a run; ranks of a stage are data x expert x replicate."""

    data: int
    expert: int
    pipeline: int = 1
    replicate: int = 1
    keep_gathered: bool = False
    schedule: str = "1F1B"  # of the pipeline

    @property
    def sharing(self) -> int:
        """Ranks over which a stage's states are sharded."""
        return self.data * self.expert

    @property
    def ranks(self) -> int:
        """Data-parallel ranks of a stage."""
        return self.sharing * self.replicate

    def __str__(self) -> str:
        sizes = f"data {self.data} x expert {self.expert}"
        sizes += f" x pipeline {self.pipeline} ({self.schedule})" if self.pipeline > 1 else ""
        sizes += f" x replicate {self.replicate}" if self.replicate > 1 else ""
        return sizes + (", parameters kept gathered for a step" if self.keep_gathered else "")
