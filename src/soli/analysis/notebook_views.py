"""How results look in a notebook: small pieces of HTML that load nothing, with all texts escaped.

A heat map is an SVG of one cell per row and expert; the stronger the colour, the more of the row's weight it has.
"""

from collections.abc import Sequence
from html import escape

CELL = 8  # pixels
MAP_WIDTH = 900  # pixels, at most
MOST_ROWS = 64
MOST_TOOLTIPS = 4096  # cells that say what they are when they are pointed at
COLOUR = "#d9480f"


def heat_map(caption: str, rows: Sequence[Sequence[float]], row_name: str, unit: str) -> str:
    """A heat map of non-negative values, one row each over experts; of many rows the first. `row_name` and `unit`, of a
    value, are plain words."""
    shown_rows = rows[:MOST_ROWS]
    columns = max(map(len, shown_rows), default=0)
    cell = max(1.0, min(CELL, MAP_WIDTH / columns)) if columns else CELL
    width, height = cell * columns, cell * len(shown_rows)
    has_tooltips = sum(value > 0 for row in shown_rows for value in row) <= MOST_TOOLTIPS
    cells = []
    for number, row in enumerate(shown_rows):
        largest = max(row, default=0.0)
        for column, value in enumerate(row):
            if value > 0:
                tooltip = f"<title>{row_name} {number}, expert {column}: {value:.4g} {unit}</title>"
                cells.append(
                    f'<rect x="{column * cell:g}" y="{number * cell:g}" width="{cell:g}" height="{cell:g}" '
                    f'fill-opacity="{value / largest:.2f}">{tooltip if has_tooltips else ""}</rect>'
                )
    if len(rows) > len(shown_rows):
        caption += f" (the first {len(shown_rows)} of {len(rows)} rows)"
    return (
        f"<div>{escape(caption)}</div>"
        f'<svg role="img" aria-label="{escape(caption)}" width="{width + 1:g}" height="{height + 1:g}">'
        f'<rect width="{width:g}" height="{height:g}" fill="none" stroke="#868e96" stroke-width="1"/>'
        f'<g fill="{COLOUR}">{"".join(cells)}</g></svg>'
    )


def html_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    lines = []
    for row in rows:
        first, *others = (escape(cell) for cell in row)
        numbers = "".join(f'<td style="text-align:right">{cell}</td>' for cell in others)
        lines.append(f'<tr><td style="text-align:left">{first}</td>{numbers}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def html_text(text: str) -> str:
    """A text as it is, its line breaks kept."""
    return f'<div style="white-space:pre-wrap">{escape(text)}</div>'
