from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.encode import encode_and_write, receipts
from jobs.envelope import ENVELOPE, Envelope, chunk_id_of, failed, seal, unseal
from jobs.storage import open_store
from jobs.store import StorageError

TABLE = pa.table({"key": ["a", "b"], "data": pa.array([bytes(5000), None], pa.large_binary())})


def test_round_trip() -> None:
    sealed = seal(
        Envelope(
            chunk_id="00000007",
            positions=(0, 5),
            seconds={"read": 0.5, "predict": 2.0},
            retries={"503": 3},
            table=TABLE,
        )
    )
    assert sealed.schema == ENVELOPE
    assert sealed.num_rows == 1
    opened = unseal(sealed)
    assert (opened.chunk_id, opened.positions) == ("00000007", (0, 5))
    assert opened.seconds == {"read": 0.5, "predict": 2.0}
    assert opened.retries == {"503": 3}
    assert opened.table.equals(TABLE)


@given(
    st.text(), st.none() | st.lists(st.integers(0, 2**40)), st.dictionaries(st.text(), st.floats())
)
def test_everything_that_travels_comes_back(
    chunk_id: str, positions: list[int] | None, seconds: dict[str, float]
) -> None:
    expected = None if positions is None else tuple(positions)
    opened = unseal(
        seal(Envelope(chunk_id=chunk_id, positions=expected, seconds=seconds, table=TABLE))
    )
    assert (opened.chunk_id, opened.positions) == (chunk_id, expected)
    assert {k: str(v) for k, v in opened.seconds.items()} == {k: str(v) for k, v in seconds.items()}


def test_no_positions_are_all_of_them() -> None:
    assert unseal(seal(Envelope(chunk_id="1", table=TABLE))).positions is None
    assert unseal(seal(Envelope(chunk_id="1", positions=(), table=TABLE))).positions == ()


def test_an_empty_table_keeps_its_schema() -> None:
    empty = TABLE.slice(0, 0)
    assert unseal(seal(Envelope(chunk_id="1", table=empty))).table.schema == TABLE.schema


def test_the_inner_table_is_not_copied() -> None:
    sealed = seal(Envelope(chunk_id="1", table=TABLE))
    payload = sealed["table"].chunk(0).buffers()[2]
    inner = unseal(sealed).table["data"].chunk(0).buffers()[2]
    assert payload.address <= inner.address
    assert inner.address + inner.size <= payload.address + payload.size


def test_a_row_of_a_larger_block() -> None:
    tables = [TABLE.slice(0, number) for number in range(3)]
    blocks = [
        seal(Envelope(chunk_id=f"{n}", positions=(n,), table=table))
        for n, table in enumerate(tables)
    ]
    for together in (pa.concat_tables(blocks), pa.concat_tables(blocks).combine_chunks()):
        opened = [unseal(together.slice(n, 1)) for n in range(3)]
        assert [one.chunk_id for one in opened] == ["0", "1", "2"]
        assert [one.positions for one in opened] == [(0,), (1,), (2,)]
        assert [one.table for one in opened] == tables


@pytest.mark.parametrize("num_chunks", [0, 2])
def test_one_chunk_at_a_time(num_chunks: int) -> None:
    block = pa.concat_tables([seal(Envelope(chunk_id="1", table=TABLE))] * 2).slice(0, num_chunks)
    with pytest.raises(AssertionError, match=f"a block of {num_chunks} chunks"):
        unseal(block)


class AwkwardError(Exception):
    """One that pickle takes apart and cannot put together."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


@pytest.mark.parametrize(
    ("error", "class_", "message"),
    [
        (StorageError("s3://b/x is gone"), StorageError, "s3://b/x is gone"),
        (KeyError("label"), KeyError, "'label'"),
        (AwkwardError("two", "words"), RuntimeError, "AwkwardError: two words"),
    ],
)
def test_what_goes_wrong_travels_to_the_driver(
    error: Exception, class_: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(type(error)) as caught:
        raise error
    block = failed("00000007", caught.value)
    assert block.schema == ENVELOPE
    assert chunk_id_of(block) == "00000007"
    # The next stages hand it on.
    with pytest.raises(class_):
        unseal(block)
    receipt = encode_and_write(block, open_store(str(tmp_path)), {}, {})
    assert receipt["chunk_id"].to_pylist() == ["00000007"]
    with pytest.raises(class_) as found:
        list(receipts(receipt))
    assert str(found.value) == message
    if class_ is not RuntimeError:
        assert any("raise error" in note for note in found.value.__notes__)
    assert list(tmp_path.iterdir()) == []
