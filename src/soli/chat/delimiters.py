"""Looking for a mark in text that comes in pieces: what may still become one waits for the next piece."""


def settled(text: str, *marks: str) -> int:
    """How many characters of `text`, which holds no whole mark, cannot be the beginning of one."""
    longest = min(len(text), max(map(len, marks)) - 1)
    for length in range(longest, 0, -1):
        if any(mark.startswith(text[-length:]) for mark in marks):
            return len(text) - length
    return len(text)
