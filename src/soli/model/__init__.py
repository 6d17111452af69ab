"""The network in plain torch, rope to transformer, with MTP and sparse attention. It knows no files and no training."""

from soli.model.router import Router, Routing
from soli.model.transformer import BackboneOutput, Cache, Transformer

__all__ = ["BackboneOutput", "Cache", "Router", "Routing", "Transformer"]
