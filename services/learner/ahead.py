"""Things made in a thread, one after another, while the first of them are used already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar, overload

Source = TypeVar("Source")
Made = TypeVar("Made")


class Arriving(Sequence[Made], Generic[Made]):
    """What is being made: to look at an element waits for it, and raises what its making raised."""

    def __init__(self, futures: Sequence[Future[Made]]) -> None:
        self._futures = futures

    def __len__(self) -> int:
        return len(self._futures)

    @overload
    def __getitem__(self, place: int) -> Made: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Made]: ...

    def __getitem__(self, place: int | slice) -> Made | Sequence[Made]:
        if isinstance(place, slice):
            return tuple(each.result() for each in self._futures[place])
        return self._futures[place].result()


@contextmanager
def made_ahead(
    make: Callable[[Source], Made], sources: Sequence[Source], *, name: str
) -> Iterator[Arriving[Made]]:
    """`make` of each source, in order, in a thread of this name; all are made when it is left."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix=name) as thread:
        yield Arriving([thread.submit(make, source) for source in sources])
