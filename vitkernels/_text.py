"""Text for streams that cannot encode every character: an ASCII terminal, ``LC_ALL=C``, ``PYTHONIOENCODING=ascii``."""

import codecs
from typing import Any


def encoding_of(stream: Any) -> str:
    """Python's name of what ``stream`` encodes with; ``utf-8`` where it takes any text or does not say."""
    try:
        return codecs.lookup(stream.encoding).name
    except (AttributeError, LookupError, TypeError, ValueError):  # None, io.StringIO, a stream of somebody's own
        return "utf-8"


def encodable(text: str, encoding: str) -> str:
    """``text``, with each character that ``encoding`` lacks as an escape (``\\xe9``), and an ellipsis as a full stop."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.replace("\u2026", ".").encode(encoding, "backslashreplace").decode(encoding)
    return text


class Encodable:
    """A text stream that rich can write to: to ``stream``, only what ``encoding`` has. rich reads ``encoding``, and draws its
    tables and bars with ASCII characters unless that is a Unicode one.

    Args:
        stream: needs ``write`` only. None, or one that is closed, takes everything and keeps nothing.
        encoding: the stream's own when None.
    """

    def __init__(self, stream: Any, encoding: str | None = None) -> None:
        self._stream = None if getattr(stream, "closed", False) else stream
        self.encoding = encoding_of(stream) if encoding is None else encoding

    def write(self, text: str) -> int:
        """Write ``text``; returns its length."""
        if self._stream is not None:
            self._stream.write(encodable(text, self.encoding))
        return len(text)

    def flush(self) -> None:
        """Flush ``stream``, if it can be."""
        getattr(self._stream, "flush", lambda: None)()

    def isatty(self) -> bool:
        """Whether ``stream`` is a terminal."""
        return bool(getattr(self._stream, "isatty", lambda: False)())
