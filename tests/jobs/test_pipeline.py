"""The rounds of a job: what is streamed, what is done image by image, and when it goes on."""

from collections.abc import Generator, Iterator
from typing import Any

import pytest

from jobs import isolate, pipeline
from jobs.actor import Pool
from jobs.chunks import Chunk
from jobs.cluster import ClusterError
from jobs.encode import Receipt
from jobs.source import Work
from jobs.stall import CrowdedError, StreakError
from jobs.supervisor import Isolation
from jobs.write import Counts

POOL = Pool(
    min_actors=2, max_actors=4, initial_actors=3, gpus_per_actor=0, threads=1, batch_size=None
)


def work(number: int) -> list[Work]:
    return [
        Work(chunk=Chunk(chunk_id=f"{n:08d}", kind="objects", num_images=1)) for n in range(number)
    ]


def receipt(chunk_id: str) -> Receipt:
    counts = Counts(images=1, detections=0, errors={})
    return Receipt(chunk_id=chunk_id, rows=1, counts=counts, seconds={}, retries={})


class Rounds:
    """In the place of Ray: what each round streams before it ends, and how it ends."""

    def __init__(self, *rounds: tuple[int, Exception | None]) -> None:
        self.rounds = list(rounds)
        self.actors: list[tuple[int, int, int]] = []
        self.tried: list[int] = []
        self.alone: list[int] = []
        self.broken = False

    def stream(
        self, left: dict[str, Work], raised: list[str], isolation: Isolation
    ) -> Iterator[Receipt]:
        pool = isolation.pool
        self.actors.append((pool.min_actors, pool.max_actors, pool.initial_actors))
        number, error = self.rounds.pop(0)
        for name in list(left)[:number]:
            del left[name]
            yield receipt(name)
        if error is not None:
            raise error

    def refuse_broken(self, suspects: list[Work], isolation: Isolation, streak: str) -> None:
        self.tried.append(len(suspects))
        if self.broken:
            raise ClusterError(streak)

    def run(
        self, suspects: list[Work], isolation: Isolation
    ) -> Generator[Receipt, None, list[str]]:
        self.alone.append(len(suspects))
        yield from (receipt(item.chunk.chunk_id) for item in suspects[1:])
        return [f"chunk {suspects[0].chunk.chunk_id} cannot be read"]

    def job(self, number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Receipt]:
        monkeypatch.setattr(pipeline, "_stream", self.stream)
        monkeypatch.setattr(isolate, "refuse_broken", self.refuse_broken)
        monkeypatch.setattr(isolate, "run", self.run)
        nothing: Any = None
        return pipeline.run(work(number), nothing, nothing, nothing, POOL, {})


def test_streaks_part_ever_more_chunks_and_what_cannot_be_done_is_named_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streak = StreakError("21 chunks in a row lost theirs")
    rounds = Rounds((0, streak), (0, streak), (5, streak), (150, None))
    done: list[str] = []
    with pytest.raises(ClusterError, match=r"4 chunks could not be done\. chunk 00000000 cannot"):
        done.extend(one.chunk_id for one in rounds.job(300, monkeypatch))
    # Twice as many where nothing was done, as many where something was; at the end all that is left.
    assert rounds.alone == [20, 40, 80, 5]
    assert rounds.tried == [300, 280, 235]
    assert len(set(done)) == len(done) == 300 - 4


def test_a_broken_machine_ends_the_job_before_anything_is_parted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounds = Rounds((3, StreakError("21 chunks in a row lost theirs")))
    rounds.broken = True
    with pytest.raises(ClusterError, match="21 chunks in a row"):
        list(rounds.job(300, monkeypatch))
    assert rounds.alone == []


def test_a_small_job_of_which_nothing_is_done_is_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = Rounds((0, None))
    rounds.broken = True
    with pytest.raises(ClusterError, match="not one chunk could be done"):
        list(rounds.job(isolate.PROBES + 1, monkeypatch))
    # So few may all be bad.
    rounds = Rounds((0, None))
    with pytest.raises(ClusterError, match="1 chunks could not be done"):
        list(rounds.job(isolate.PROBES, monkeypatch))
    assert rounds.tried == []


def test_a_crowd_goes_on_with_fewer_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = Rounds((2, CrowdedError(1.5, 3)), (1, CrowdedError(1, 1)), (7, None))
    done = [one.chunk_id for one in rounds.job(10, monkeypatch)]
    assert done == [f"{n:08d}" for n in range(10)]
    assert rounds.actors == [(2, 4, 3), (2, 3, 3), (1, 1, 1)]
    assert rounds.tried == rounds.alone == []
