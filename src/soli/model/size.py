"""Whether a configuration can become a model, by arithmetic: `soli count` counts larger ones, nobody builds them."""

import torch

from soli.analysis.parameters import count
from soli.config import ModelConfig
from soli.errors import SoliError
from soli.machine import memory_bytes

MAX_BLOCKS = 10_000  # layers and MTP modules together: a hundred times those of any published model
MAX_PARAMETERS = 2**56  # so that the bytes of a tensor fit in torch's 64 bits


def check_size(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    """SoliError for a model of too many blocks or parameters, or one that this machine's memory cannot hold."""
    layers, modules = config.num_hidden_layers, config.num_nextn_predict_layers
    if layers + modules > MAX_BLOCKS:
        name, value = ("num_hidden_layers", layers) if layers >= modules else ("num_nextn_predict_layers", modules)
        raise SoliError(f"{name} is {value:,}; a model can be built with at most {MAX_BLOCKS:,} layers and MTP modules")
    parameters = count(config, mtp=True).total
    if parameters > MAX_PARAMETERS:
        raise SoliError(f"the configuration has {parameters:,} parameters, which no machine can hold: reduce its sizes")
    size = parameters * dtype.itemsize
    if device.type == "cpu" and size > memory_bytes():
        raise SoliError(
            f"a model of this configuration has {parameters:,} parameters, {size:,} bytes in "
            f"{str(dtype).removeprefix('torch.')}, but this machine has {memory_bytes():,} bytes of memory: reduce its "
            "sizes, or use a machine with more"
        )
