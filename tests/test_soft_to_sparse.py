"""The road from the textbook mixture to Soli's layer: each step against the plain formula, and the page telling it."""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from soli.kernels.reference import REFERENCE

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "from-soft-to-sparse.md").read_text(encoding="utf-8")


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{Path(path).parent}_{Path(path).stem}", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


steps = load("examples/soft_to_sparse.py")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, flags=re.S)


def by_hand(textbook: nn.Module, x_TD: Tensor, K: int, score: str, bias_E: Tensor | None = None) -> Tensor:
    """Equations 13-16 for one token after another, in float64, from the weights alone."""
    rows = []
    for x_D in x_TD.double():
        logits = [float(row_D @ x_D) for row_D in textbook.gate.weight.double()]
        if score == "sigmoid":
            scores = [1 / (1 + math.exp(-z)) for z in logits]
        else:
            scores = [math.exp(z) / sum(map(math.exp, logits)) for z in logits]
        ranks = scores if bias_E is None else [s + float(b) for s, b in zip(scores, bias_E, strict=True)]
        chosen = sorted(range(len(scores)), key=lambda e: -ranks[e])[:K]
        total = sum(scores[e] for e in chosen) if score == "sigmoid" else 1.0
        y_N = torch.zeros(textbook.experts[0].out_features, dtype=torch.float64)
        for e in chosen:
            expert = textbook.experts[e]
            y_N += scores[e] / total * (expert.weight.double() @ x_D + expert.bias.double()).clamp(min=0)
        rows.append(y_N)
    return torch.stack(rows).float()


@pytest.mark.parametrize("seed", range(20))
@torch.no_grad()
def test_all_experts_by_softmax_is_the_textbook_to_the_bit(seed: int) -> None:
    textbook, _, x_TD = steps.toy(seed)
    layer = steps.Sparse(textbook, **steps.ALL_OF_4)
    y_TN, routing = layer(x_TD)
    assert x_TD.shape == (5, 16) and y_TN.shape == (5, 8)
    assert torch.equal(steps.in_textbook_order(layer, x_TD), textbook(x_TD))
    assert torch.equal(steps.gates(routing), textbook.gate(x_TD).softmax(dim=-1))
    # Best first, another order of the same sum: float32 rounding of values near 1.
    torch.testing.assert_close(y_TN, textbook(x_TD), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_the_textbook_itself() -> None:
    textbook, _, x_TD = steps.toy()
    torch.testing.assert_close(textbook(x_TD), by_hand(textbook, x_TD, 4, "softmax"), rtol=1e-5, atol=1e-6)


def test_gradients_of_choosing_all_are_the_textbooks() -> None:
    textbook, _, x_TD = steps.toy()
    weights = list(textbook.parameters())
    expected = torch.autograd.grad(textbook(x_TD).square().sum(), weights)
    actual = torch.autograd.grad(steps.Sparse(textbook, **steps.ALL_OF_4)(x_TD)[0].square().sum(), weights)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("fields", "score"), [("TOP_2", "softmax"), ("SIGMOID", "sigmoid")])
@torch.no_grad()
def test_top_2_is_the_formula(fields: str, score: str) -> None:
    textbook, _, x_TD = steps.toy()
    y_TN, routing = steps.Sparse(textbook, **getattr(steps, fields))(x_TD)
    torch.testing.assert_close(y_TN, by_hand(textbook, x_TD, 2, score), rtol=1e-5, atol=1e-6)
    assert (steps.gates(routing) > 0).sum(dim=1).tolist() == [2] * 5


@torch.no_grad()
def test_only_chosen_rows_reach_an_expert() -> None:
    textbook, _, x_TD = steps.toy()
    layer = steps.Sparse(textbook, **steps.TOP_2)
    seen = []
    for expert in textbook.experts:
        expert.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[0]))
    _, routing = layer(x_TD)
    assert seen == routing.counts_E().tolist() and sum(seen) == 10


