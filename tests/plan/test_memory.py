"""The planned memory is the real one: moments to the byte, activations within 15 % of what autograd saves."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from soli.config import preset
from soli.model.transformer import Transformer
from soli.plan import memory
from soli.plan.memory import describe_fit, plan_memory
from soli.train import losses
from soli.train.losses import compute_losses, count_targets
from soli.train.model_options import apply_block_options, use_fp8
from soli.train.optimizer import Optimizer
from soli.train.settings import RunSettings, TrainSettings, read_settings
from tests.train.toy import EOS, MODEL, settings, tiny_model, windows

NANO = preset("nano").to_dict()


def recipe(model: dict, sequences: int, length: int, **run: object) -> TrainSettings:
    positions = {"max_position_embeddings": max(length, 512)}
    schedule = {"sequence_length": length, "constant_tokens": 1000}
    run_table = {"micro_sequences": sequences, **run}
    return read_settings({"model": model | positions, "schedule": schedule, "run": run_table})


def saved_bytes(train_settings: TrainSettings, precision: str) -> int:
    """Bytes of every storage that a real forward pass saves for its backward pass, without parameters."""
    model = Transformer(train_settings.model, dtype=torch.float32)
    model.init_weights(torch.Generator().manual_seed(0))
    model.compute_dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    if precision == "fp8":
        use_fp8(model)
    apply_block_options(model, train_settings.run)
    depth = train_settings.model.num_nextn_predict_layers
    window_BW = windows(train_settings.run.micro_sequences, train_settings.schedule.sequence_length + 1 + depth)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor):
        total = compute_losses(model, window_BW, count_targets(window_BW, depth, EOS), EOS).total(0.3, 1e-4)
    assert total.isfinite()
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize(
    ("model", "sequences", "length"),
    [(MODEL, 4, 16), (MODEL, 64, 64), (NANO, 1, 256)],
    ids=["a toy", "a toy, longer", "nano"],
)
def test_activations_are_what_autograd_saves(model, sequences, length, precision):
    train_settings = recipe(model, sequences, length)
    planned = plan_memory(train_settings, precision, "cpu")
    assert planned.activations + planned.copies == pytest.approx(saved_bytes(train_settings, precision), rel=0.15)


@pytest.mark.parametrize(
    ("change", "length"),
    [
        ({"n_routed_experts": None}, 64),
        ({"q_lora_rank": None, "n_shared_experts": 0, "num_nextn_predict_layers": 0}, 64),
        ({"num_nextn_predict_layers": 2, "n_shared_experts": 2}, 64),
        ({}, 600),
        ({"v_head_dim": 12}, 600),
    ],
    ids=["dense", "no latent query, nothing shared", "two MTP modules", "scores in fp32", "fused attention"],
)
def test_activations_of_other_shapes(change, length):
    train_settings = recipe(MODEL | change, 8, length)
    planned = plan_memory(train_settings, "bf16", "cpu")
    assert planned.activations + planned.copies == pytest.approx(saved_bytes(train_settings, "bf16"), rel=0.15)


def test_checkpointing_saves_the_blocks_inputs():
    train_settings = recipe(MODEL, 64, 64, activation_checkpointing=True)
    planned = plan_memory(train_settings, "bf16", "cpu")
    assert planned.activations == pytest.approx(saved_bytes(train_settings, "bf16"), rel=0.15)
    assert planned.total < plan_memory(recipe(MODEL, 64, 64), "bf16", "cpu").total


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_moments_to_the_byte(name, moments):
    train_settings = settings(optimizer={"name": name, "moments": moments})
    model = tiny_model()
    optimizer = Optimizer(model, train_settings.optimizer, torch.float32)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    planned = plan_memory(train_settings, "fp32", "cpu")
    assert planned.gradients == sum(p.grad.nbytes for p in model.parameters())
    assert planned.weights == sum(p.nbytes for p in model.state_dict().values())
    optimizer.step(1e-3)
    assert planned.moments == sum(tensor.nbytes for tensor in optimizer.state().values() if tensor.dim())


def test_the_suggested_options_fit():
    train_settings = recipe(MODEL, 64, 64)
    full = plan_memory(train_settings, "bf16", "cpu")
    assert describe_fit(train_settings, "bf16", "cpu", 1, full.total) == "it fits"
    assert "run.micro_sequences=32" in describe_fit(train_settings, "bf16", "cpu", 1, full.total - 1)
    assert describe_fit(recipe(MODEL, 1, 64), "bf16", "cpu", 1, plan_memory(recipe(MODEL, 1, 64), "bf16", "cpu").states)
    assert "such devices" in describe_fit(train_settings, "bf16", "cpu", 1, full.states // 2)


def test_the_logits_of_a_chunk_are_the_losses():
    assert (memory.LOGITS_CHUNK, memory.GPU_LOGITS) == (losses.CHUNK, losses.GPU_LOGITS)
    assert RunSettings().activation_checkpointing is False
