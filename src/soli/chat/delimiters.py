"""Delimiters in streamed text: the end of a chunk that may be the start of a delimiter waits for the next chunk."""


def safe_length(text: str, *delimiters: str) -> int:
    """How many leading characters of `text`, which contains no complete delimiter, cannot belong to one."""
    longest = min(len(text), max(map(len, delimiters)) - 1)
    starts = (n for n in range(longest, 0, -1) if any(delimiter.startswith(text[-n:]) for delimiter in delimiters))
    return len(text) - next(starts, 0)