@torch.no_grad()
def test_the_shared_expert_is_added_once_and_unweighted() -> None:
    textbook, shared, x_TD = steps.toy()
    y_TN, _ = steps.WithShared(textbook, shared, **steps.SIGMOID)(x_TD)
    without_TN = by_hand(textbook, x_TD, 2, "sigmoid")
    torch.testing.assert_close(y_TN, without_TN + shared(x_TD).clamp(min=0), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_bias_evens_the_load_and_never_weighs() -> None:
    textbook, _, _ = steps.toy()
    layer = steps.Sparse(textbook, **steps.BIASED)
    x_TD = steps.skewed(textbook)
    before_E = layer.gate(x_TD).counts_E()
    steps.balance(layer.gate, x_TD, steps=400)
    after_E = layer.gate(x_TD).counts_E()
    assert before_E.max() > 1.4 * 256 and after_E.max() < 1.05 * 256
    bias_E = layer.gate.e_score_correction_bias
    assert bias_E[0] < 0 < bias_E[3]
    y_TN, _ = layer(x_TD[:32])
    torch.testing.assert_close(y_TN, by_hand(textbook, x_TD[:32], 2, "sigmoid", bias_E), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_last_step_is_solis_layer_at_the_same_expert_weights() -> None:
    D, E, K, F, cut = 48, 8, 2, 16, 4  # 3 * D * F == D * D: a linear expert's weights and a SwiGLU's are as many
    torch.manual_seed(0)
    layer = steps.fine_grained(D, E, K, F, cut, n_group=4, topk_group=2)
    x_TD = torch.randn(7, D)
    y_BTD, routing = layer(x_TD[None])
    experts = (layer.experts.gate_up_proj, layer.experts.down_proj)
    expected_TD = REFERENCE.experts(x_TD, routing.expert_ids_TK, routing.weights_TK, *experts)
    torch.testing.assert_close(y_BTD[0], expected_TD + layer.shared_experts(x_TD), rtol=1e-4, atol=1e-5)
    linear = steps.WithShared(steps.Textbook(D, D, E), nn.Linear(D, D), **(steps.BIASED | {"num_experts_per_tok": K}))
    router, biases = (cut - 1) * E * (D + 1), D
    assert steps.total(layer) == steps.total(linear) + router - (E + 1) * biases
    assert steps.activated(layer) == steps.activated(linear) + router - (K + 1) * biases


@pytest.mark.parametrize("seed", range(5))
@torch.no_grad()
def test_an_unchanged_moe_layer_holds_the_textbook(seed: int) -> None:
    textbook, _, x_TD = steps.toy(seed)
    y_BTD, routing = steps.inside_moe(textbook)(nn.functional.pad(x_TD, (0, 1), value=1.0)[None])
    # The bias is a term of the product here and added after it there, so the last bits may differ.
    torch.testing.assert_close(y_BTD[0, :, :8], textbook(x_TD), rtol=1e-6, atol=1e-6)
    assert y_BTD[0, :, 8:].count_nonzero() == 0
    torch.testing.assert_close(steps.gates(routing), textbook.gate(x_TD).softmax(dim=-1), rtol=1e-6, atol=1e-6)


def test_activated_counts_by_hand() -> None:
    textbook, shared, _ = steps.toy()
    expert, gate = 16 * 8 + 8, 4 * 16
    assert steps.activated(textbook) == steps.total(textbook) == gate + 4 * expert
    assert steps.activated(steps.Sparse(textbook, **steps.TOP_2)) == gate + 2 * expert
    assert steps.activated(steps.WithShared(textbook, shared, **steps.BIASED)) == gate + 4 + 3 * expert


def test_the_pages_code_is_the_examples_code() -> None:
    source = (ROOT / "examples" / "soft_to_sparse.py").read_text(encoding="utf-8")
    listings = blocks("python")
    assert len(listings) >= 8
    for block in listings:
        assert block in source


def test_the_pages_output_is_the_examples_output(capsys: pytest.CaptureFixture[str]) -> None:
    steps.main()
    listed, printed = " ".join(blocks("text")).split(), capsys.readouterr().out.split()
    assert len(listed) == len(printed)
    for expected, actual in zip(listed, printed, strict=True):
        if re.fullmatch(r"-?\d+\.\d+(e-\d+)?", expected):  # rounding may turn the last digit on another machine
            assert float(actual) == pytest.approx(float(expected), abs=5e-3)
        elif expected.isdigit():
            assert int(actual) == pytest.approx(int(expected), abs=2)
        else:
            assert actual == expected


def test_the_pages_table_is_the_recorded_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path.copy())
    bench = load("benchmarks/soft_to_sparse.py")
    results = json.loads(bench.RESULTS.read_text())
    assert f"{bench.BEGIN}\n{bench.table(results)}\n{bench.END}" in PAGE
    counted = {name: (steps.total(layer), steps.activated(layer)) for name, layer in bench.build().items()}
    assert counted == {row["step"]: (row["parameters"], row["activated"]) for row in results["rows"]}
