"""The score of a passage, for a terminal: tokens downward, layers across, and in each cell the experts that play.

A cell reads ` 15▆41 +19▂12 -7 ~22`: expert 15 carries 41 % of the routed weight; 19 plays because the router's bias
let it in; 7 does not because the bias kept it out; 22 was next in line. Layers that do not fit the width go into a
further system below, as in printed music. Colour comes from the console and says nothing that the signs do not say.
"""

import re
from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from soli.analysis.trace import LayerTrace, Player, TokenTrace

BARS = "▁▂▃▄▅▆▇█"
SPACES = {" ": "·", "\n": "↵", "\t": "⇥"}
TOKEN_WIDTH = 14
GAP = "  "

LET_IN, KEPT_OUT, NEAR, QUIET, TOKEN, SPECIAL = "bold green", "red", "yellow", "dim", "bold", "magenta"


def print_score(console: Console, tokens: Sequence[TokenTrace]) -> None:
    """The compact view: one line per token, a column per MoE layer, then a legend and a summary."""
    if not tokens or not tokens[0].layers:
        console.print(Text("This model has no routed experts: every parameter plays for every token."))
        return
    labels = [_label(token) for token in tokens]
    label_width = max(cell_len(label.plain) for label in labels)
    columns = [_column([token.layers[i] for token in tokens]) for i in range(len(tokens[0].layers))]
    for system in _systems(columns, console.width - label_width):
        for row, label in enumerate([Text(), *labels]):
            line = _padded(label, label_width)
            for column in system:
                line.append(GAP).append_text(column[row])
            line.rstrip()
            console.print(line, soft_wrap=True)
        console.print()
    console.print(_legend(), soft_wrap=True)
    console.print(Text(summary(tokens)), soft_wrap=True)


def print_detail(console: Console, tokens: Sequence[TokenTrace]) -> None:
    """The long view: for every token and layer each expert on a line of its own, with every number of the decision."""
    for token in tokens:
        console.print(_label(token).append(f"  {token.part}, position {token.position}", QUIET), soft_wrap=True)
        for layer in token.layers:
            groups = "" if layer.groups is None else f"  groups {' '.join(map(str, layer.groups))}"
            console.print(Text(f"  {layer.layer}{groups}", QUIET), soft_wrap=True)
            for line in _detail_lines(layer):
                console.print(line, soft_wrap=True)
    console.print(Text(summary(tokens)), soft_wrap=True)


def summary(tokens: Sequence[TokenTrace]) -> str:
    """How many played, how often the bias decided, and the closest miss, in a sentence."""
    decisions = [(token, layer) for token in tokens for layer in token.layers]
    if not decisions:
        return "no expert was asked to play"
    swayed = sum(bool(layer.kept_out) for _, layer in decisions)
    misses = [
        (near.margin, near.expert, layer.layer, token) for token, layer in decisions for near in layer.near_misses
    ]
    said = (
        f"{len(tokens)} tokens x {len(tokens[0].layers)} layers, {len(decisions[0][1].players)} experts each; "
        f"the bias changed {swayed} of {len(decisions)} choices"
    )
    if misses:
        margin, expert, layer, token = min(misses, key=lambda miss: miss[0])
        by = f"{margin:.4f}" if margin >= 1e-4 else "less than 0.0001"
        said += f"; closest miss: expert {expert} in {layer} at {visible(token.text)}, by {by}"
    return said


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
    width = max(len(_signed(player)) for layer in layers for player in layer.players)
    players = [_join(_player(player, share, width) for player, share in layer.by_weight()) for layer in layers]
    kept_out = [_join(Text(f"-{out.expert}", KEPT_OUT) for out in layer.kept_out) for layer in layers]
    near = [_join(Text(f"~{near.expert}", NEAR) for near in layer.near_misses[:1]) for layer in layers]
    cells = [Text(" ").join(parts) for parts in zip(*map(_aligned, (players, kept_out, near)), strict=True)]
    return _aligned([Text(layers[0].layer, QUIET), *cells])


def _signed(player: Player) -> str:
    return f"{'+' if player.let_in else ''}{player.expert}"


def _player(player: Player, share: float, width: int) -> Text:
    bar = BARS[min(len(BARS) - 1, int(share * 2 * len(BARS)))]  # half of the weight fills the bar
    entry = Text(_signed(player).rjust(width), LET_IN if player.let_in else "bold")
    return entry.append(bar, "cyan").append(f"{100 * share:<2.0f}", QUIET)


def _systems(columns: list[list[Text]], width: int) -> list[list[list[Text]]]:
    """Columns in as few systems as fit the width, and evenly where that takes no more of them."""
    fewest = _packed(columns, width, len(columns))
    even = _packed(columns, width, -(-len(columns) // len(fewest)))
    return even if len(even) == len(fewest) else fewest


def _packed(columns: list[list[Text]], width: int, most: int) -> list[list[list[Text]]]:
    """Columns from left to right, at most `most` to a system; one wider than the width stands alone."""
    systems: list[list[list[Text]]] = []
    room = 0
    for column in columns:
        needed = cell_len(column[0].plain) + len(GAP)
        if not systems or needed > room or len(systems[-1]) == most:
            systems.append([])
            room = width
        systems[-1].append(column)
        room -= needed
    return systems


def _detail_lines(layer: LayerTrace) -> list[Text]:
    lines = []
    for player, share in layer.by_weight():
        line = (
            Text("    plays")
            .append(f"{player.expert:5} ", "bold")
            .append(f"{BARS[-1] * round(20 * share):<20}", "cyan")
        )
        line.append(f" weight {player.weight:.3f}  affinity {player.affinity:.3f}  ranked {player.biased:.3f}")
        lines.append(line.append("  let in by the bias" if player.let_in else "", LET_IN))
    for out in layer.kept_out:
        line = Text("    out  ").append(f"{out.expert:5} {'':20}", KEPT_OUT)
        line.append(f"{'':13} affinity {out.affinity:.3f}  ranked {out.biased:.3f}")
        lines.append(line.append("  kept out by the bias", KEPT_OUT))
    for near in layer.near_misses:
        line = Text("    next ").append(f"{near.expert:5} {'':20}", NEAR)
        lines.append(line.append(f"{'':29} ranked {near.biased:.3f}  missed by {near.margin:.4f}"))
    return lines


def _legend() -> Text:
    legend = Text("7").append("▆", "cyan").append("41", QUIET).append(" expert 7 plays with 41 % of the routed weight")
    legend.append(" · ").append("+7", LET_IN).append(" let in by the bias · ").append("-7", KEPT_OUT)
    return legend.append(" kept out by it · ").append("~7", NEAR).append(" next in line")


def _join(parts: Iterable[Text]) -> Text:
    return Text(" ").join(parts)


def _aligned(cells: Sequence[Text]) -> list[Text]:
    width = max(cell_len(cell.plain) for cell in cells)
    return [_padded(cell, width) for cell in cells]


def _padded(cell: Text, width: int) -> Text:
    padded = cell.copy()
    padded.append(" " * (width - cell_len(cell.plain)))
    return padded
