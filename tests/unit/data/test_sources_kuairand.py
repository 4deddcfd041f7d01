from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import pytest

from dti_ray.config.data import DataConfig
from dti_ray.data.sources import locate
from dti_ray.data.sources.raw import RawLog
from dti_ray.errors import InputError
from dti_ray.storage import Storage

LOG = "user_id,video_id,date,hourmin,time_ms,is_click,is_like,long_view,play_time_ms,duration_ms,tab\n"
FILES = {
    "data/log_standard_4_08_to_4_21_pure.csv": LOG + "0,3,20220408,1100,1649400000000,1,0,1,100,200,1\n",
    "data/log_random_4_22_to_5_08_pure.csv": LOG + "1,4,20220422,1100,1650600000000,0,0,0,0,200,1\n",
    "data/user_features_pure.csv": "user_id,is_lowactive_period\n0,0\n",
    "data/video_features_basic_pure.csv": 'video_id,author_id,video_type,tag\n3,9,NORMAL,"1,2"\n4,9,AD,7\n5,9,AD,8\n',
    "data/video_features_statistic_pure.csv": "video_id,counts\n3,1\n",
    "kuairand_video_captions.csv": "final_video_id,caption,show_cover_text\n"
    '4,"a ""cat""\nsleeps",Cover\n3,dog,\n99,x,y\n',
    "kuairand_video_categories.csv": "final_video_id,first_level_category_id,first_level_category_name,"
    "second_level_category_id,second_level_category_name,third_level_category_name\n"
    "3,8.0,Pets,673.0,Dogs,Dogs\n5,-124.0,UNKNOWN,-124.0,UNKNOWN,UNKNOWN\n77,1.0,Food,2.0,Soup,UNKNOWN\n",
}


def lay(folder: Path, *without: str) -> Path:
    for name, text in FILES.items():
        if not any(part in name for part in without):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
    return folder


def find(path: Path, label: str = "is_click") -> RawLog:
    config = DataConfig(source="kuairand", path=str(path), label=label)
    return pickle.loads(pickle.dumps(locate(config, Storage("unused"))))


def items(log: RawLog) -> list[dict[str, str | None]]:
    table = log.read_catalogue()
    assert table is not None
    return table.to_pylist()


def test_all_logs_and_the_texts_of_their_videos_are_read(tmp_path: Path) -> None:
    log = find(lay(tmp_path))
    assert [row for piece in log.pieces() for batch in log.batches(piece) for row in batch.to_pylist()] == [
        {"user_id": "1", "item_id": "4", "time": "1650600000000", "label.is_click": "0", "row": 1, "fault": None},
        {"user_id": "0", "item_id": "3", "time": "1649400000000", "label.is_click": "1", "row": 1, "fault": None},
    ]
    assert items(log) == [
        {"item_id": "4", "caption": 'a "cat"\nsleeps', "cover_text": "Cover", "category": None},
        {"item_id": "3", "caption": "dog", "cover_text": "", "category": "Pets Dogs"},
        {"item_id": "5", "caption": None, "cover_text": None, "category": ""},
    ]


def test_without_the_basic_features_all_captions_are_kept(tmp_path: Path) -> None:
    found = items(find(lay(tmp_path, "basic")))
    assert [item["item_id"] for item in found] == ["4", "3", "99", "5", "77"]
    assert found[-1]["category"] == "Food Soup"


def test_captions_or_categories_alone_will_do(tmp_path: Path) -> None:
    assert set(items(find(lay(tmp_path / "a", "categories")))[0]) == {"item_id", "caption", "cover_text"}
    assert set(items(find(lay(tmp_path / "b", "captions")))[0]) == {"item_id", "category"}


def test_the_basic_features_are_the_last_resort(tmp_path: Path) -> None:
    assert items(find(lay(tmp_path, "captions", "categories"), "long_view"))[0] == {
        "item_id": "3",
        "tag": "1,2",
        "video_type": "NORMAL",
    }


def test_a_zip_is_read_as_its_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "KuaiRand-Pure.zip", "w") as archive:
        for name, text in FILES.items():
            archive.writestr(f"KuaiRand-Pure/{name}", text)
    log = find(tmp_path / "KuaiRand-Pure.zip")
    assert len(log.files) == 2
    assert len(items(log)) == 3


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no log; expected log_\*\.csv, and"):
        find(lay(tmp_path / "a", "log_"))
    with pytest.raises(InputError, match="holds 2 logs and no captions; expected"):
        find(lay(tmp_path / "b", "video_"))
    folder = lay(tmp_path / "c")
    with pytest.raises(
        InputError, match=r"has no column 'is_clicked', which data\.label names \(as in 1 more\).*'is_click'"
    ):
        find(folder, "is_clicked")
    (folder / "kuairand_video_captions.csv").write_text("id,text\n")
    with pytest.raises(
        InputError, match=r"captions\.csv: has no column 'final_video_id', which KuaiRand's layout names"
    ):
        find(folder)
    (folder / "more_captions.csv").write_text("id,text\n")
    with pytest.raises(InputError, match=r"holds 2 files of captions: .*; expected one"):
        find(folder)
