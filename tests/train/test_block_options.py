"""Each option leaves gradients, counts and parameter names as they are; checkpointing saves memory."""

import pytest
import torch

from soli.errors import SoliError
from soli.train import model_options
from soli.train.losses import compute_losses, count_targets
from soli.train.model_options import apply_block_options, blocks, use_fp8
from soli.train.run_folder import checkpoints
from soli.train.settings import RunSettings
from soli.train.setup import prepare
from soli.train.trainer import accumulate, take_step, train
from tests.train.toy import EOS, settings, tiny_model, windows

PRECISIONS = ("fp32", "bf16", "fp8")


def new_model(precision: str, **options: bool):
    model = tiny_model()
    model.compute_dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    if precision == "fp8":
        use_fp8(model)
    apply_block_options(model, RunSettings(**options))
    return model


def gradients_and_counts(model):
    """Gradients by name and tokens per expert, of one micro-batch."""
    window = windows(4, 18)
    losses = compute_losses(model, window, count_targets(window, 1, EOS), EOS)
    losses.total(0.3, 1e-4).backward()
    return {name: p.grad for name, p in model.named_parameters()}, losses.counts_LE


def saved_bytes(model) -> int:
    """Bytes of activations saved for the backward pass, each storage counted once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    window = windows(4, 18)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses = compute_losses(model, window, count_targets(window, 1, EOS), EOS)
    losses.total(0.3, 1e-4).backward()  # until here every saved tensor is alive, so no address occurs twice
    return sum(sizes.values())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_activation_checkpointing_leaves_gradients_bit_equal_and_counts_once(precision):
    plain, plain_counts = gradients_and_counts(new_model(precision))
    again, counts = gradients_and_counts(new_model(precision, activation_checkpointing=True))
    assert list(again) == list(plain)
    assert [name for name in plain if not torch.equal(again[name], plain[name])] == []
    assert torch.equal(counts, plain_counts)


def test_every_block_is_recomputed_once_and_mtp_blocks_too():
    model, runs = tiny_model(), []
    for number, block in enumerate(blocks(model)):
        block.self_attn.register_forward_hook(lambda *_, number=number: runs.append(number))
    apply_block_options(model, RunSettings(activation_checkpointing=True))
    gradients_and_counts(model)
    assert runs == [0, 1, 2, 2, 1, 0]  # block 2 is the MTP module's
    with torch.no_grad():
        model(windows(1, 8))
    assert runs[6:] == [0, 1]


def test_activation_checkpointing_saves_fewer_bytes():
    plain, again = (saved_bytes(new_model("fp32", activation_checkpointing=on)) for on in (False, True))
    assert again < plain / 3


def test_runs_with_and_without_activation_checkpointing_end_in_the_same_bits(tmp_path, data):
    states = []
    for on in (False, True):
        options = {"precision": "bf16", "activation_checkpointing": on}
        train_settings = settings(run=options, schedule={"constant_tokens": 128 * 3}, eval={"samples": 0})
        run = prepare(train_settings, {}, data, tmp_path / str(on))
        train(run)
        states.append(run.model.state_dict())
        assert (checkpoints(run.folder)[-1] / "model.safetensors").is_file()
    assert list(states[0]) == list(states[1])
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


def test_gradient_accumulation_leaves_gradients_equal(tmp_path, data):
    """Bound: 2e-6 of each gradient's norm in fp32, over 8 parts of one sequence instead of 1 of eight."""
    results = {}
    for micro in (8, 3, 1):
        run = prepare(settings(run={"micro_sequences": micro}), {}, data, tmp_path / str(micro))
        window = run.stage.batches.take(0, 8)
        losses, counts = accumulate(run, window, count_targets(window, 1, run.tokenizer.eos_id))
        results[micro] = {name: p.grad for name, p in run.model.named_parameters()}, losses, counts
    whole, whole_losses, whole_counts = results[8]
    for micro in (3, 1):
        grads, losses, counts = results[micro]
        assert losses == pytest.approx(whole_losses, rel=1e-6) and torch.equal(counts, whole_counts)
        errors = {name: float((grads[name] - whole[name]).norm() / whole[name].norm()) for name in whole}
        assert max(errors.values()) < 2e-6, max(errors, key=lambda name: errors[name])


def test_a_step_is_cut_into_as_few_micro_batches_as_fit(tmp_path, data):
    run, sizes = prepare(settings(run={"micro_sequences": 3}), {}, data, tmp_path), []
    run.model.layers[0].register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[0]))
    take_step(run)
    assert sizes == [3, 3, 2]


def test_a_cuda_graph_is_rejected_without_a_gpu(tmp_path, data):
    with pytest.raises(SoliError, match="needs a GPU and bf16"):
        prepare(settings(run={"cuda_graph": True}), {}, data, tmp_path)


@pytest.fixture
def counted():
    """torch's own counts of compiled graphs and graph breaks, reset."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def gradient_error(model, other) -> float:
    """The largest difference of a gradient, as a share of its norm; counts must be equal."""
    plain, plain_counts = gradients_and_counts(model)
    others, counts = gradients_and_counts(other)
    assert list(others) == list(plain) and torch.equal(counts, plain_counts)
    return max(float((others[name] - plain[name]).norm() / plain[name].norm()) for name in plain)


def test_compiled_regions_leave_gradients_equal(counted, monkeypatch):
    """Traced, partitioned and differentiated as for the compiler, then run by torch's kernels."""
    monkeypatch.setattr(model_options, "BACKEND", "aot_eager")
    other = new_model("fp32", compile=True)
    assert gradient_error(new_model("fp32"), other) < 1e-5
    graphs = counted["stats"]["unique_graphs"]
    with torch.no_grad():  # evaluation and decoding compile nothing
        other(windows(1, 9))
    gradients_and_counts(other)
    assert counted["stats"]["unique_graphs"] == graphs
    assert 0 < graphs <= 5  # a dense block, a mixture before and after its experts; MTP blocks share them
    assert all("RoutedExperts.forward" in reason for reason in counted["graph_break"])


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_leave_gradients_equal(counted, checkpointing):
    """Bound: 1e-5 of each gradient's norm, in fp32."""
    other = new_model("fp32", compile=True, activation_checkpointing=checkpointing)
    assert gradient_error(new_model("fp32"), other) < 1e-5


@pytest.mark.slow
def test_a_ramp_of_batches_compiles_few_graphs(tmp_path, data, counted, monkeypatch):
    monkeypatch.setattr(model_options, "BACKEND", "aot_eager")  # graphs are partitioned before any backend sees them
    ramp = {"batch_sequences_start": 2, "batch_ramp_tokens": 128 * 6, "constant_tokens": 128 * 8}
    run = prepare(settings(run={"compile": True}, schedule=ramp, eval={"samples": 0}), {}, data, tmp_path)
    assert train(run) == "finished" and list(run.model.state_dict()) == list(tiny_model().state_dict())
    assert counted["stats"]["unique_graphs"] <= 15
    assert all("RoutedExperts.forward" in reason for reason in counted["graph_break"])


def test_compiling_without_a_compiler_is_one_sentence(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SoliError, match=r"run\.compile needs a C\+\+ compiler, and there is no no-such-compiler"):
        new_model("fp32", compile=True)


def test_compiling_fp8_is_rejected():
    with pytest.raises(SoliError, match="FP8 products are not compiled"):
        settings(run={"compile": True, "precision": "fp8"})
