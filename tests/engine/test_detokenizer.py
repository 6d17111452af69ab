"""Streaming: pieces add up to the text, characters are never cut, stop strings are matched across token borders."""

from itertools import pairwise
from pathlib import Path

import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models

import soli
from soli.data.tokenizer import Tokenizer
from soli.engine.detokenizer import ByteText, TextStream, WindowText, token_text

NANO = Path(soli.__file__).parent / "models" / "nano"
NANO_TOKENIZER = Tokenizer.from_folder(NANO)
ALPHABET = "ab猫é😀 \n"
STOPS = st.lists(st.text(alphabet="ab猫😀", min_size=1, max_size=5), max_size=4)


def cut(data: bytes, borders: list[int]) -> list[bytes]:
    """The bytes as tokens that end at these borders, wherever characters end."""
    places = sorted({0, len(data), *(border % (len(data) + 1) for border in borders)})
    return [data[start:end] for start, end in pairwise(places)]


def streamed(parts: list[bytes], stops=()) -> tuple[list[str], TextStream]:
    """The pieces that come of one token per part, and the stream after its end."""
    stream, pieces = TextStream(ByteText(parts.__getitem__), stops), []
    for token in range(len(parts)):
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream


def until_stop(text: str, stops) -> tuple[str, bool]:
    """The definition: grow the text a character at a time until it holds a stop string."""
    for size in range(len(text) + 1):
        positions = [text[:size].find(stop) for stop in stops if stop in text[:size]]
        if positions:
            return text[: min(positions)], True
    return text, False


@given(st.text(alphabet=ALPHABET, max_size=20), st.lists(st.integers(0, 99), max_size=30))
def test_pieces_add_up_and_no_character_is_cut(text, borders):
    pieces, _ = streamed(cut(text.encode(), borders))
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == text


@given(st.binary(max_size=24), st.lists(st.integers(0, 99), max_size=12))
def test_broken_bytes_come_out_as_a_whole_decode_would_show_them(data, borders):
    pieces, _ = streamed(cut(data, borders))
    assert "".join(pieces) == data.decode("utf-8", "replace")


@given(st.text(alphabet="ab猫😀", max_size=30), st.lists(st.integers(0, 200), max_size=40), STOPS)
def test_a_stop_string_ends_the_text_however_tokens_split_it(text, borders, stops):
    pieces, stream = streamed(cut(text.encode(), borders), stops)
    expected, stopped = until_stop(text, stops)
    assert "".join(pieces) == expected
    assert stream.stopped == stopped


@given(st.text(alphabet="ab猫", min_size=1, max_size=20), STOPS.filter(bool))
def test_no_more_is_held_back_than_may_become_a_stop_string(text, stops):
    stream = TextStream(ByteText(lambda index: text[index].encode()), stops)
    emitted = ""
    for index in range(len(text)):
        emitted += stream.push(index)
        if stream.stopped:
            return
        pushed = text[: index + 1]
        held = pushed[len(emitted) :]
        suffixes = [pushed[-size:] for size in range(1, len(pushed) + 1)]
        longest = max((len(suffix) for suffix in suffixes if any(stop.startswith(suffix) for stop in stops)), default=0)
        assert len(held) == longest


def test_of_overlapping_stop_strings_the_first_complete_one_counts():
    for stops, expected in [
        (["abcd", "bc"], "xa"),
        (["bc", "abc"], "x"),
        (["bcd", "abcdz"], "xa"),
        (["cabc"], "xabcd"),
        (["ab", "x"], ""),
    ]:
        pieces, stream = streamed([b"x", b"ab", b"cd"], stops)
        assert "".join(pieces) == expected, stops
        assert stream.stopped == (expected != "xabcd")


def test_the_cost_of_a_token_does_not_grow_with_the_text():
    sizes: list[int] = []

    def decode(ids: list[int]) -> str:
        sizes.append(len(ids))
        return bytes(ids).decode("utf-8", "replace")

    stream = TextStream(WindowText(decode), ["猫b"])
    pieces = [stream.push(byte) for byte in "猫a😀".encode() * 300]
    assert "".join(pieces) == "猫a😀" * 300 and max(sizes) <= 2 * WindowText.MAX_PENDING
    stream = TextStream(ByteText(lambda _: b"a"), ["a" * 40 + "b"])
    for _ in range(500):
        stream.push(0)
        assert len(stream._held) <= 40


@given(st.lists(st.integers(0, 6143), max_size=12))
def test_the_tokenizer_s_tokens_add_up_to_its_decoding(ids):
    stream = TextStream(token_text(NANO_TOKENIZER))
    assert "".join([*map(stream.push, ids), stream.finish()]) == NANO_TOKENIZER.decode(ids)


def test_special_tokens_are_silent_and_other_added_tokens_are_text():
    backend = tokenizers.Tokenizer.from_file(str(NANO / "tokenizer.json"))
    backend.add_tokens(["<think>", "<｜语 a｜>", "émile"])
    backend.add_special_tokens([AddedToken("<｜end｜>", special=True)])
    tokenizer = Tokenizer(backend)
    ids = [
        *tokenizer.encode("a猫"),
        *map(tokenizer.token_id, ("<think>", "<｜end｜>", "<｜语 a｜>", "émile", "<|bos|>")),
    ]
    stream = TextStream(token_text(tokenizer))
    text = "".join([*map(stream.push, ids), stream.finish()])
    assert text == tokenizer.decode(ids)
    assert "<think>" in text and "end" not in text


def test_a_tokenizer_that_is_not_byte_level():
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁the": 256, "▁cat": 257, "s": 258, "<unk>": 259}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer(backend)
    assert not tokenizer.byte_level
    ids = [256, 257, 258, *"猫😀".encode(), 257, *"é".encode(), 258, 0xE7]
    stream, pieces = TextStream(token_text(tokenizer)), []
    for token in ids:
        pieces.append(stream.push(token))
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join([*pieces, stream.finish()]) == tokenizer.decode(ids) == " the cats猫😀 catés\ufffd"
