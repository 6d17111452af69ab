"""Soli: the DeepSeek-V3 system as one small, readable package.

`import soli` is light: torch is imported at the first use of what needs it.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soli.analysis.counting import count
    from soli.checkpoint import load_model, save_model
    from soli.config import ModelConfig, preset
    from soli.engine.sampler import SamplingParams
    from soli.errors import SoliError
    from soli.llm import LLM

__version__ = "0.2.0"

# Rounds that OpenMP's threads wait busily before they sleep; libgomp reads it when torch loads it, and its own default
# is milliseconds, for which a thread that shares a busy processor keeps the one that it waits for from running.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

_MODULE_OF = {
    "count": "soli.analysis.counting",
    "load_model": "soli.checkpoint",
    "save_model": "soli.checkpoint",
    "ModelConfig": "soli.config",
    "preset": "soli.config",
    "SoliError": "soli.errors",
    "LLM": "soli.llm",
    "SamplingParams": "soli.engine.sampler",
}

__all__ = [
    "LLM",
    "ModelConfig",
    "SamplingParams",
    "SoliError",
    "__version__",
    "count",
    "load_model",
    "preset",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'soli' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
