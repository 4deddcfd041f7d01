"""Logs made into data sets by the real job: what is in them, and that nothing else decides it."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dti_ray.config import RunConfig, load_config
from dti_ray.data.interactions import Dataset, open_dataset, read_all, read_items, read_segment
from dti_ray.data.prepare import _at_rank, prepare
from dti_ray.data.ray_jobs import Watch
from dti_ray.data.sources import raw
from dti_ray.data.sources.get import fetch
from dti_ray.errors import InputError
from dti_ray.storage import Storage
from tests.logs import (
    NOON,
    contents,
    cut,
    expected_users,
    learnt,
    make_log,
    quarantined,
    tabular,
    users_of,
    write_lines,
    write_log,
)

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]

ITEMS = [(item, f"Film {item}", 1990 + item, "Drama") for item in range(1, 13)]
GOOD = [(user, item, item % 5 + 1, 100 * user + item // 2) for user in range(1, 8) for item in range(1, user + 5)]
BAD = [
    ("", 1, 3, 5),
    (1, "", 3, 5),
    (1, 1, "good", 5),
    (1, 1, 3, "noon"),
    (1, 99, 3, 5),
    (2, 1, 2, 200),  # an event of GOOD again
    ("lone", 1, 3, 5),
    (1, 2, 3),
]
REASONS = {
    "duplicate_event": 1,
    "item_not_in_catalogue": 1,
    "null_item": 1,
    "null_user": 1,
    "rating_not_numeric": 1,
    "time_not_understood": 1,
    "user_with_too_few_interactions": 1,
    "wrong_number_of_fields": 1,
}
LONE = "user_with_too_few_interactions"
SPLITS = ("user_time", "global_time", "leave_last")


def tiny(*overrides: str) -> RunConfig:
    return load_config([], ["data.name=tiny", "data.max_bad_fraction=0.2", *overrides])


def prepare_log(table: pa.Table, root: Path, *overrides: str, name: str = "log.csv") -> Dataset:
    """Write a table as one file and prepare it into a new root."""
    return prepare(tabular(write_log(root / "raw" / name, table), *overrides), Storage(str(root)))


def silent(done: int, total: int | None) -> None:
    """Report progress to nobody."""


def test_good_rows_are_laid_down_and_bad_ones_counted(tmp_path: Path, write_raw) -> None:
    folder = write_raw([*GOOD, *BAD], ITEMS)
    dataset = prepare(tiny(), Storage(str(tmp_path)))
    users = read_all(dataset)
    assert (dataset.users, dataset.interactions, dataset.items) == (7, len(GOOD), 12)
    assert users.user_ids.tolist() == [str(user) for user in range(1, 8)]
    assert sum(dataset.targets) == len(GOOD) == len(users.items)
    assert dataset.targets == tuple(np.bincount(users.splits, minlength=3))
    assert dataset.label_rate == pytest.approx(np.mean([row[2] > 3 for row in GOOD]))
    assert dataset.user_lengths == (0, 0, 3, 4), "5 to 7 interactions, and 8 to 11"
    assert dataset.item_words == (0, 0, 12), "Film 1 1991 Drama"
    assert dataset.quarantined == REASONS
    assert contents(dataset).keys() == {
        "manifest.json", "items.parquet", "interactions/part-00000.parquet", "quarantine/part-00000.parquet",
    }  # fmt: skip
    lines = (folder / "tiny.inter").read_text(encoding="utf-8").splitlines()
    refused = quarantined(dataset)
    assert Counter(row["reason"] for row in refused) == REASONS
    for row in refused:
        assert row["file"] == str(folder / "tiny.inter")
        user, item, rating, *time = lines[row["row"]].split("\t")  # row 1 follows the heading
        if row["reason"] != "wrong_number_of_fields":
            label = str(int(int(rating) > 3)) if row["reason"] in ("duplicate_event", LONE) else rating
            assert [row[name] or "" for name in ("user_id", "item_id", "label", "time")] == [user, item, label, *time]


def test_item_indices_point_into_the_stored_catalogue(tmp_path: Path, write_raw) -> None:
    write_raw(GOOD, ITEMS)
    dataset = prepare(tiny(), Storage(str(tmp_path)))
    ids = read_items(dataset)["item_id"].to_pylist()
    users = read_all(dataset)
    assert ids == sorted(str(item[0]) for item in ITEMS)
    first = [(int(ids[i]), int(t)) for i, t in zip(users.items[:5], users.times[:5], strict=True)]
    assert first == [(row[1], row[3]) for row in GOOD[:5]]


@pytest.mark.parametrize("split", SPLITS)
def test_data_set_holds_what_loops_over_the_rows_give(tmp_path: Path, split: str) -> None:
    log = make_log(800, users=30)
    dataset = prepare_log(log, tmp_path, f"data.split={split}", "data.leave_last=2", "data.shard_interactions=200")
    assert len({segment.shard for segment in dataset.segments}) == 4
    config = tabular("", f"data.split={split}", "data.leave_last=2")
    assert users_of(dataset) == expected_users(log.to_pylist(), config)
    assert len(quarantined(dataset)) == sum(dataset.quarantined.values()) == len(log) - dataset.interactions


@pytest.mark.parametrize("split", SPLITS)
def test_shards_are_the_same_for_shuffled_rows_and_any_number_of_files(tmp_path: Path, split: str) -> None:
    log = pa.concat_tables([make_log(500), make_log(500).slice(0, 40)])  # some events are there twice
    overrides = [f"data.split={split}", "data.shard_interactions=150", "data.segment_interactions=20"]
    first = prepare_log(log, tmp_path / "one", *overrides)
    assert len({segment.shard for segment in first.segments}) == 4
    assert first.quarantined["duplicate_event"] == 40
    for seed, parts in enumerate((1, 7)):
        root = tmp_path / f"parts-{parts}"
        for number, part in enumerate(cut(log, parts, seed)):
            write_log(root / "raw" / f"day={number}" / "part.csv", part)
        write_log(root / "raw" / "day=8" / "heading_alone.csv", log.slice(0, 0))
        dataset = prepare(tabular(root / "raw", *overrides), Storage(str(root)))
        assert learnt(dataset) == learnt(first)
        assert (dataset.segments, dataset.quarantined) == (first.segments, first.quarantined)


def test_pieces_of_a_parquet_file_make_the_same_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, path = make_log(600), tmp_path / "log.parquet"
    bad = log.slice(0, 7).set_column(2, "rating", pa.array([None] * 7, pa.int64()))
    pa.parquet.write_table(pa.concat_tables([log, bad]), path, row_group_size=50)
    whole = prepare(tabular(path), Storage(str(tmp_path / "whole")))
    monkeypatch.setattr(raw, "PIECE_ROWS", 120)
    steps: list[tuple[str, int, int]] = []
    cut_up = prepare(tabular(path), Storage(str(tmp_path / "cut")), Watch(lambda *step: steps.append(step)))
    assert ("rows", 6, 6) in steps, "two row groups each, and a short one more in the last"
    assert contents(cut_up) == contents(whole)
    assert [row["row"] for row in quarantined(cut_up) if row["reason"] == "rating_not_numeric"] == list(range(601, 608))


def test_log_of_unknown_column_names_loads_with_a_mapping_alone_in_every_format(tmp_path: Path) -> None:
    log = make_log(300)
    moments = pc.cast(pc.multiply(log["timestamp"], 1000), pa.timestamp("ms", "UTC"))
    titles = [f'Größe {item}, die "{item}."' for item in log["item_id"].to_pylist()]
    named = {
        "uid": log["user_id"], "sku": log["item_id"], "when": pc.strftime(moments, "%Y-%m-%dT%H:%M:%SZ"),
        "What Happened": pa.array(["buy" if rating > 3 else "view" for rating in log["rating"].to_pylist()]),
        "seen_ms": pc.multiply(log["rating"], 1000), "name": pa.array(titles), "row": pa.array(["x"] * 300),
    }  # fmt: skip
    table = pa.table({**named, "nothing": pa.nulls(300, pa.string())})
    mapping = [
        "data.columns.user=uid", "data.columns.item=sku", "data.columns.time=when",
        "data.label=`What Happened` in ('buy', 'like') and not seen_ms / 1000 < 2",
    ]  # fmt: skip
    made = {}
    for name in ("log.csv", "log.jsonl", "log.parquet"):
        root = tmp_path / name
        config = tabular(write_log(root / "raw" / name, table), *mapping).model_dump()
        config["data"]["columns"]["text"] = ("name", "row")
        made[name] = prepare(RunConfig.model_validate(config), Storage(str(root)))
    typed = table.set_column(2, "when", moments).set_column(0, "uid", pc.cast(log["user_id"], pa.float64()))
    config["data"]["path"] = str(write_log(tmp_path / "typed" / "log.parquet", typed))
    made["typed"] = prepare(RunConfig.model_validate(config), Storage(str(tmp_path / "typed")))
    first = made["log.csv"]
    assert users_of(first) == expected_users(log.to_pylist(), tabular(""))
    assert read_items(first).to_pylist()[3] == {"item_id": "11", "name": 'Größe 11, die "11."', "row": "x"}
    assert read_items(first).column_names == ["item_id", "name", "row"]
    for dataset in made.values():
        assert learnt(dataset) == learnt(first)


def test_log_without_a_catalogue_has_the_items_that_it_names(tmp_path: Path) -> None:
    for parts in (1, 3):
        root = tmp_path / str(parts)
        for number, part in enumerate(cut(make_log(300), parts)):
            write_log(root / "raw" / f"{number}.csv", part)
        dataset = prepare(tabular(root / "raw"), Storage(str(root)))
        assert read_items(dataset).to_pydict() == {"item_id": sorted(map(str, range(12)))}
        assert dataset.item_words == (12,), "without a text, the id is the text"


def test_catalogue_of_another_format_and_place_gives_items_and_texts(tmp_path: Path) -> None:
    items = pa.table(
        {"sku": range(14), "name": [f"Lamp {at}" for at in range(14)], "price": [0.5 * at for at in range(14)]}
    )
    catalogue = write_log(tmp_path / "items" / "items.parquet", items)
    mapping = [f"data.catalogue={catalogue}", "data.columns.catalogue_item=sku"]
    dataset = prepare_log(make_log(300), tmp_path, *mapping)
    assert dataset.items == 14, "two of them were never seen"
    assert read_items(dataset).slice(2, 1).to_pylist() == [{"item_id": "10", "name": "Lamp 10", "price": "5"}]


def test_shards_hold_every_user_once_and_segments_are_row_groups(tmp_path: Path) -> None:
    dataset = prepare_log(make_log(600), tmp_path, "data.shard_interactions=150", "data.segment_interactions=40")
    users = [user for s in dataset.segments for user in read_segment(dataset, s).user_ids.tolist()]
    assert len(users) == len(set(users)) == dataset.users
    assert users == read_all(dataset).user_ids.tolist()
    assert dataset.interactions == sum(segment.interactions for segment in dataset.segments)


@pytest.mark.parametrize("unit", ["seconds", "milliseconds", "nanoseconds", "timestamps"])
def test_boundaries_of_global_time_are_exact_in_any_unit(tmp_path: Path, unit: str) -> None:
    log = make_log(500)
    times: Any = log["timestamp"]
    scale = {"milliseconds": 10**3, "nanoseconds": 10**9}.get(unit, 1)
    times = pc.cast(times, pa.timestamp("s")) if unit == "timestamps" else pc.add(pc.multiply(times, scale), scale // 3)
    shares = ["data.train_fraction=0.57", "data.valid_fraction=0.21", "data.min_interactions=1"]
    dataset = prepare_log(log.set_column(3, "timestamp", times), tmp_path, "data.split=global_time", *shares)
    users = read_all(dataset)
    ordered = np.sort(log["timestamp"].to_numpy())
    assert users.times[users.splits == 0].max() == ordered[int(0.57 * 500) - 1]
    assert users.times[users.splits == 1].max() == ordered[int(0.78 * 500) - 1]
    assert np.bincount(users.splits).tolist() == [285, 105, 110]


def test_boundary_second_of_global_time_is_never_cut(tmp_path: Path) -> None:
    rows = [(user, item, 4, NOON + 86_400 * (item // 5)) for user in range(4) for item in range(10)]
    path = write_lines(tmp_path / "log.csv", ("user_id", "item_id", "rating", "timestamp"), *rows)
    shares = ["data.train_fraction=0.3", "data.valid_fraction=0.1"]
    users = read_all(prepare(tabular(path, "data.split=global_time", *shares), Storage(str(tmp_path))))
    assert np.bincount(users.splits, minlength=3).tolist() == [20, 0, 20], "both boundaries are the first second"


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=40), st.data())
def test_value_at_a_rank_is_found_from_counts(values: list[int], data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, len(values) - 1))
    expected = sorted(values)[rank]
    assert _at_rank(Counter(values), rank) == (expected, sum(value < expected for value in values))


def test_milliseconds_become_seconds_and_order_what_shares_one(tmp_path: Path) -> None:
    rows = [("u", item, 4, NOON * 1000 + 400 * (9 - item)) for item in range(10)]
    path = write_lines(tmp_path / "log.csv", ("user_id", "item_id", "rating", "timestamp"), *rows)
    (events,) = users_of(prepare(tabular(path), Storage(str(tmp_path)))).values()
    assert [(item, time - NOON) for item, _, time, _ in events] == [(str(9 - at), 400 * at // 1000) for at in range(10)]


@pytest.mark.parametrize(
    ("zone", "first"), [("null", NOON), ("Europe/Berlin", NOON - 3600), ("America/New_York", NOON + 5 * 3600)]
)
def test_dates_without_a_zone_are_in_the_configured_one_as_text_and_typed(
    tmp_path: Path, zone: str, first: int
) -> None:
    moments = [datetime.datetime(2024, 3, 1, 12) + datetime.timedelta(hours=at) for at in range(8)]
    table = pa.table({"user_id": ["u"] * 8, "item_id": range(8), "rating": [4] * 8, "timestamp": moments})
    text = table.set_column(3, "timestamp", pa.array([str(moment) for moment in moments]))
    for at, dataset in enumerate(
        (
            prepare_log(table, tmp_path / "typed", f"data.time_zone={zone}", name="log.parquet"),
            prepare_log(text, tmp_path / "text", f"data.time_zone={zone}"),
        )
    ):
        assert read_all(dataset).times.tolist() == [first + 3600 * hour for hour in range(8)], at


def test_seconds_among_milliseconds_are_refused_or_quarantined_as_the_configuration_says(tmp_path: Path) -> None:
    rows = [("u", item, 4, NOON * 1000 + item) for item in range(20)]
    folder = tmp_path / "raw"
    heading = ("user_id", "item_id", "rating", "timestamp")
    write_lines(folder / "a.csv", heading, *rows[:10])
    second = write_lines(folder / "b.csv", heading, *rows[10:], ("u", 3, 4, NOON))
    storage = Storage(str(tmp_path))
    with pytest.raises(InputError) as error:
        prepare(tabular(folder), storage)
    assert str(error.value) == (
        f"times of the log: are mixed: 1 seconds ({NOON} in {second} row 11), "
        f"20 milliseconds ({NOON}000 in {folder}/a.csv row 1); expected one unit; "
        "bring the log to one unit, or set data.time_unit: rows of another one then go to quarantine"
    )
    dataset = prepare(tabular(folder, "data.time_unit=ms"), storage)
    assert (dataset.interactions, dataset.quarantined) == (20, {"time_not_in_ms": 1})
    (row,) = quarantined(dataset)
    assert (row["file"], row["row"], row["time"]) == (str(second), 11, str(NOON))


def test_labels_that_are_nan_or_null_are_quarantined_in_every_format(tmp_path: Path) -> None:
    log = make_log(200)
    ratings = [
        float("nan") if at == 7 else None if at == 9 else float(r) for at, r in enumerate(log["rating"].to_pylist())
    ]
    table = log.set_column(2, "rating", pa.array(ratings, pa.float64()))
    for name in ("log.parquet", "log.csv", "log.jsonl"):
        dataset = prepare_log(table, tmp_path / name, "data.min_interactions=1", name=name)
        assert dataset.quarantined == {"rating_not_numeric": 2}
        assert [row["row"] for row in quarantined(dataset)] == [8, 10]


def test_text_field_of_10_mb_is_read_and_kept(tmp_path: Path) -> None:
    title = 'so "long", a title\n' * 600_000
    items = pa.table({"item_id": range(12), "title": ["short"] * 11 + [title]})
    catalogue = write_log(tmp_path / "items.csv", items)
    dataset = prepare_log(make_log(200), tmp_path, f"data.catalogue={catalogue}")
    assert read_items(dataset)["title"].to_pylist()[3] == title
    assert len(title) > 10 * 2**20
    assert dataset.item_words[22] == 1, "4.8 million words and marks"


def test_text_that_is_no_utf_8_is_quarantined_and_harms_no_other_row(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log.csv", make_log(200))
    lines = path.read_bytes().splitlines(keepends=True)
    lines[5] = b"\xff\xfe" + lines[5]
    path.write_bytes(b"".join(lines))
    dataset = prepare(tabular(path, "data.min_interactions=1"), Storage(str(tmp_path)))
    assert (dataset.interactions, dataset.quarantined) == (199, {"not_utf8": 1})
    assert [(row["row"], row["user_id"]) for row in quarantined(dataset)] == [(5, None)]


def test_existing_data_set_is_opened_and_not_written_again(tmp_path: Path) -> None:
    path, storage = write_log(tmp_path / "log.csv", make_log(200)), Storage(str(tmp_path))
    dataset = prepare(tabular(path), storage)
    path.unlink()
    steps: list[tuple[str, int, int]] = []
    watch = Watch(lambda *step: steps.append(step))
    again = prepare(tabular(path, "optim.lr=0.1", "data.max_bad_fraction=0.5"), storage, watch)
    assert again == dataset
    assert (steps, watch.peak_rss_mb) == ([], 0.0)


def test_existing_data_set_with_another_configuration_is_refused(tmp_path: Path) -> None:
    path, storage = write_log(tmp_path / "log.csv", make_log(200)), Storage(str(tmp_path))
    prepare(tabular(path), storage)
    with pytest.raises(InputError) as error:
        prepare(tabular(path, "data.label=rating > 2", "data.min_interactions=6"), storage)
    assert [str(fault).partition(" as in ")[0] for fault in error.value.faults] == [
        "data.label: got 'rating > 2'; expected 'rating > 3'",
        "data.min_interactions: got 6; expected 5",
    ]
    assert all(fault.hint == "choose another data.name" for fault in error.value.faults)
    assert open_dataset(storage, "tiny").data_config["min_interactions"] == 5


def test_watch_sees_every_stage_to_its_end_and_the_largest_process(tmp_path: Path) -> None:
    for number, part in enumerate(cut(make_log(300), 3)):
        write_log(tmp_path / "raw" / f"{number}.csv", part)
    steps: list[tuple[str, int, int]] = []
    watch = Watch(lambda *step: steps.append(step))
    overrides = ["data.split=global_time", "data.shard_interactions=150"]
    prepare(tabular(tmp_path / "raw", *overrides), Storage(str(tmp_path)), watch)
    totals = {"items": 3, "rows": 3, "days": 3, "seconds-train": 3, "seconds-valid": 3, "shard": 2}
    expected = [(stage, done, total) for stage, total in totals.items() for done in range(total + 1)]
    assert steps == expected
    assert 50 < watch.peak_rss_mb < 8_000


def test_manifest_is_json_that_a_person_can_read(tmp_path: Path) -> None:
    dataset = prepare_log(make_log(300), tmp_path, "data.segment_interactions=50")
    tree = json.loads(contents(dataset)["manifest.json"])
    assert tree["schema_version"] == 2
    assert tree["targets"].keys() == {"train", "valid", "test"}
    assert tree["segments"]["shards"] == {"interactions/part-00000.parquet": len(dataset.segments)}
    assert sum(tree["segments"]["users"]) == tree["users"] == dataset.users
    assert tree["data_config"]["label"] == "rating > 3"
    assert {entry["path"] for entry in tree["files"]} == contents(dataset).keys() - {"manifest.json"}


def test_movielens_100k_is_read_whole(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    steps: list[tuple[int, int | None]] = []

    def on_progress(done: int, total: int | None) -> None:
        steps.append((done, total))

    assert fetch(storage, "ml-100k", on_progress) == f"{tmp_path}/raw/ml-100k"
    assert steps[-1] == (2_130_151, 2_130_151)
    steps.clear()
    assert fetch(storage, "ml-100k", on_progress) == f"{tmp_path}/raw/ml-100k"
    assert steps == [], "it was there already"

    dataset = prepare(RunConfig(), storage)
    assert (dataset.interactions, dataset.users, dataset.items) == (100_000, 943, 1_682)
    assert dataset.label_rate == pytest.approx(0.554, abs=5e-4)
    assert dataset.quarantined == {}
    assert sum(dataset.targets) == 100_000
    assert all(s.interactions >= 1024 for s in dataset.segments[:-1])


def test_changed_raw_files_are_fetched_again(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    fetch(storage, "ml-100k", silent)
    before = storage.read("raw/ml-100k/ml-100k.item")
    storage.write("raw/ml-100k/ml-100k.item", b"changed")
    fetch(storage, "ml-100k", silent)
    assert storage.read("raw/ml-100k/ml-100k.item") == before
