"""A run that starts from the weights of a model folder (`run.initial_weights`) instead of random ones.

The folder may be any that `soli generate` reads, quantized or not: weights become the fp32 masters. Its shape and its
tokenizer must be the run's. Moments of the optimizer, schedule and data start anew.
"""

import dataclasses

import torch

from soli.checkpoint.load import open_checkpoint, slots_by_tensor, whole_tensor
from soli.checkpoint.reader import Checkpoint
from soli.config import ModelConfig
from soli.data.tokenizer import Tokenizer
from soli.errors import SoliError
from soli.model.transformer import Transformer
from soli.parallel.ranks import local_tensor, own_values

# What a run may have otherwise than the weights that it starts from: no weight means another thing by them.
MAY_DIFFER = {
    "max_position_embeddings",
    "rope_scaling",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "quantization_config",
    "extra",
}

MTP_MODULES = "num_nextn_predict_layers"


def open_initial_weights(
    name_or_folder: str, config: ModelConfig, tokenizer: Tokenizer, new_mtp: bool = False
) -> Checkpoint:
    """The folder, or the model of that name, checked against the run's model and tokenizer without reading a weight.
    `new_mtp`: it may have no MTP modules; those of the run's model then stay random."""
    checkpoint = open_checkpoint(name_or_folder, mtp=config.num_nextn_predict_layers > 0)
    where = f"run.initial_weights is {name_or_folder}, whose"
    may_differ = MAY_DIFFER | {MTP_MODULES} if new_mtp and not getattr(checkpoint.config, MTP_MODULES) else MAY_DIFFER
    for field in (field.name for field in dataclasses.fields(config)):
        own, theirs = getattr(config, field), getattr(checkpoint.config, field)
        if field not in may_differ and own != theirs:
            raise SoliError(
                f"{where} {field} is {theirs!r}, but the recipe's model.{field} is {own!r}; use --set "
                f"model.preset={name_or_folder}, or train from random weights"
            )
    if Tokenizer.from_folder(checkpoint.folder).vocabulary() != tokenizer.vocabulary():
        raise SoliError(
            f"{where} tokenizer is not that of the run's data; pack the data with it: soli data pack --tokenizer "
            f"{checkpoint.folder}"
        )
    return checkpoint


def fill(model: Transformer, checkpoint: Checkpoint) -> None:
    """Give parameters and router biases their values, tensor by tensor; of a sharded model this rank's parts."""
    checkpoint.check_copies()
    slots = slots_by_tensor(checkpoint)
    device = torch.device("cpu")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name not in slots:  # the head of a model with tied embeddings, MTP modules of one that has none
                continue
            whole = whole_tensor(checkpoint, slots[name], name, tensor.shape, torch.float32, device)
            if not whole.isfinite().all():
                raise SoliError(f"{checkpoint.folder}: {slots[name][0].name} has values that are not finite")
            local_tensor(tensor).copy_(own_values(whole, tensor))
