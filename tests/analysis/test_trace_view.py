"""The printed trace: aligned, its signs, plain in a pipe, coloured on a terminal."""

import io

from rich.cells import cell_len
from rich.console import Console

from soli.analysis.trace import DemotedExpert, LayerTrace, RunnerUp, SelectedExpert, TokenTrace
from soli.analysis.trace_view import print_detail, print_table, visible


def layer(name: str, biased: bool = True) -> LayerTrace:
    selected = (SelectedExpert(7, 1.5, 0.9, 0.9, False), SelectedExpert(12, 0.5, 0.3, 0.8, biased))
    demoted = (DemotedExpert(3, 0.5, 0.4),) if biased else ()
    return LayerTrace(name, selected, demoted, (RunnerUp(4, 0.7, 0.75, 0.05),), (0, 2))


def passage(layers: int = 2) -> list[TokenTrace]:
    names = [f"layers.{i}" for i in range(layers)]
    return [
        TokenTrace(0, 0, "<|bos|>", "prompt", tuple(layer(name, False) for name in names)),
        TokenTrace(1, 50, "猫坐", "prompt", tuple(map(layer, names))),
        TokenTrace(2, 51, " cat", "answer", tuple(map(layer, names))),
    ]


def printed(view, tokens, **console) -> str:
    stream = io.StringIO()
    view(Console(file=stream, **console), tokens)
    return stream.getvalue()


def test_one_line_per_token_with_a_column_per_layer():
    lines = printed(print_table, passage(), width=120).splitlines()
    assert lines[:4] == [
        "         layers.0               layers.1",
        "<|bos|>    7█75%  12▅25%    ~4    7█75%  12▅25%    ~4",
        "猫坐       7█75% +12▅25% -3 ~4    7█75% +12▅25% -3 ~4",
        "·cat       7█75% +12▅25% -3 ~4    7█75% +12▅25% -3 ~4",
    ]
    assert "the bias changed 4 of 6 choices; closest runner-up: expert 4 in layers.0" in lines[-1]


def test_the_legend_takes_its_examples_from_the_trace():
    signs = "7█75% expert 7 carries 75 % of the routed weight · +12 promoted by the bias · -3 demoted by the bias · "
    assert printed(print_table, passage(), width=120).splitlines()[-2] == signs + "~4 runner-up"
    unbiased = [TokenTrace(0, 0, "<|bos|>", "prompt", (layer("layers.0", False),))]
    assert "by the bias ·" not in printed(print_table, unbiased, width=120)


def test_columns_align_with_wide_characters():
    lines = printed(print_table, passage(), width=120).splitlines()[1:4]
    assert len({cell_len(line[: line.index("7█")]) for line in lines}) == 1
    assert len({cell_len(line[: line.rindex("~4")]) for line in lines}) == 1


def test_layers_that_do_not_fit_the_width_go_into_further_tables():
    lines = printed(print_table, passage(layers=6), width=60).splitlines()
    assert sum(line.strip().startswith("layers.") for line in lines) == 3
    assert all(cell_len(line) <= 60 for line in lines[: lines.index("")])


def test_tables_have_equal_numbers_of_columns_where_they_can():
    """Three of these columns fit in 90; four make two and two, not three and one."""
    lines = printed(print_table, passage(layers=4), width=90).splitlines()
    heads = [line for line in lines if line.strip().startswith("layers.")]
    assert [line.count("layers.") for line in heads] == [2, 2]


def test_plain_in_a_pipe_and_coloured_on_a_terminal():
    assert "\x1b[" not in printed(print_table, passage(), width=120)
    assert "\x1b[" in printed(print_table, passage(), width=120, force_terminal=True, color_system="standard")


def test_the_detailed_view_prints_every_number():
    text = printed(print_detail, passage(layers=1), width=120)
    assert "layers.0  groups 0 2" in text
    assert "weight 1.500  affinity 0.900  ranked 0.900" in text
    assert "ranked 0.800  promoted by the bias" in text and "ranked 0.400  demoted by the bias" in text
    assert "missed by 0.0500" in text


def test_control_characters_of_a_token_do_not_reach_the_terminal():
    assert visible("a b\n\x1b[31m\u202e") == "a·b↵⟨1b⟩[31m⟨202e⟩"
    token = TokenTrace(0, 9, "[bold red]x\x1b[0m" * 3, "prompt", (layer("layers.0"),))
    text = printed(print_table, [token], width=120)
    assert "[bold·red]x⟨1…" in text and "\x1b" not in text


def test_a_dense_model_prints_that_it_has_no_routed_experts():
    assert "no routed experts" in printed(print_table, [], width=80)
