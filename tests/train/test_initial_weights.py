"""A run from the weights of a folder: its first step is theirs, quantized or not, and what does not fit is rejected."""

import json
import shutil

import pytest
import torch

from soli.cli import main
from soli.errors import SoliError
from soli.train.checkpoints import export_run
from soli.train.setup import prepare
from soli.train.trainer import take_step, train
from tests.checkpoint.folders import edit_tensors
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import train_steps
from tests.train.toy import MODEL, settings


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """A finished run, and the folders of its weights by format."""
    folder = tmp_path_factory.mktemp("trained")
    run = prepare(settings(), {}, data, folder / "run")
    train(run)
    for number_format in ("fp32", "fp8"):
        export_run(folder / "run", folder / number_format, number_format)
    return run, folder


def starting_from(folder, **sections):
    return settings(**{**sections, "run": {"initial_weights": str(folder), **sections.get("run", {})}})


def test_weights_biases_and_mtp_are_those_of_the_folder(tmp_path, data, trained):
    first, folder = trained
    run = prepare(starting_from(folder / "fp32"), {}, data, tmp_path)
    state = run.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.model.state_dict().items())
    assert run.progress.tokens == 0 and all(p.dtype == torch.float32 for p in run.model.parameters())
    assert take_step(run).loss < 4 < take_step(prepare(settings(), {}, data, tmp_path / "random")).loss


def test_quantized_weights_are_dequantized(tmp_path, data, trained):
    first, folder = trained
    run = prepare(starting_from(folder / "fp8"), {}, data, tmp_path)
    own, theirs = first.model.layers[1].self_attn.o_proj.weight, run.model.layers[1].self_attn.o_proj.weight
    assert 0 < (own - theirs).abs().max() < 0.1 * own.abs().max()


def test_a_checkpoint_wins_over_initial_weights(tmp_path, data, trained):
    """Resuming needs the folder no longer."""
    gone = starting_from(trained[1] / "fp32", schedule={"constant_tokens": 128 * 4})
    train(prepare(gone, {}, data, tmp_path))
    resumed = prepare(starting_from(tmp_path / "gone"), {}, data, tmp_path)
    assert resumed.progress.tokens == 128 * 4


def test_tied_embeddings(tmp_path, data):
    tied = {"model": {"tie_word_embeddings": True}, "schedule": {"constant_tokens": 128 * 4}}
    first = prepare(settings(**tied), {}, data, tmp_path / "first")
    train(first)
    export_run(tmp_path / "first", tmp_path / "weights", "fp32")
    run = prepare(starting_from(tmp_path / "weights", model=tied["model"]), {}, data, tmp_path / "second")
    assert run.model.lm_head.weight is run.model.embed_tokens.weight
    assert torch.equal(run.model.lm_head.weight, first.model.lm_head.weight)


def test_two_ranks_start_from_the_same_weights(tmp_path, data, trained):
    sections = {"run": {"initial_weights": str(trained[1] / "fp8")}}
    alone = train_steps(data, tmp_path / "alone", 2, sections)
    for parallel in ({"data": 2}, {"expert": 2}, {"pipeline": 2}):
        shared = run_ranks(
            train_steps, 2, tmp_path / str(parallel), data, tmp_path / f"run {parallel}", 2,
            sections | {"parallel": parallel},
        )  # fmt: skip
        assert shared[0].losses[0][0] == pytest.approx(alone.losses[0][0], rel=1e-5), parallel


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"moe_intermediate_size": 8}, "whose moe_intermediate_size is 16, but the recipe's model.moe_intermediate"),
        ({"n_routed_experts": 16}, "whose n_routed_experts is 8, but the recipe's model.n_routed_experts is 16"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers"),
    ],
)
def test_another_shape_is_rejected(tmp_path, data, trained, changes, sentence):
    with pytest.raises(SoliError, match=sentence):
        prepare(starting_from(trained[1] / "fp32", model=MODEL | changes), {}, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_rejected(tmp_path, data, trained):
    other = tmp_path / "other"
    other.mkdir()
    for file in (trained[1] / "fp32").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    document = json.loads((other / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    a, b = list(vocabulary)[10:12]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(SoliError, match=r"tokenizer is not that of the run's data.*--tokenizer"):
        prepare(starting_from(other), {}, data, tmp_path / "run")


def test_a_copy_that_differs_is_rejected(tmp_path, data, trained):
    """A published MTP module has its own copy of the embedding; Soli trains one for both."""
    folder = tmp_path / "other"
    shutil.copytree(trained[1] / "fp32", folder)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        [copy] = [name for name in tensors if name.startswith("model.layers.") and "embed_tokens" in name]
        tensors[copy][3] += 1

    edit_tensors(folder / "model.safetensors", change)
    with pytest.raises(SoliError, match=r"embed_tokens.* should repeat .* but differs from it"):
        prepare(starting_from(folder), {}, data, tmp_path / "run")


def test_a_folder_that_is_not_there(tmp_path, data, capsys):
    with pytest.raises(SoliError, match="there is no such folder"):
        prepare(starting_from(tmp_path / "none"), {}, data, tmp_path / "run")
    assert main(["train", "nano-zh-en", "--set", f"data.folder={data}", "--set", "run.initial_weights=7"]) == 1
    assert "run.initial_weights" in capsys.readouterr().err
