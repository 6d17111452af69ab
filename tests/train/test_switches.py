"""Each switch leaves gradients, counts and parameter names as they are; checkpointing saves the memory it is for."""

import pytest
import torch

from soli.train.loop import accumulate, take_step, train
from soli.train.losses import compute_losses, count_targets
from soli.train.precision import use_fp8
from soli.train.settings import RunSettings
from soli.train.setup import prepare
from soli.train.state import checkpoints
from soli.train.switches import apply_switches, blocks
from tests.train.toy import EOS, settings, tiny_model, windows, write_data

PRECISIONS = ("fp32", "bf16", "fp8")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("toy") / "data")


def built(precision: str, **switches: bool):
    model = tiny_model()
    model.compute_dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    if precision == "fp8":
        use_fp8(model)
    apply_switches(model, RunSettings(**switches))
    return model


def learn(model):
    """Gradients by name and tokens per expert, of one micro-batch."""
    window = windows(4, 18)
    losses = compute_losses(model, window, count_targets(window, 1, EOS), EOS)
    losses.total(0.3, 1e-4).backward()
    return {name: p.grad for name, p in model.named_parameters()}, losses.counts_LE


def kept_bytes(model) -> int:
    """Bytes of activations that wait for the backward pass, each storage counted once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    window = windows(4, 18)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses = compute_losses(model, window, count_targets(window, 1, EOS), EOS)
    losses.total(0.3, 1e-4).backward()  # until here all that was kept is alive, so no address comes twice
    return sum(found.values())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_activation_checkpointing_leaves_gradients_bit_equal_and_counts_once(precision):
    plain, plain_counts = learn(built(precision))
    again, counts = learn(built(precision, activation_checkpointing=True))
    assert list(again) == list(plain)
    assert [name for name in plain if not torch.equal(again[name], plain[name])] == []
    assert torch.equal(counts, plain_counts)


def test_every_block_is_recomputed_once_and_mtp_blocks_too():
    model, runs = tiny_model(), []
    for number, block in enumerate(blocks(model)):
        block.self_attn.register_forward_hook(lambda *_, number=number: runs.append(number))
    apply_switches(model, RunSettings(activation_checkpointing=True))
    learn(model)
    assert runs == [0, 1, 2, 2, 1, 0]  # block 2 is the MTP module's
    with torch.no_grad():
        model(windows(1, 8))
    assert runs[6:] == [0, 1]


def test_activation_checkpointing_keeps_less():
    plain, again = (kept_bytes(built("fp32", activation_checkpointing=switch)) for switch in (False, True))
    assert again < plain / 3


def test_runs_with_and_without_activation_checkpointing_end_in_the_same_bits(tmp_path, data):
    states = []
    for switch in (False, True):
        switches = {"precision": "bf16", "activation_checkpointing": switch}
        wanted = settings(run=switches, schedule={"constant_tokens": 128 * 3}, eval={"samples": 0})
        run = prepare(wanted, {}, data, tmp_path / str(switch))
        train(run)
        states.append(run.model.state_dict())
        assert (checkpoints(run.folder)[-1] / "model.safetensors").is_file()
    assert list(states[0]) == list(states[1])
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


def test_gradient_accumulation_leaves_gradients_equal(tmp_path, data):
    """Bound: 2e-6 of each gradient's norm in fp32, over 8 parts of one sequence instead of 1 of eight."""
    found = {}
    for micro in (8, 3, 1):
        run = prepare(settings(run={"micro_sequences": micro}), {}, data, tmp_path / str(micro))
        window = run.stage.batches.take(0, 8)
        losses, counts = accumulate(run, window, count_targets(window, 1, run.tokenizer.eos_id))
        found[micro] = {name: p.grad for name, p in run.model.named_parameters()}, losses, counts
    whole, whole_losses, whole_counts = found[8]
    for micro in (3, 1):
        grads, losses, counts = found[micro]
        assert losses == pytest.approx(whole_losses, rel=1e-6) and torch.equal(counts, whole_counts)
        off = {name: float((grads[name] - whole[name]).norm() / whole[name].norm()) for name in whole}
        assert max(off.values()) < 2e-6, max(off, key=lambda name: off[name])


def test_a_step_takes_as_many_micro_batches_as_it_must(tmp_path, data):
    run, sizes = prepare(settings(run={"micro_sequences": 3}), {}, data, tmp_path), []
    run.model.layers[0].register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[0]))
    take_step(run)
    assert sizes == [3, 3, 2]
