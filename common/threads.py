"""Work that waits for files, in threads."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

PART = 64  # items of one task


def map_in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """The results in the order of the items, as of ThreadPoolExecutor().map.

    That makes a task of 2 KiB for each item before the first has run: for a million rows 2 GiB. Here PART items share one.
    """
    parts = (items[start : start + PART] for start in range(0, len(items), PART))
    with ThreadPoolExecutor() as pool:
        for results in pool.map(lambda part: [function(item) for item in part], parts):
            yield from results
