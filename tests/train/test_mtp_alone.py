"""losses.mtp_alone: MTP modules learn what the model predicts, and the model stays as it is, bit for bit."""

import json
import shutil

import pytest
import torch
from torch.nn import functional as F

from soli.checkpoint import load_model
from soli.cli import main
from soli.errors import SoliError
from soli.plan.memory import plan_memory
from soli.train.checkpoints import export_run
from soli.train.losses import count_targets
from soli.train.mtp_alone import compute_draft_losses, divergence, freeze_all_but_mtp
from soli.train.run_folder import best_checkpoint, checkpoints
from soli.train.setup import prepare
from soli.train.trainer import take_step, train
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import train_steps
from tests.train.toy import EOS, MODEL, settings, tiny_model, windows


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """The weights of a run in which the MTP module was not trained."""
    folder = tmp_path_factory.mktemp("trained")
    train(prepare(settings(losses={"mtp_from_tokens": 10**6}), {}, data, folder / "run"))
    export_run(folder / "run", folder / "weights", "fp32")
    return folder / "weights"


def alone(weights, **sections):
    sections["losses"] = {"mtp_alone": True, **sections.get("losses", {})}
    sections["run"] = {"initial_weights": str(weights), "keep": 9, **sections.get("run", {})}
    return settings(**sections)


@pytest.mark.parametrize("tokens", [7, 600])  # below one chunk, and over a chunk's edge
def test_divergence_equals_torch(tokens):
    torch.manual_seed(0)
    hidden = torch.randn(1, tokens, 16, dtype=torch.float64, requires_grad=True)
    target, head = torch.randn(1, tokens, 16, dtype=torch.float64), torch.randn(40, 16, dtype=torch.float64)
    weight = torch.rand(1, tokens)
    fused = divergence(hidden, target, head, weight)
    fused.mul(3.0).backward()
    got, hidden.grad = hidden.grad.clone(), None
    logp, logq = (target @ head.T).log_softmax(-1), (hidden @ head.T).log_softmax(-1)
    plain = (F.kl_div(logq, logp, reduction="none", log_target=True).sum(-1) * weight).sum()
    plain.mul(3.0).backward()
    torch.testing.assert_close(fused.double(), plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, hidden.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depths", [1, 2])
def test_a_module_is_drawn_to_what_the_model_predicts_of_the_same_token(depths):
    model, window = tiny_model(num_nextn_predict_layers=depths), windows(3, 17 + depths)
    freeze_all_but_mtp(model)
    losses = compute_draft_losses(model, window, count_targets(window, depths, EOS), EOS)
    hidden, ends = model.backbone(window).hidden_BTD.detach(), window == EOS
    draft = hidden[:, :16]
    for depth in range(depths):
        draft = model.mtp_step(depth, draft, window[:, 1 + depth : 17 + depth]).hidden_BTD
        total = torch.zeros(())
        count = 0
        for row in range(3):
            for i in range(16):
                if not ends[row, i + 1 : i + 2 + depth].any():  # else the target, i + 2 + depth, is of another text
                    logp = model.head(hidden[row, i + 1 + depth]).log_softmax(-1)
                    logq = model.head(draft[row, i]).log_softmax(-1)
                    total, count = total + (logp.exp() * (logp - logq)).sum(), count + 1
        torch.testing.assert_close(losses.mtp[depth], total / count)
    losses.total(0.3, 1e-4).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, _ in model.named_parameters() if name.startswith("mtp.")
    }
    assert len(losses.counts_LE) == depths  # of the modules' layers


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_model_stays_and_more_drafts_are_accepted(tmp_path, data, trained, optimizer):
    recipe = alone(trained, optimizer={"name": optimizer}, schedule={"constant_tokens": 128 * 40})
    run = prepare(recipe, {}, data, tmp_path / "run")
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    assert train(run) == "finished"
    changed = {name for name, tensor in run.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.startswith("mtp.")}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    accepted = [line["mtp_accepted"] for line in lines if line["kind"] == "evaluation"]
    assert accepted[-1] > accepted[0] + 0.1
    steps = [line for line in lines if line["kind"] == "step"]
    assert steps[-1]["mtp"] < steps[0]["mtp"] / 2
    assert set(steps[0]["load"]) == {"mtp.0"}
    best = best_checkpoint(tmp_path / "run")
    assert best == checkpoints(tmp_path / "run")[accepted.index(max(accepted)) - len(accepted)]


