"""Training goes on over a damaged sample: another takes its place, it is counted, and there is a limit."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable
from hashlib import blake2b
from typing import TypeVar

log = logging.getLogger(__name__)
Sample = TypeVar("Sample")
DEFAULT_LIMIT = 20
_ATTEMPTS = 1000  # to find a good sample for one position
_FAR = 2**40  # positions that no training reaches


class BadSamples:
    """Samples that could not be read, over all loading processes of a rank, told apart by their errors.

    An error names the file and the record, so the same sample counts once, however often it is visited.

    Args:
        limit: so many are skipped; the next one ends the run. 0: the first one does.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        if limit < 0:
            raise ValueError(f"the limit of bad samples must be at least 0, got {limit}")
        self.limit = limit
        self._count = multiprocessing.Value("q", 0)
        self._seen = multiprocessing.Array("Q", limit + 1, lock=False)  # under the lock of _count

    @property
    def count(self) -> int:
        """How many there were so far, at most ``limit + 1``."""
        return int(self._count.value)

    def add(self, error: Exception) -> None:
        """Count a sample by its error.

        Raises:
            ValueError: there are more than ``limit``.
        """
        key = int.from_bytes(blake2b(str(error).encode(), digest_size=8).digest())
        with self._count.get_lock():
            known = key in self._seen[: self._count.value]
            if not known and self._count.value <= self.limit:
                self._seen[self._count.value] = key
                self._count.value += 1
            count = self._count.value
        if count > self.limit:
            raise ValueError(
                f"{count} training samples could not be read, data.max_bad_samples allows {self.limit}; "
                f"the last one: {error}"
            ) from error
        if not known:
            log.warning("training sample skipped (%d of at most %d): %s", count, self.limit, error)

    def good(self, read: Callable[[int], Sample], position: int) -> Sample:
        """``read(position)``, or of another position that depends on this one alone where that is damaged.

        So it stays the same for any number of workers, and when a run is resumed.

        Raises:
            ValueError: there are more bad samples than ``limit``.
        """
        for attempt in range(_ATTEMPTS):
            try:
                return read(position + attempt * _FAR)
            except (ValueError, OSError) as error:
                self.add(error)
        raise ValueError(f"{_ATTEMPTS} training samples in a row could not be read")
