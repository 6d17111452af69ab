"""A trace as a table for a terminal: tokens downward, layers across, and in each cell the selected experts.

A cell reads ` 15▆41% +19▂12% -7 ~22`: expert 15 carries 41 % of the routed weight; 19 was promoted by the router's
bias; 7 was demoted by it; 22 was the first runner-up. Where experts are read from disk, `↓` behind one says that it was
on disk when the layer needed it, `⇣` that it was being read ahead. Layers that do not fit the width go into a further
table below.
Colour comes from the console and repeats what the signs show.
"""

import re
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from soli.analysis.residency import Tier
from soli.analysis.trace import LayerTrace, PagedExpert, PagedLayerTrace, SelectedExpert, TokenTrace
from soli.quantities import scaled

BARS = "▁▂▃▄▅▆▇█"
SPACES = {" ": "·", "\n": "↵", "\t": "⇥"}
TOKEN_WIDTH = 14
GAP = "  "

PROMOTED = "bold green"
DEMOTED = "red"
RUNNER_UP = "yellow"
QUIET = "dim"
TOKEN = "bold"
SPECIAL = "magenta"
MISS = "bold magenta"

TIER_SIGNS: dict[Tier, str] = {"memory": " ", "reading": "⇣", "disk": "↓"}
TIER_NAMES: dict[Tier, str] = {
    "memory": "in memory",
    "reading": "was being read ahead when the layer needed it",
    "disk": "was on disk when the layer needed it",
}


def print_table(console: Console, tokens: Sequence[TokenTrace]) -> None:
    """The compact view: one line per token, a column per MoE layer, then a legend and a summary."""
    if not tokens or not tokens[0].layers:
        console.print(Text("This model has no routed experts: every parameter is used for every token."))
        return
    labels = [_label(token) for token in tokens]
    label_width = max(cell_len(label.plain) for label in labels)
    columns = [_column([token.layers[i] for token in tokens]) for i in range(len(tokens[0].layers))]
    for table in _tables(columns, console.width - label_width):
        for row, label in enumerate([Text(), *labels]):
            line = _padded(label, label_width)
            for column in table:
                line.append(GAP).append_text(column[row])
            line.rstrip()
            console.print(line, soft_wrap=True)
        console.print()
    console.print(_legend(tokens), soft_wrap=True)
    console.print(Text(summary(tokens)), soft_wrap=True)


def print_detail(console: Console, tokens: Sequence[TokenTrace]) -> None:
    """The long view: for every token and layer each expert on a line of its own, with every number of the decision."""
    for token in tokens:
        console.print(_label(token).append(f"  {token.part}, position {token.position}", QUIET), soft_wrap=True)
        for layer in token.layers:
            groups = "" if layer.groups is None else f"  groups {' '.join(map(str, layer.groups))}"
            console.print(Text(f"  {layer.layer}{groups}{_cost(layer)}", QUIET), soft_wrap=True)
            for line in _detail_lines(layer):
                console.print(line, soft_wrap=True)
    console.print(Text(summary(tokens)), soft_wrap=True)


def summary(tokens: Sequence[TokenTrace]) -> str:
    """How many experts were selected, how often the bias decided, and the closest runner-up, in a sentence."""
    decisions = [(token, layer) for token in tokens for layer in token.layers]
    if not decisions:
        return "no layer routes to experts"
    changed = sum(bool(layer.demoted_by_bias) for _, layer in decisions)
    sentence = (
        f"{len(tokens)} tokens x {len(tokens[0].layers)} layers, {len(decisions[0][1].selected)} experts each; "
        f"the bias changed {changed} of {len(decisions)} choices"
    )
    runner_ups = [(runner_up, layer.layer, token) for token, layer in decisions for runner_up in layer.runner_ups]
    if runner_ups:
        closest, layer, token = min(runner_ups, key=lambda entry: entry[0].margin)
        by = f"{closest.margin:.4f}" if closest.margin >= 1e-4 else "less than 0.0001"
        sentence += f"; closest runner-up: expert {closest.expert} in {layer} at {visible(token.text)}, by {by}"
    return sentence + _residency_summary(tokens)


def _residency_summary(tokens: Sequence[TokenTrace]) -> str:
    """How many of the selected experts were in memory, and what reading the others cost; empty where all always are."""
    layers = [layer for token in tokens for layer in token.layers if isinstance(layer, PagedLayerTrace)]
    if not layers:
        return ""
    tiers = [expert.tier for layer in layers for expert in layer.selected]
    # A pass over several tokens is in the trace once for each of them.
    milliseconds = sum(layer.waited_ms / layer.pass_tokens for layer in layers)
    read = sum(layer.bytes_read / layer.pass_tokens for layer in layers)
    return (
        f"; {tiers.count('memory')} of {len(tiers)} experts were in memory: reading the others, {scaled(read, 'B')}, "
        f"held up the layers for {milliseconds:,.1f} ms"
    )


def _cost(layer: LayerTrace) -> str:
    """What reading cost a layer."""
    if not isinstance(layer, PagedLayerTrace) or not layer.bytes_read:
        return ""
    tokens = f", for {layer.pass_tokens} tokens" if layer.pass_tokens > 1 else ""
    return f"  waited {layer.waited_ms:.1f} ms, {scaled(layer.bytes_read, 'B')} read{tokens}"


def visible(text: str) -> str:
    """A token's text with its spaces and line breaks shown and control characters as ⟨hex⟩, safe to print."""
    shown = "".join(SPACES.get(character, character) for character in text)
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", lambda m: f"⟨{ord(m[0]):02x}⟩", shown)


