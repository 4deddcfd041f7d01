"""Pieces of a log as scratch rows: nothing lost, users together, the same bytes again; and what a task reports."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import ipc
from pyarrow import parquet as pq

from dti_ray.config.data import DataConfig
from dti_ray.data.gather import read_batch
from dti_ray.data.scatter import EXAMPLES, ROWS, Scattered, collect_items, first_of_each, of_drawn_users, scatter
from dti_ray.data.sources import lines, locate
from dti_ray.data.sources.raw import USER, Piece, RawLog
from dti_ray.errors import Fault, InputError, StorageError
from dti_ray.storage import Storage

HEADING = "user_id,item_id,rating,timestamp"
ITEM_IDS = pa.array([str(item) for item in range(10)])
PARTITIONS = 4
ROWS_CSV = [
    *(f"u{at % 7},{at % 10},{at % 5 + 1},{1_700_000_000 + at}" for at in range(60)),
    ",1,3,5",
    "u1,99,3,5",
    "u1,1,good,5",
    "u2,1,bad,6",
    "u3,1",
    "u3,1,3,noon",
    *(f"u4,{at},x,9" for at in range(5)),
]


def tabular(path: Path, **settings: object) -> tuple[DataConfig, RawLog]:
    config = DataConfig.model_validate({"source": "tabular", "path": str(path), **settings})
    return config, locate(config, Storage(str(path.parent)))


def write_csv(path: Path, rows: list[str], heading: str = HEADING) -> Path:
    path.write_text("\n".join([heading, *rows]) + "\n", encoding="utf-8")
    return path


def scatter_all(raw: RawLog, config: DataConfig, storage: Storage) -> list[Scattered]:
    return [
        scatter(number, piece, raw, ITEM_IDS, config, PARTITIONS, storage, "scratch")
        for number, piece in enumerate(raw.pieces())
    ]


def rows_of(storage: Storage, found: list[Scattered]) -> list[dict[str, object]]:
    blocks = [block for one in found for block in one.blocks]
    return [row for block in blocks for p in range(PARTITIONS) for row in read_batch(storage, block, p).to_pylist()]


def test_every_raw_row_is_in_the_partition_of_its_user_once_and_in_order(tmp_path: Path) -> None:
    config, raw = tabular(write_csv(tmp_path / "log.csv", ROWS_CSV))
    storage = Storage(str(tmp_path))
    (found,) = scatter_all(raw, config, storage)
    assert found.blocks == ["scratch/rows-00000-00000.arrow"]
    seen = []
    for partition in range(PARTITIONS):
        batch = read_batch(storage, found.blocks[0], partition)
        assert batch.schema.equals(ROWS)
        for is_good in (True, False):
            places = [row["row"] for row in batch.to_pylist() if (row["reason"] is None) is is_good]
            assert places == sorted(places)
            seen += places
        assert {zlib.crc32((user or "").encode()) % PARTITIONS for user in batch["user_id"].to_pylist()} <= {partition}
    assert sorted(seen) == list(range(1, len(ROWS_CSV) + 1))


def test_task_reports_counts_examples_and_kinds(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "log.csv", ROWS_CSV)
    config, raw = tabular(path)
    (found,) = scatter_all(raw, config, Storage(str(tmp_path)))
    assert found.rows == len(ROWS_CSV)
    assert found.refused == {
        "null_user": 1, "item_not_in_catalogue": 1, "rating_not_numeric": 7,
        "wrong_number_of_fields": 1, "time_not_understood": 1,
    }  # fmt: skip
    assert found.examples["rating_not_numeric"] == [
        f"{path} row 63 (user='u1' item='1' label='good' time='5')",
        f"{path} row 64 (user='u2' item='1' label='bad' time='6')",
        f"{path} row 67 (user='u4' item='0' label='x' time='9')",
    ]
    assert found.examples["wrong_number_of_fields"] == [f"{path} row 65"]
    assert found.kinds == {"SECONDS": 60}
    assert found.first_of_kind == {"SECONDS": (str(path), 1, 1_700_000_000)}
    assert Scattered(**json.loads(json.dumps(asdict(found)))).refused == found.refused


def test_task_that_runs_again_writes_the_same_bytes_to_the_same_names(tmp_path: Path) -> None:
    config, raw = tabular(write_csv(tmp_path / "log.csv", ROWS_CSV))
    contents = []
    for root in ("a", "b"):
        storage = Storage(str(tmp_path / root))
        for _ in range(2):
            found = scatter_all(raw, config, storage)
        contents.append({path: storage.read(path) for path in storage.list("scratch")})
    assert contents[0] == contents[1]
    assert list(contents[0]) == found[0].blocks


def test_large_piece_becomes_several_blocks_and_loses_nothing(tmp_path: Path) -> None:
    rows = 300_000
    table = pa.table(
        {
            "user_id": pa.array([at % 1000 for at in range(rows)]),
            "item_id": pa.array([at % 11 for at in range(rows)]),
            "rating": pa.array([float(at % 6) for at in range(rows)]),
            "timestamp": pa.array(range(rows)),
        }
    )
    pq.write_table(table, tmp_path / "log.parquet")
    config, raw = tabular(tmp_path / "log.parquet", shard_interactions=100_000)
    storage = Storage(str(tmp_path))
    (found,) = scatter_all(raw, config, storage)
    assert found.blocks == [f"scratch/rows-00000-0000{block}.arrow" for block in range(3)]
    assert (found.rows, found.refused) == (rows, {"item_not_in_catalogue": rows // 11})
    assert len(found.examples["item_not_in_catalogue"]) == EXAMPLES
    assert found.kinds == {"SMALL": rows - rows // 11}
    batches = [read_batch(storage, block, p) for block in found.blocks for p in range(PARTITIONS)]
    assert sorted(row for batch in batches for row in batch["row"].to_pylist()) == list(range(1, rows + 1))


def test_json_whose_types_change_from_block_to_block_is_read_as_one_column(tmp_path: Path, monkeypatch) -> None:
    trees = [
        {"user_id": user, "item_id": item, "rating": rating, "timestamp": time}
        for user, item, rating, time in [
            *((7, 1, 4, 1_700_000_000 + at) for at in range(50)),
            *((7.0, "1", 4.5, f"{1_700_000_100 + at}") for at in range(50)),
            *(("7", 1.0, "5", 1_700_000_200.5 + at) for at in range(50)),
        ]
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, trees)))
    monkeypatch.setattr(lines, "BLOCK_BYTES", 1000)
    config, raw = tabular(tmp_path / "log.jsonl")
    (piece,) = raw.pieces()
    assert len({batch.schema.field("user_id").type for batch in raw.batches(piece)}) > 1
    storage = Storage(str(tmp_path))
    found = scatter_all(raw, config, storage)
    assert found[0].refused == {}
    assert {(row["user_id"], row["item"], row["label"]) for row in rows_of(storage, found)} == {("7", 1, 1)}


@dataclass(frozen=True)
class Interrupted(RawLog):
    """A log whose storage fails in the middle of a piece, so often as `failures` says."""

    failures: list[OSError] = field(default_factory=list)

    def batches(self, piece: Piece) -> Iterator[pa.RecordBatch]:
        for at, batch in enumerate(super().batches(piece)):
            if at == 1 and self.failures:
                raise StorageError(Fault("s3://log", "cannot be read")) from self.failures.pop()
            yield batch


@pytest.mark.parametrize("times", [1, 3])
def test_piece_that_is_read_again_after_a_failure_counts_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", 200)
    config, raw = tabular(write_csv(tmp_path / "log.csv", ROWS_CSV), shard_interactions=5)
    storage = Storage(str(tmp_path / "a"))
    expected = scatter_all(raw, config, storage)
    assert len(expected[0].blocks) > 3
    failures = [OSError("connection refused") for _ in range(times)]
    shaky = Interrupted(**{part.name: getattr(raw, part.name) for part in fields(RawLog)}, failures=failures)
    shaky.storage.retry_after_s = (0, 0)
    other = Storage(str(tmp_path / "b"))
    if times > len(shaky.storage.retry_after_s):
        with pytest.raises(StorageError, match="s3://log: cannot be read"):
            scatter_all(shaky, config, other)
        return
    assert scatter_all(shaky, config, other) == expected
    assert rows_of(other, expected) == rows_of(storage, expected)


def test_damaged_file_is_raised_or_reported_as_the_configuration_says(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"user_id": ["u"] * 9, "item_id": [1] * 9, "rating": [4] * 9, "timestamp": [5] * 9}), path)
    config, raw = tabular(path, on_bad_file="quarantine")
    path.write_bytes(path.read_bytes()[:-20])
    storage = Storage(str(tmp_path))
    (found,) = scatter_all(raw, config, storage)
    assert (found.rows, found.blocks, found.refused) == (0, [], {})
    assert f"{path}: is damaged: " in found.problem
    with pytest.raises(InputError, match=r"log\.parquet: is damaged: "):
        scatter_all(raw, config.model_copy(update={"on_bad_file": "fail"}), storage)


def test_share_of_users_keeps_all_or_nothing_of_each_and_smaller_shares_lie_within_larger_ones() -> None:
    users = [f"u{at % 2_000}" for at in range(6_000)]
    rows = pa.table({USER: [*users, None, " "]})
    kept = {share: of_drawn_users(rows, share)[USER].to_pylist() for share in (0.01, 0.1, 0.5, 1.0)}
    assert kept[1.0] == users, "nobody's rows belong to no share"
    assert of_drawn_users(rows, None).equals(rows)
    drawn = [set(names) for names in kept.values()]
    assert drawn[0] < drawn[1] < drawn[2]
    for share, names in kept.items():
        assert sorted(names) == sorted(3 * list(set(names)))
        assert len(set(names)) == pytest.approx(2_000 * share, abs=4 * (2_000 * share * (1.001 - share)) ** 0.5)


def test_users_who_are_left_out_are_neither_refused_nor_counted(tmp_path: Path) -> None:
    config, raw = tabular(write_csv(tmp_path / "log.csv", ROWS_CSV), user_fraction=0.5)
    (found,) = scatter_all(raw, config, Storage(str(tmp_path)))
    seen = rows_of(Storage(str(tmp_path)), [found])
    drawn = {row["user_id"] for row in seen}
    theirs = [line for line in ROWS_CSV if line.split(",")[0] in drawn and line.count(",") == HEADING.count(",")]
    assert 0 < len(drawn) < 7
    assert found.rows == len(seen) == len(theirs), "of a broken line nobody knows whose it is"


def test_scratch_file_is_compressed_arrow_with_one_batch_per_partition(tmp_path: Path) -> None:
    config, raw = tabular(write_csv(tmp_path / "log.csv", ["u1,1,4,5", "u1,2,4,6"]))
    storage = Storage(str(tmp_path))
    (found,) = scatter_all(raw, config, storage)
    with ipc.open_file(tmp_path / found.blocks[0]) as batches:
        sizes = [len(batches.get_batch(number)) for number in range(batches.num_record_batches)]
    assert sorted(sizes) == [0, 0, 0, 2]


# Items of a log without a catalogue.


def test_items_of_a_log_have_the_texts_of_their_first_row(tmp_path: Path) -> None:
    heading = "user_id,item_id,rating,timestamp,title,brand"
    rows = ["u,2,1,1,,x", "u,1,1,2,one,y", "u,2,1,3,two,z", "u,,1,4,none,n", "u, ,1,5,none,n", "u,1,1,6,uno,w"]
    mapping = {"text": ["title", "brand"]}
    _, raw = tabular(write_csv(tmp_path / "log.csv", rows, heading), columns=mapping)
    (piece,) = raw.pieces()
    expected = [{"item_id": "2", "title": "", "brand": "x"}, {"item_id": "1", "title": "one", "brand": "y"}]
    assert collect_items(piece, raw).to_pylist() == expected

    table = pa.table(
        {
            "user_id": ["u"] * 6, "rating": [1] * 6, "timestamp": [1] * 6, "item_id": [2.0, 1.0, 2.0, None, None, 1.0],
            "title": [None, "one", "two", "none", "none", "uno"], "brand": list("xyznnw"),
        }
    )  # fmt: skip
    pq.write_table(table, tmp_path / "log.parquet")
    _, raw = tabular(tmp_path / "log.parquet", columns=mapping)
    (piece,) = raw.pieces()
    assert collect_items(piece, raw).to_pylist() == expected, "as in the other format"


def test_items_alone_and_an_empty_log(tmp_path: Path) -> None:
    _, raw = tabular(write_csv(tmp_path / "log.csv", ["u,2,1,1", "u,1,1,2", "u,2,1,3"]))
    (piece,) = raw.pieces()
    assert collect_items(piece, raw).to_pylist() == [{"item_id": "2"}, {"item_id": "1"}]
    _, raw = tabular(write_csv(tmp_path / "log.csv", []))
    (piece,) = raw.pieces()
    assert collect_items(piece, raw).to_pylist() == []


rows_of_items = st.lists(st.tuples(st.sampled_from(["a", "b", "", "c "]), st.integers(0, 5).map(str)), max_size=20)


@given(rows_of_items, st.integers(0, 20))
def test_first_of_each_is_the_same_for_all_at_once_and_in_parts(rows: list[tuple[str, str]], cut: int) -> None:
    items, texts = (pa.array([row[at] for row in rows], pa.string()) for at in range(2))
    table = pa.table({"item_id": items, "x_first": texts})
    expected: dict[str, str] = {}
    for item, text in rows:
        if item.strip():
            expected.setdefault(item, text)
    parts = pa.concat_tables([first_of_each(table.slice(0, cut)), first_of_each(table.slice(cut))])
    for found in (first_of_each(table), first_of_each(parts)):
        assert dict(zip(found["item_id"].to_pylist(), found["x_first"].to_pylist(), strict=True)) == expected
        assert found.column_names == ["item_id", "x_first"]
