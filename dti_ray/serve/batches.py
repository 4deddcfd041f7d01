"""Requests that wait together are answered together.

Stage: serving, in the process that holds the model. In: questions, one at a time. Out: their answers.
Invariant: one batch is computed at a time, in a thread; whatever came meanwhile is the next one, so a lone request
waits for nobody and batches grow with the load. A question whose asker has left is not computed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


class Batches(Generic[Q, A]):
    """Collects questions; to be used within one event loop.

    Args:
        answer: returns one answer per question; is called in a thread, never twice at a time.
        most: questions of a batch.
    """

    def __init__(self, answer: Callable[[Sequence[Q]], Sequence[A]], most: int) -> None:
        self.answer, self.most = answer, most
        self.thread = ThreadPoolExecutor(1, "batches")  # one and the same, whose pool of threads PyTorch keeps
        self.waiting: deque[tuple[Q, asyncio.Future[A]]] = deque()
        self.work: asyncio.Task[None] | None = None

    async def ask(self, question: Q) -> A:
        """Return the answer; what `answer` raises is raised for all questions of the batch."""
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((question, future))
        if self.work is None or self.work.done():
            self.work = asyncio.create_task(self._answer_all())
        return await future

    async def _answer_all(self) -> None:
        while batch := self._next():
            questions, futures = zip(*batch, strict=True)
            try:
                answers = await asyncio.get_running_loop().run_in_executor(self.thread, self.answer, questions)
            except Exception as error:  # noqa: BLE001 - whoever asked is told
                for future in futures:
                    if not future.done():
                        future.set_exception(error)
            else:
                for future, answer in zip(futures, answers, strict=True):
                    if not future.done():
                        future.set_result(answer)

    def _next(self) -> list[tuple[Q, asyncio.Future[A]]]:
        """Return those that wait the longest and still do."""
        batch: list[tuple[Q, asyncio.Future[A]]] = []
        while self.waiting and len(batch) < self.most:
            question, future = self.waiting.popleft()
            if not future.done():
                batch.append((question, future))
        return batch