def _label(token: TokenTrace) -> Text:
    text = _shortened(visible(token.text))
    special = text.startswith("<|") and text.endswith("|>")
    return Text(text, SPECIAL if special else TOKEN if token.part == "answer" else "")


def _shortened(text: str) -> str:
    if cell_len(text) <= TOKEN_WIDTH:
        return text
    while cell_len(text) > TOKEN_WIDTH - 1:
        text = text[:-1]
    return text + "…"


def _column(layers: Sequence[LayerTrace]) -> list[Text]:
    """A layer's header and cells, all padded to one width."""
    join = Text(" ").join
    width = max(len(_signed(expert)) for layer in layers for expert in layer.selected)
    selected = [join(_selected(expert, share, width) for expert, share in layer.by_weight()) for layer in layers]
    demoted = [join(Text(f"-{one.expert}", DEMOTED) for one in layer.demoted_by_bias) for layer in layers]
    runner_up = [join(Text(f"~{one.expert}", RUNNER_UP) for one in layer.runner_ups[:1]) for layer in layers]
    cells = [join(parts) for parts in zip(*map(_aligned, (selected, demoted, runner_up)), strict=True)]
    return _aligned([Text(layers[0].layer, QUIET), *cells])


def _signed(expert: SelectedExpert) -> str:
    return f"{'+' if expert.promoted_by_bias else ''}{expert.expert}"


def _selected(expert: SelectedExpert, share: float, width: int) -> Text:
    bar = BARS[min(len(BARS) - 1, int(share * 2 * len(BARS)))]  # half of the weight fills the bar
    entry = Text(_signed(expert).rjust(width), PROMOTED if expert.promoted_by_bias else "bold")
    entry.append(bar, "cyan").append(f"{100 * share:.0f}%".ljust(3), QUIET)
    return entry.append(TIER_SIGNS[expert.tier], MISS) if isinstance(expert, PagedExpert) else entry


def _tables(columns: list[list[Text]], width: int) -> list[list[list[Text]]]:
    """Columns in as few tables as fit the width, of equal numbers where that takes no more tables."""
    fewest = _split(columns, width, len(columns))
    even = _split(columns, width, -(-len(columns) // len(fewest)))
    return even if len(even) == len(fewest) else fewest


def _split(columns: list[list[Text]], width: int, max_columns: int) -> list[list[list[Text]]]:
    """Columns from left to right, at most `max_columns` to a table; one wider than the width is a table alone."""
    tables: list[list[list[Text]]] = []
    remaining = 0
    for column in columns:
        column_width = cell_len(column[0].plain) + len(GAP)
        if not tables or column_width > remaining or len(tables[-1]) == max_columns:
            tables.append([])
            remaining = width
        tables[-1].append(column)
        remaining -= column_width
    return tables


def _detail_lines(layer: LayerTrace) -> list[Text]:
    selected = [
        Text.assemble(
            "    selected ",
            (f"{expert.expert:5} ", "bold"),
            (f"{BARS[-1] * round(20 * share):<20}", "cyan"),
            f" weight {expert.weight:.3f}  affinity {expert.affinity:.3f}  ranked {expert.biased:.3f}",
            ("  promoted by the bias" if expert.promoted_by_bias else "", PROMOTED),
            (f"  {TIER_NAMES[expert.tier]}" if isinstance(expert, PagedExpert) else "", MISS),
        )
        for expert, share in layer.by_weight()
    ]
    demoted = [
        Text.assemble(
            "    demoted  ",
            (f"{expert.expert:5} {'':20}", DEMOTED),
            f"{'':13} affinity {expert.affinity:.3f}  ranked {expert.biased:.3f}",
            ("  demoted by the bias", DEMOTED),
        )
        for expert in layer.demoted_by_bias
    ]
    runner_ups = [
        Text.assemble(
            "    next     ",
            (f"{expert.expert:5} {'':20}", RUNNER_UP),
            f"{'':29} ranked {expert.biased:.3f}  missed by {expert.margin:.4f}",
        )
        for expert in layer.runner_ups
    ]
    return selected + demoted + runner_ups


def _legend(tokens: Sequence[TokenTrace]) -> Text:
    """What each sign means, with the first example of it in this trace."""
    layers = [layer for token in tokens for layer in token.layers]
    heaviest, share = layers[0].by_weight()[0]
    meaning = f" expert {heaviest.expert} carries {100 * share:.0f} % of the routed weight"
    entries = [_selected(heaviest, share, 0).append(meaning)]
    promoted = [expert.expert for layer in layers for expert in layer.selected if expert.promoted_by_bias]
    demoted = [expert.expert for layer in layers for expert in layer.demoted_by_bias]
    runner_ups = [expert.expert for layer in layers for expert in layer.runner_ups]
    signs = (
        ("+", PROMOTED, " promoted by the bias", promoted),
        ("-", DEMOTED, " demoted by the bias", demoted),
        ("~", RUNNER_UP, " runner-up", runner_ups),
    )
    for sign, style, meaning, experts in signs:
        if experts:
            entries.append(Text().append(f"{sign}{experts[0]}", style).append(meaning))
    paged = {expert.tier: expert for layer in layers for expert in layer.selected if isinstance(expert, PagedExpert)}
    for tier in ("disk", "reading"):
        if tier in paged:
            entries.append(Text(TIER_SIGNS[tier], MISS).append(f" {TIER_NAMES[tier]}"))
    return Text(" · ").join(entries)


def _aligned(cells: Sequence[Text]) -> list[Text]:
    width = max(cell_len(cell.plain) for cell in cells)
    return [_padded(cell, width) for cell in cells]


def _padded(cell: Text, width: int) -> Text:
    return cell.copy().append(" " * (width - cell_len(cell.plain)))
