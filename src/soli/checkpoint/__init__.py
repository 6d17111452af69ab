"""Hugging Face folders: names as data, safetensors read and written, every tensor checked. See docs/checkpoints.md."""

from soli.checkpoint.load import load_model, open_checkpoint
from soli.checkpoint.reader import Checkpoint
from soli.checkpoint.save import save_model

__all__ = ["Checkpoint", "load_model", "open_checkpoint", "save_model"]
