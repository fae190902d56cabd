"""What is written to streams that lack characters."""

import io

import pytest

from vitkernels import _text


def ascii_stream():
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii")


class Writer:
    """The least that ``print`` needs."""

    def __init__(self):
        self.written = ""

    def write(self, text):
        self.written += text


@pytest.mark.parametrize(
    ("text", "encoding", "expected"),
    [
        ("a\xe9\u2026", "utf-8", "a\xe9\u2026"),
        ("a\xe9\u2026", "ascii", "a\\xe9."),
        ("a\xe9\u2026", "iso8859-1", "a\xe9."),
        ("file \udcff", "utf-8", "file \\udcff"),
    ],
)
def test_only_what_an_encoding_lacks_is_escaped(text, encoding, expected):
    assert _text.encodable(text, encoding) == expected


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("UTF8", "utf-8"), ("ANSI_X3.4-1968", "ascii"), (None, "utf-8"), ("nonsense", "utf-8"), (7, "utf-8")],
)
def test_the_encoding_of_a_stream_has_pythons_name(encoding, expected):
    stream = Writer()
    stream.encoding = encoding
    assert _text.encoding_of(stream) == expected


@pytest.mark.parametrize("stream", [None, io.StringIO(), Writer()], ids=["None", "StringIO", "write only"])
def test_a_stream_without_encoding_takes_any_text(stream):
    assert _text.encoding_of(stream) == "utf-8"


def test_streams_that_are_absent_or_closed_take_everything():
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        print("\u2501", file=_text.Encodable(stream), flush=True)
        assert not _text.Encodable(stream).isatty()


def test_a_stream_needs_write_only():
    stream = Writer()
    print("\u2501", file=_text.Encodable(stream), flush=True)
    assert stream.written == "\u2501\n"


def test_an_ascii_stream_gets_escapes():
    stream = ascii_stream()
    print("\u2501", file=_text.Encodable(stream), flush=True)
    assert stream.buffer.getvalue() == b"\\u2501\n"
