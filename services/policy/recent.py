"""Answers remembered for seconds, so that a burst of requests does not ask another component the same each time."""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Values that are forgotten `seconds` after they were put in, and the oldest ones when there are too many."""

    def __init__(self, seconds: float, *, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._most = most
        self._clock = clock
        self._values: OrderedDict[K, tuple[float, V]] = OrderedDict()

    def get(self, key: K) -> V | None:
        until, value = self._values.get(key, (0.0, None))
        return value if value is not None and self._clock() < until else None

    def put(self, key: K, value: V, *, at_most: float = float("inf")) -> None:
        """Remember a value; `at_most` seconds, when it must be forgotten sooner than others."""
        seconds = min(self._seconds, at_most)
        if seconds <= 0:
            return
        self._values[key] = self._clock() + seconds, value
        self._values.move_to_end(key)
        while len(self._values) > self._most:
            self._values.popitem(last=False)
