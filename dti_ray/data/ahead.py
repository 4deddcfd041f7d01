"""An iterator that runs ahead of its reader, in a thread.

Stage: below pipeline. In: a generator. Out: the same items in the same order, made before they are asked for.
Invariant: no more than `size` items wait; an error comes out where it arose; `close` ends the thread.

    for packed in Ahead(slow(), 2, "slow"): ...     while one item is used, the next two are being made
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from queue import SimpleQueue
from typing import Generic, TypeVar

CLOSE_S = 30.0  # a thread that waits for Ray cannot be woken; it ends with the next task

Item = TypeVar("Item")
log = logging.getLogger(__name__)


class Ahead(Generic[Item]):
    """An iterator that runs in a thread of its own, so that the next items are there when they are asked for.

    An error comes out in its place. `close` ends the thread and closes the iterator; it must be called.

    Args:
        items: runs in the thread from now on.
        size: items that wait at most; the thread holds one more.
        name: of the thread.
    """

    def __init__(self, items: Generator[Item], size: int, name: str) -> None:
        self.items, self.name = items, name
        self.room = threading.Semaphore(size)
        self.waiting: SimpleQueue[tuple[Item] | BaseException] = SimpleQueue()
        self.is_open = True
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        found = self.waiting.get()
        if isinstance(found, BaseException):
            self.waiting.put(found)  # an iterator that has ended stays so
            raise found
        self.room.release()
        return found[0]

    def close(self) -> None:
        """End the thread; what it has made ahead is lost."""
        self.is_open = False
        self.room.release()
        self.thread.join(CLOSE_S)
        if self.thread.is_alive():
            log.warning("thread %s still waits for Ray after %.0f s", self.name, CLOSE_S)

    def _run(self) -> None:
        try:
            with closing(self.items):
                for item in self.items:
                    self.room.acquire()
                    if not self.is_open:
                        return
                    self.waiting.put((item,))
            self.waiting.put(StopIteration())
        except BaseException as error:  # noqa: BLE001 - whatever it is, the reader must hear of it
            self.waiting.put(error)
