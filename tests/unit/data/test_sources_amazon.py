from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import pytest

from dti_ray.config.data import DataConfig
from dti_ray.data.sources import locate
from dti_ray.data.sources.raw import RawLog
from dti_ray.errors import InputError
from dti_ray.storage import Storage

Tree = dict[str, object]
OLD = {"reviewerID": "A1", "asin": "B01", "overall": 5.0, "unixReviewTime": 1400000000, "reviewText": "fine"}
NEW = {"user_id": "A1", "parent_asin": "B01", "asin": "B99", "rating": 5.0, "timestamp": 1400000000000, "text": "fine"}
META_2014 = {"asin": "B01", "title": "It's a lamp", "categories": [["Home"], ["Home", "Lamps, Desk"]], "price": 2.5}
META_2018 = {"asin": "B01", "title": "It's a lamp", "category": ["Home", "Lamps, Desk"], "brand": "Lux", "rank": []}
META_2023 = {"parent_asin": "B01", "title": "It's a lamp", "categories": ["Home", "Lamps, Desk"], "store": "Lux"}


def save(path: Path, *trees: Tree | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((tree if isinstance(tree, str) else json.dumps(tree)) + "\n" for tree in trees).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def find(path: Path, label: str = "rating > 3", **changes: object) -> RawLog:
    return locate(
        DataConfig.model_validate({"source": "amazon", "path": str(path), "label": label, **changes}), Storage("x")
    )


def rows(log: RawLog) -> list[Tree]:
    return [row for piece in log.pieces() for batch in log.batches(piece) for row in batch.to_pylist()]


@pytest.mark.parametrize(
    ("review", "meta", "name", "brand"),
    [
        (OLD, repr(META_2014), "reviews_Home_5.json.gz", ""),
        (OLD, META_2018, "Home_5.json", "Lux"),
        (NEW, META_2023, "Home.jsonl.gz", "Lux"),
    ],
    ids=["2014", "2018", "2023"],
)
@pytest.mark.parametrize("label", ["rating > 3", "overall > 3"])
def test_reviews_of_every_year_are_read(
    tmp_path: Path, review: Tree, meta: Tree | str, name: str, brand: str, label: str
) -> None:
    save(tmp_path / name, review)
    save(tmp_path / f"meta_{name}", meta)
    log = find(tmp_path, label)
    heading = label.split()[0]
    time = review.get("unixReviewTime", review.get("timestamp"))
    expected = {"user_id": "A1", "item_id": "B01", "time": time, f"label.{heading}": 5.0, "row": 1, "fault": None}
    assert rows(log) == [expected]
    items = log.read_catalogue()
    assert items is not None
    assert items.to_pylist() == [
        {"item_id": "B01", "title": "It's a lamp", "brand": brand, "category": "Home, Lamps, Desk"}
    ]


def test_a_zip_of_reviews_and_products_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x/Home.jsonl", json.dumps(NEW))
        archive.writestr("x/meta_Home.jsonl", json.dumps(META_2023))
    log = find(tmp_path / "a.zip")
    assert (len(rows(log)), len(log.read_catalogue() or [])) == (1, 1)


def test_bad_reviews_are_marked(tmp_path: Path) -> None:
    save(tmp_path / "Home.jsonl", NEW, "{", NEW | {"rating": float("nan")}, NEW | {"user_id": None})
    save(tmp_path / "meta_Home.jsonl", META_2023)
    found = rows(find(tmp_path))
    assert [row["fault"] for row in found] == [None, "malformed_line", None, None]
    assert found[2]["label.rating"] != found[2]["label.rating"]  # NaN
    assert found[3]["user_id"] is None


def test_what_a_product_lacks_is_empty_and_repeated_lines_are_one(tmp_path: Path) -> None:
    bare: Tree = {"parent_asin": "B02", "title": None, "categories": [], "store": None}
    other = META_2023 | {"title": "Another lamp"}
    save(tmp_path / "Home.jsonl", NEW)
    save(tmp_path / "meta_Home.jsonl", META_2023, bare, other, META_2023 | {"price": 3}, {"title": "\ud800"})
    items = find(tmp_path).read_catalogue()
    assert items is not None
    assert items["item_id"].to_pylist() == ["B01", "B02", "B01", None]  # contradictions are for checks to refuse
    assert items["title"].to_pylist() == ["It's a lamp", "", "Another lamp", "?"]
    assert items["category"].to_pylist()[1] == ""


def test_a_line_that_is_no_product_is_named(tmp_path: Path) -> None:
    save(tmp_path / "Home.jsonl", NEW)
    save(tmp_path / "meta_Home.jsonl", META_2023, "", "__import__('os')")
    with pytest.raises(InputError, match=r"meta_Home\.jsonl: has no product in row 2; expected one JSON object"):
        find(tmp_path).read_catalogue()


@pytest.mark.parametrize("name", ["Home.jsonl", "meta_Home.jsonl", "readme.txt"])
def test_reviews_without_products_and_the_reverse_are_refused(tmp_path: Path, name: str) -> None:
    save(tmp_path / name, NEW)
    with pytest.raises(InputError, match=r"holds \d review files and \d product files; expected reviews such as"):
        find(tmp_path)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    save(tmp_path / "Home.jsonl", {"user": "A1", "asin": "B01", "timestamp": 1})
    save(tmp_path / "meta_Home.jsonl", META_2023)
    with pytest.raises(InputError) as error:
        find(tmp_path, "votes > 3")
    assert [fault.problem for fault in error.value.faults] == [
        "has no column 'user_id', which Amazon's layout names",
        "has no column 'parent_asin', which Amazon's layout names",
        "has no column 'votes', which data.label names",
    ]
