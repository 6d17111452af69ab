"""Fill-in-the-middle: a share of plain documents rearranged, so that a model learns to write between prefix and suffix.

Prefix, suffix, middle (PSM), as in section 4.1 of the DeepSeek-V3 report (arXiv 2412.19437). Cut at characters, not
tokens, so that at inference the gap may fall inside a word. Texts shorter than three characters stay as they are.
"""

import numpy as np


def split_middle(text: str, rate: float, rng: np.random.Generator) -> tuple[str, str, str] | None:
    """(prefix, middle, suffix) with probability `rate`, else None; joined they are the text, the middle not empty."""
    if len(text) < 3 or rng.random() >= rate:
        return None
    start, end = sorted(int(i) for i in rng.choice(len(text) + 1, size=2, replace=False))
    return text[:start], text[start:end], text[end:]
