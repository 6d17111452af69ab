"""Expert statistics: counts, kinds of tokens, and a bounded list of the tokens of highest weight."""

import pytest

from soli.analysis.trace import LayerTrace, SelectedExpert, TokenTrace
from soli.serve.metrics import MAX_TOKENS, ExpertStatistics, kind_of


def trace(position: int, text: str, weight: float) -> TokenTrace:
    """A token for which expert 2 of one layer was selected."""
    selected = SelectedExpert(expert=2, weight=weight, affinity=0.5, biased=0.5, promoted_by_bias=False)
    layer = LayerTrace("layers.1", (selected,), (), (), None)
    return TokenTrace(position, 0, text, "prompt", (layer,))


def test_a_report_has_counts_and_the_tokens_of_highest_weight_with_their_context():
    statistics = ExpertStatistics()
    texts = ["a", " 1", "猫", "!", "b"]
    weights = [0.1, 0.5, 0.9, 0.3, 0.2]
    statistics.add([trace(at, texts[at], weights[at]) for at in range(5)], texts)
    report = statistics.report("layers.1", 2, limit=2)
    assert (report.selected, report.tokens_read) == (5, 5)
    assert [(token.text, token.before, token.after) for token in report.tokens] == [
        ("猫", "a 1", "!b"),
        (" 1", "a", "猫!b"),
    ]
    assert report.kinds == {"chinese": 1, "english": 2, "digits": 1, "punctuation": 1, "other": 0}
    assert statistics.report("layers.1", 3, limit=2).selected == 0


def test_memory_per_expert_is_bounded():
    statistics = ExpertStatistics()
    count = 3 * MAX_TOKENS
    weights = [number * 7 % count / count for number in range(count)]
    statistics.add([trace(at, "x", weight) for at, weight in enumerate(weights)], ["x"] * count)
    report = statistics.report("layers.1", 2, limit=count)
    assert report.selected == count
    assert [token.weight for token in report.tokens] == sorted(weights, reverse=True)[:MAX_TOKENS]


@pytest.mark.parametrize(
    ("text", "kind"),
    [(" the", "english"), ("中", "chinese"), ("3", "digits"), (",", "punctuation"), ("<|eos|>", "other")],
)
def test_kinds_of_tokens(text, kind):
    assert kind_of(text) == kind
