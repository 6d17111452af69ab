"""Streaming: pieces add up to the text, characters are never cut, stop strings are found across token borders."""

from hypothesis import given
from hypothesis import strategies as st

from soli.engine.stream import TextStream


def decode(ids: list[int]) -> str:
    """Every byte a token: the hardest case for character borders."""
    return bytes(ids).decode("utf-8", "replace")


@given(st.text(alphabet="ab猫é😀 ", max_size=20))
def test_pieces_add_up_and_no_character_is_cut(text):
    stream = TextStream(decode)
    pieces = [stream.push(byte) for byte in text.encode()]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == text == stream.text


@given(st.binary(max_size=24))
def test_broken_bytes_come_out_as_a_whole_decode_would_show_them(data):
    stream = TextStream(decode)
    assert "".join([*map(stream.push, data), stream.finish()]) == decode(list(data))


@given(st.text(alphabet="ab猫", max_size=14), st.lists(st.text(alphabet="ab猫", min_size=1, max_size=4), max_size=3))
def test_a_stop_string_ends_the_text_before_it(text, stops):
    stream, given_out = TextStream(decode, stops), ""
    for byte in text.encode():
        given_out += stream.push(byte)
        if stream.stopped:
            break
    given_out += stream.finish()
    # The oracle: grow the text a character at a time until it holds a stop string.
    grown = next((text[:n] for n in range(len(text) + 1) if any(stop in text[:n] for stop in stops)), None)
    expected = text if grown is None else grown[: min(grown.find(stop) for stop in stops if stop in grown)]
    assert given_out == expected == stream.text
    assert stream.stopped == (grown is not None)
