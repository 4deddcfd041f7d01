r"""Text files as blocks of whole lines, so that memory is bounded and one bad line never hides the next.

Stage: sources. In: a stream of bytes. Out: blocks; an estimate of how many lines there are.
Invariant: blocks put together are the file; each but the last ends with a line end, and with `quoting` one that lies
outside of quotation marks, as long as those come in pairs. The same file gives the same blocks every time.

    b'1,"a\nb"\n2,c\n3,'  + b'd\n'     →     b'1,"a\nb"\n2,c\n'    b'3,d\n'
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

from dti_ray.data.sources.files import stream
from dti_ray.errors import Fault, InputError
from dti_ray.storage import Storage

BLOCK_BYTES = 16 << 20
QUOTED_BYTES = 64 << 20  # a quotation mark that is still open after so many bytes is a stray one
LINE_BYTES = 512 << 20  # nothing that is a log has longer lines
COUNTED_BYTES = 32 << 20  # lines are counted up to here, and estimated beyond
BOM = b"\xef\xbb\xbf"
QUOTE = b'"'


def blocks(storage: Storage, file: str, quoting: bool = False) -> Iterator[bytes]:
    """Yield a file's text in blocks of whole lines.

    Raises:
        InputError: the file is missing, damaged, or has a line of more than 512 MB; StorageError: it cannot be reached.
    """
    with stream(storage, file) as (source, _):
        yield from cut(source, storage.display(file), quoting)


def cut(source: IO[bytes], where: str, quoting: bool) -> Iterator[bytes]:
    """Cut a stream into blocks of whole lines; `where` names it in errors."""
    held = (source.read(BLOCK_BYTES) or b"").removeprefix(BOM)
    while chunk := source.read(BLOCK_BYTES):
        end = _end(held, quoting)
        if end:
            yield held[:end]
        elif len(held) > LINE_BYTES:
            problem = f"has a line of more than {LINE_BYTES >> 20} MB"
            raise InputError(Fault(where, problem, "lines that end with a line feed"))
        held = held[end:] + chunk
    if held:
        yield held


def count(storage: Storage, file: str) -> int:
    """Return the number of line ends (a last line without one counts), estimated from the first 32 MB.

    Raises:
        InputError: the file is missing or damaged; StorageError: it cannot be reached.
    """
    lines, size, last = 0, 0, b""
    with stream(storage, file) as (source, progress):
        while chunk := source.read(1 << 20):
            lines, size, last = lines + chunk.count(b"\n"), size + len(chunk), chunk
            if size >= COUNTED_BYTES:
                return round(lines / progress.share())
    return lines + bool(last and not last.endswith(b"\n"))


def split(block: bytes) -> list[bytes]:
    """Return a block's lines without those that are blank."""
    return [line for line in block.split(b"\n") if line.strip()]


def _end(block: bytes, quoting: bool) -> int:
    """Return where the last whole line ends; 0 where there is none yet."""
    end = last = block.rfind(b"\n") + 1
    if not quoting:
        return end
    is_open = block.count(QUOTE, 0, end) % 2
    while end and is_open:
        before = block.rfind(b"\n", 0, block.rfind(QUOTE, 0, end) + 1) + 1
        is_open ^= block.count(QUOTE, before, end) % 2
        end = before
    return end or (last if len(block) > QUOTED_BYTES else 0)
