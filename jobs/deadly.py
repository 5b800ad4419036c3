"""Shards that end the process that looks into them: which ones, and whether it is not the machine."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import pyarrow as pa

from jobs.cluster import ClusterError
from jobs.detect import Input, objects_of
from jobs.store import ObjectInfo, Store
from jobs.tasks import LostCallError, alone

# Shards in a row, of those that are indexed alone, that may end their process: a broken machine would end it
# with all of them, and what a plan says of a shard is final.
MOST_DEADLY = 10

Result = TypeVar("Result")


class Deadly(Generic[Result]):
    """Indexes shards one by one where one of them ended the process, and has a verdict for it."""

    def __init__(
        self,
        found: Input,
        look_into: Callable[..., list[Result]],
        verdict: Callable[[ObjectInfo, str], Result],
    ) -> None:
        """Make one for an input.

        Args:
            found: The input.
            look_into: Called with a store, a table of shards and more; gives what is in them.
            verdict: Gives what stands for a shard that cannot be looked into, and why.
        """
        self._found, self._look_into, self._verdict = found, look_into, verdict
        self._names: list[str] = []
        self._in_a_row = 0

    def one_by_one(self, store: Store, shards: pa.Table, *more: Any) -> list[Result]:
        """Return what is in some shards, a table of `detect.OBJECTS`.

        Raises:
            ClusterError: Too many in a row end each process that looks into them.
        """
        indexed: list[Result] = []
        for number in range(shards.num_rows):
            shard = shards.slice(number, 1)
            try:
                indexed += alone(self._look_into, store, shard, *more)
                self._in_a_row = 0
            except LostCallError as error:
                (info,) = objects_of(shard)
                self._names.append(info.path)
                self._in_a_row += 1
                if self._in_a_row > MOST_DEADLY:
                    raise self._hopeless(f"the last {self._in_a_row} in a row", error) from error
                indexed.append(self._verdict(info, str(error)))
        return indexed

    def refuse_if_all(self) -> None:
        """Tell a broken machine from bad shards.

        Raises:
            ClusterError: Not one shard could be looked into.
        """
        if len(self._names) == self._found.objects.num_rows:
            raise self._hopeless("all that there are", "see Ray's logs")

    def _hopeless(self, which: str, why: object) -> ClusterError:
        return ClusterError(
            f"{len(self._names)} shards of {self._found.store.uri} end the process that looks into them, {which} "
            f"({', '.join(self._names[:5])}; {why}): if a job on good shards ends so too, the machine is to "
            "blame, else take them away"
        )
