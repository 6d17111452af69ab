"""Soli: the DeepSeek-V3 system as one small, readable package."""

__version__ = "0.1.0"