def test_resuming_is_bit_for_bit(tmp_path, data, trained):
    whole = prepare(alone(trained), {}, data, tmp_path / "whole")
    train(whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for checkpoint in checkpoints(tmp_path / "resumed")[1:]:
        shutil.rmtree(checkpoint)
    resumed = prepare(alone(tmp_path / "gone"), {}, data, tmp_path / "resumed")
    assert 0 < resumed.progress.step < whole.progress.step
    train(resumed)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_a_run_is_all_of_the_one_or_of_the_other(tmp_path, data, trained):
    train(prepare(alone(trained), {}, data, tmp_path))
    with pytest.raises(SoliError, match=r"started with losses\.mtp_alone = True, not False; choose another --out"):
        prepare(settings(run={"initial_weights": str(trained)}), {}, data, tmp_path)


def test_a_model_without_mtp_modules_gets_one(tmp_path, data):
    without = {"num_nextn_predict_layers": 0}
    first = prepare(settings(model=without), {}, data, tmp_path / "run")
    train(first)
    export_run(tmp_path / "run", tmp_path / "weights", "fp32")
    with pytest.raises(SoliError, match="num_nextn_predict_layers is 0"):
        prepare(settings(run={"initial_weights": str(tmp_path / "weights")}), {}, data, tmp_path / "both")
    train(prepare(alone(tmp_path / "weights"), {}, data, tmp_path / "second"))
    export_run(tmp_path / "second", tmp_path / "with", "fp32")
    after = load_model(tmp_path / "with", dtype=torch.float32, mtp=True).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in first.model.state_dict().items())
    assert any(name.startswith("mtp.0.") for name in after)


def test_two_ranks_train_the_same_modules(tmp_path, data, trained):
    sections = {"losses": {"mtp_alone": True}, "run": {"initial_weights": str(trained), "micro_sequences": 2}}
    one = train_steps(data, tmp_path / "one", 4, sections)
    for sizes in ({"data": 2, "keep_gathered": True}, {"data": 2}, {"expert": 2}):
        shared = {**sections, "parallel": sizes}
        for many in run_ranks(train_steps, 2, tmp_path / str(sizes), data, tmp_path / f"run {sizes}", 4, shared):
            assert all(torch.equal(a, b) for a, b in zip(many.counts, one.counts, strict=True))
            assert all(name.startswith(("model/mtp.", "optimizer/mtp.")) for name in many.differing(one))
            assert one.distance(many) < 1e-4
            assert many.losses == [pytest.approx(losses, rel=1e-5) for losses in one.losses]


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"run": {"initial_weights": None}}, "the model would be a random one: give it with run.initial_weights"),
        ({"model": MODEL | {"num_nextn_predict_layers": 0}}, "the model has no MTP module"),
        ({"losses": {"mtp_from_tokens": 5}}, "losses.mtp_from_tokens is 5: set it to 0"),
        ({"losses": {"mtp_weight": 0}}, "nothing would be trained: set it above 0"),
        ({"parallel": {"pipeline": 2}}, "set parallel.pipeline = 1"),
        ({"run": {"cuda_graph": True}}, "set run.cuda_graph = false"),
    ],
)
def test_what_it_does_not_go_with_is_rejected(sections, sentence):
    with pytest.raises(SoliError, match="losses.mtp_alone is true, but .*" + sentence):
        alone("weights", **sections)


def test_memory_is_that_of_weights_and_of_what_the_modules_need():
    whole, only = (plan_memory(recipe, "fp32", "cpu") for recipe in (settings(), alone("weights")))
    modules = sum(p.numel() for name, p in tiny_model().named_parameters() if name.startswith("mtp."))
    assert only.weights == whole.weights and only.gradients == 4 * modules
    assert only.moments == 8 * modules < whole.moments
    recipe = alone("weights", run={"micro_sequences": 3})
    model, window = tiny_model(), windows(3, 18)
    freeze_all_but_mtp(model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def save(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        total = compute_draft_losses(model, window, count_targets(window, 1, EOS), EOS).total(0.3, 1e-4)
    assert total.isfinite()
    measured = sum(size for pointer, size in saved.items() if pointer not in own)
    assert plan_memory(recipe, "fp32", "cpu").activations == pytest.approx(measured, rel=0.2)


def test_a_dry_run_says_what_is_trained(capsys):
    arguments = ["train", "nano-zh-en", "--dry-run", "--no-measure", "--set", "losses.mtp_alone=true"]
    arguments += ["--set", "losses.mtp_from_tokens=0", "--set", "run.initial_weights=nano"]
    assert main([*arguments, "--devices", "2"]) == 0
    printed = capsys.readouterr().out
    assert "depth 1, alone, lambda 0.3" in printed and "a forward pass per token, and three of the MTP" in printed
    assert "none is planned where the MTP modules are trained alone" in printed


def test_a_step_counts_one_forward_pass_of_the_model(data, trained, tmp_path):
    whole, only = settings(), alone(trained)
    without = settings(losses={"mtp_from_tokens": 10**9})
    model_alone = without.flops(0, 3000, 16)
    assert only.flops(0, 3000, 16) == pytest.approx(whole.flops(0, 3000, 16) - 2 / 3 * model_alone, rel=1e-3)
    assert take_step(prepare(only, {}, data, tmp_path)).tokens == 128
