"""Expert statistics: counts, kinds of tokens, and no text."""

import pytest

from soli.analysis.trace import LayerTrace, SelectedExpert, TokenTrace
from soli.serve.metrics import ExpertStatistics, kind_of


def trace(position: int, text: str) -> TokenTrace:
    """A token for which expert 2 of one layer was selected."""
    selected = SelectedExpert(expert=2, weight=0.5, affinity=0.5, biased=0.5, promoted_by_bias=False)
    layer = LayerTrace("layers.1", (selected,), (), (), None)
    return TokenTrace(position, 0, text, "prompt", (layer,))


def test_a_report_has_counts_and_kinds():
    statistics = ExpertStatistics()
    statistics.add([trace(at, text) for at, text in enumerate(["a", " 1", "猫", "!", "b"])])
    report = statistics.report("layers.1", 2)
    assert (report.selected, report.tokens_read) == (5, 5)
    assert report.kinds == {"chinese": 1, "english": 2, "digits": 1, "punctuation": 1, "other": 0}
    assert statistics.report("layers.1", 3).selected == 0


@pytest.mark.parametrize(
    ("text", "kind"),
    [(" the", "english"), ("中", "chinese"), ("3", "digits"), (",", "punctuation"), ("<|eos|>", "other")],
)
def test_kinds_of_tokens(text, kind):
    assert kind_of(text) == kind
