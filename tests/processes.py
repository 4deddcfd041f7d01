"""The processes that a test has started, found by name so that it can end one of them."""

from __future__ import annotations

from collections.abc import Iterator

import psutil


def living(words: str, pid: int | None = None) -> Iterator[psutil.Process]:
    """Yield the processes below one whose command has these words; those that end meanwhile are left out.

    Args:
        words: part of the command line, which is how Ray names its workers.
        pid: of the process above them; None: this one.
    """
    for process in psutil.Process(pid).children(recursive=True):
        try:
            command = " ".join(process.cmdline())
        except psutil.NoSuchProcess:  # a zombie too: it has ended, its parent has not asked how
            continue
        if words in command:
            yield process
