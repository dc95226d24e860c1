"""The text of a raw file, compressed or not: its ends, its size, and files that are refused by name."""

from __future__ import annotations

import bz2
import gzip
import io
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

from spark_jobs.cleaning.rules import has_only_carriage_returns
from spark_jobs.partitions import Refused

if TYPE_CHECKING:
    from spark_jobs.runtime import Files

#: Bytes of text at each end of a file that show its header and its range of ids.
END_BYTES = 64 << 10

#: Compressed bytes that are read from a file's start: bzip2 compresses 900 kB at a time.
_SAMPLE_BYTES = 1 << 20

#: Text of a sample, at most: a few compressed bytes may stand for gigabytes.
_MAX_SAMPLE_TEXT = 32 << 20

#: Compressed bytes that are read at a time to test a file, and bytes of its text.
_CHUNK_BYTES, _PIECE_BYTES = 8 << 20, 1 << 20


class RawText(NamedTuple):
    """Both ends of a file's text, and its size in bytes: an estimate for a compressed file, whose tail is empty."""

    head: bytes
    tail: bytes
    size: int


def is_compressed(uri: str) -> bool:
    """True for the names that Spark decompresses: ``.gz`` and ``.bz2``."""
    return uri.endswith((".gz", ".bz2"))


def read_ends(files: Files, raw: dict[str, Any]) -> RawText:
    """Look at a raw file. Raises Refused for a file that no row can be read from."""
    uri, size = raw["uri"], raw["size"]
    if is_compressed(uri):
        sample = files.read(uri, _SAMPLE_BYTES)
        text, consumed = _decompressed(uri, sample)
        # A sample that is the whole file has shown all of its text.
        ends = RawText(text[:END_BYTES], b"", len(text) * size // max(1, consumed))
    else:
        head = files.read(uri, END_BYTES)
        tail = files.read(uri, END_BYTES, start=size - END_BYTES) if size > END_BYTES else head
        ends = RawText(head, tail, size)
    if has_only_carriage_returns(ends.head):
        raise Refused("its lines end with CR alone; convert them to LF, for instance with tr '\\r' '\\n'")
    return ends


def _decompressed(uri: str, sample: bytes) -> tuple[bytes, int]:
    """(the text at the start of a compressed file, the bytes of `sample` that it comes from)."""
    try:
        if uri.endswith(".gz"):
            text, rest = b"", sample
            while rest and len(text) < END_BYTES:  # a file may have several members
                inflate = zlib.decompressobj(wbits=31)
                text += inflate.decompress(rest, _MAX_SAMPLE_TEXT)
                if not inflate.eof:
                    return text, len(sample) - len(inflate.unconsumed_tail)
                rest = inflate.unused_data
            return text, len(sample) - len(rest)
        expand = bz2.BZ2Decompressor()
        return expand.decompress(sample, _MAX_SAMPLE_TEXT) if sample else b"", len(sample) - len(expand.unused_data)
    except (zlib.error, OSError, EOFError) as error:
        raise Refused(f"it cannot be decompressed: {error}") from None


def damage_of(files: Files, raw: dict[str, Any]) -> str | None:
    """Reason why a compressed file cannot be decompressed, by doing so; None if it can, or is not compressed."""
    uri, size = raw["uri"], raw["size"]
    if not is_compressed(uri) or not size:
        return None
    source = io.BufferedReader(_Source(files, uri, size), _CHUNK_BYTES)
    try:
        # In pieces, because a few bytes may stand for gigabytes.
        with gzip.GzipFile(fileobj=source) if uri.endswith(".gz") else bz2.BZ2File(source) as text:
            while text.read(_PIECE_BYTES):
                pass
    except (zlib.error, OSError, EOFError) as error:
        return str(error)
    return None


class _Source(io.RawIOBase):
    """The bytes of a file in order."""

    def __init__(self, files: Files, uri: str, size: int) -> None:
        super().__init__()
        self._files, self._uri, self._size, self._position = files, uri, size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        limit = min(len(buffer), self._size - self._position)
        content = self._files.read(self._uri, limit, start=self._position) if limit else b""
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
