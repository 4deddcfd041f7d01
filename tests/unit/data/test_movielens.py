from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import pytest

from dti_ray.config.data import DataConfig
from dti_ray.data.sources import films, locate
from dti_ray.data.sources.raw import RawLog
from dti_ray.errors import InputError
from dti_ray.storage import Storage

TINY = DataConfig(name="tiny")
ITEMS = [(1, "Toy Story", 1995, "Animation Comedy"), (2, 'The "NA"', "", "Drama")]
FILMS = [
    {"item_id": "1", "title": "Toy Story", "year": "1995", "genres": "Animation Children's Comedy"},
    {"item_id": "2", "title": "Léon: The Professional", "year": "1994", "genres": "Crime"},
]
FLAGS = {1: {3, 4, 5}, 2: {6}}  # which of the 19 genres of u.item


def u_item() -> str:
    named = {1: "Toy Story (1995)", 2: "Léon: The Professional (1994)"}
    return "".join(
        f"{item}|{title}|01-Jan-1995||http://x|{'|'.join(str(int(i in FLAGS[item])) for i in range(19))}\n"
        for item, title in named.items()
    )


DAT = "1::Toy Story (1995)::Animation|Children's|Comedy\n2::Léon: The Professional (1994)::Crime\n"
CSV = (
    "movieId,title,genres\r\n"
    "1,Toy Story (1995),Animation|Children's|Comedy\r\n"
    "2,Léon: The Professional (1994),Crime\r\n"
)
LAYOUTS: dict[str, dict[str, bytes]] = {
    "ml-100k": {
        "u.data": b"196\t1\t3\t881250949\n186\t2\t5\t891717742\n",
        "u.item": u_item().encode("latin-1"),
        "u.genre": b"unknown|0\n",
        "u1.base": b"1\t1\t1\t1\n",
    },
    "ml-1m": {
        "ratings.dat": b"196::1::3::881250949\n186::2::5::891717742\n",
        "movies.dat": DAT.encode("latin-1"),
        "users.dat": b"1::F::1::10::48067\n",
    },
    "ml-10M100K": {
        "ratings.dat": b"196::1::3::881250949\r\n186::2::5::891717742\r\n",
        "movies.dat": DAT.encode(),
        "tags.dat": b"1::1::x::1\n",
    },
    "ml-25m": {
        "ratings.csv": b"userId,movieId,rating,timestamp\n196,1,3,881250949\n186,2,5,891717742\n",
        "movies.csv": CSV.encode(),
        "tags.csv": b"userId,movieId,tag,timestamp\n",
    },
}
ROWS = [
    {"user_id": "196", "item_id": "1", "time": "881250949", "label.rating": "3", "row": 1, "fault": None},
    {"user_id": "186", "item_id": "2", "time": "891717742", "label.rating": "5", "row": 2, "fault": None},
]


def rows(log: RawLog) -> list[dict[str, object]]:
    return [row for piece in log.pieces() for batch in log.batches(piece) for row in batch.to_pylist()]


def lay(folder: Path, name: str) -> None:
    folder.mkdir(parents=True)
    for file, content in LAYOUTS[name].items():
        (folder / file).write_bytes(content)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shape", ["folder", "folder below", "zip", "zip in the folder"])
def test_every_layout_is_read_as_grouplens_publishes_it(tmp_path: Path, name: str, shape: str) -> None:
    place = tmp_path / "raw" / "ml"
    if shape == "folder":
        lay(place, name)
    elif shape == "folder below":
        lay(place / name, name)
    else:
        place.mkdir(parents=True)
        with zipfile.ZipFile(place / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file, content in LAYOUTS[name].items():
                archive.writestr(f"{name}/{file}", content)
    path = str(place / f"{name}.zip") if shape == "zip" else None
    log = pickle.loads(pickle.dumps(locate(DataConfig(name="ml", path=path), Storage(str(tmp_path)))))
    assert rows(log) == ROWS
    assert [piece.rows for piece in log.pieces()] == [2]
    items = log.read_catalogue()
    assert items is not None
    assert items.schema.equals(films.ITEMS)
    assert items.to_pylist() == FILMS


def test_recbole_values_stay_as_they_are(tmp_path: Path, write_raw) -> None:
    write_raw([("007", 1, "five", "8.8e8"), ("", 2, '"', "")], ITEMS)
    log = locate(TINY, Storage(str(tmp_path)))
    assert rows(log) == [
        {"user_id": "007", "item_id": "1", "time": "8.8e8", "label.rating": "five", "row": 1, "fault": None},
        {"user_id": "", "item_id": "2", "time": "", "label.rating": '"', "row": 2, "fault": None},
    ]
    items = log.read_catalogue()
    assert items is not None
    assert items.schema.equals(films.ITEMS)
    assert items.to_pylist() == [
        {"item_id": "1", "title": "Toy Story", "year": "1995", "genres": "Animation Comedy"},
        {"item_id": "2", "title": 'The "NA"', "year": "", "genres": "Drama"},
    ]


def test_all_logs_of_a_folder_are_read(tmp_path: Path, write_raw) -> None:
    folder = write_raw([(1, 1, 5, 10)], ITEMS)
    first = (folder / "tiny.inter").read_text()
    (folder / "later.inter").write_text(first.replace("\n1\t", "\n2\t"))
    log = locate(DataConfig(name="other", path=str(folder)), Storage("unused"))
    assert sorted(str(row["user_id"]) for row in rows(log)) == ["1", "2"]


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Toy Story (1995)", ("Toy Story", "1995")),
        ("City of Lost Children, The (Cité des enfants perdus, La) (1995)",
         ("City of Lost Children, The (Cité des enfants perdus, La)", "1995")),
        ("Land Before Time III (1995) (V)", ("Land Before Time III (V)", "1995")),
        ("Black Mirror (2011– )", ("Black Mirror", "2011")),
        ("Fawlty Towers (1975-1979)", ("Fawlty Towers", "1975")),
        ("(500) Days of Summer (2009)", ("(500) Days of Summer", "2009")),
        ("unknown", ("unknown", "")),
    ],
)  # fmt: skip
def test_the_year_leaves_the_title(title: str, expected: tuple[str, str]) -> None:
    assert films._title_and_year(title) == expected


def test_films_without_genres_have_none(tmp_path: Path) -> None:
    lay(tmp_path / "ml", "ml-25m")
    (tmp_path / "ml" / "movies.csv").write_text('movieId,title,genres\n1,"A, B",(no genres listed)\n')
    items = locate(DataConfig(path=str(tmp_path / "ml")), Storage("unused")).read_catalogue()
    assert items is not None
    assert items.to_pylist() == [{"item_id": "1", "title": "A, B", "year": "", "genres": ""}]


@pytest.mark.parametrize(
    ("name", "file", "content", "problem"),
    [
        (
            "ml-1m",
            "movies.dat",
            b"1::A::B\n\n2::A\n",
            r"movies\.dat: has a line 3 that is no film; .*id::title::genres",
        ),
        ("ml-100k", "u.item", b"1|A|B\n", r"u\.item: has a line 1 that is no film; expected 24 fields"),
        ("ml-25m", "movies.csv", b"movieId,title,genres\n1,A\n", r"movies\.csv: has rows that cannot be read"),
    ],
)
def test_a_damaged_catalogue_is_named(tmp_path: Path, name: str, file: str, content: bytes, problem: str) -> None:
    lay(tmp_path / "ml", name)
    (tmp_path / "ml" / file).write_bytes(content)
    log = locate(DataConfig(path=str(tmp_path / "ml")), Storage("unused"))
    with pytest.raises(InputError, match=problem):
        log.read_catalogue()


def test_a_line_of_the_log_that_is_no_rating_is_marked(tmp_path: Path) -> None:
    lay(tmp_path / "ml", "ml-1m")
    (tmp_path / "ml" / "ratings.dat").write_bytes(b"1::2::3\n1::2::3::4\n1::2::3::4::5\n")
    log = locate(DataConfig(path=str(tmp_path / "ml")), Storage("unused"))
    assert [row["fault"] for row in rows(log)] == ["wrong_number_of_fields", None, "wrong_number_of_fields"]


def test_wrong_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: is missing; expected a file or a folder; set data\.path"):
        locate(DataConfig(path=str(tmp_path / "nowhere")), Storage(str(tmp_path)))
    (tmp_path / "a.txt").touch()
    with pytest.raises(
        InputError, match=r"holds no MovieLens log; expected \*\.inter with \*\.item or .*set data\.path"
    ):
        locate(DataConfig(path=str(tmp_path)), Storage(str(tmp_path)))


def test_missing_raw_files_of_a_known_data_set_hint_at_the_command(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"raw/ml-100k: .*dti-ray data get ml-100k"):
        locate(DataConfig(), Storage(str(tmp_path)))


def test_a_log_without_its_catalogue_is_told(tmp_path: Path) -> None:
    lay(tmp_path / "ml", "ml-1m")
    (tmp_path / "ml" / "movies.dat").unlink()
    with pytest.raises(InputError, match=r"holds ratings\.dat and 0 movies\.dat beside it; expected exactly one"):
        locate(DataConfig(path=str(tmp_path / "ml")), Storage("unused"))


def test_several_logs_are_not_guessed_between(tmp_path: Path) -> None:
    lay(tmp_path / "ml" / "a", "ml-1m")
    lay(tmp_path / "ml" / "b", "ml-25m")
    with pytest.raises(InputError, match=r"holds several logs: a/ratings\.dat, b/ratings\.csv; expected one"):
        locate(DataConfig(path=str(tmp_path / "ml")), Storage("unused"))


def test_missing_columns_are_all_named_with_those_found(tmp_path: Path, write_raw) -> None:
    write_raw(
        [], [], inter_heading="user_id:token\tfilm:token\trating:float",
        item_heading="item_id:token\tmovie_title:token_seq\tclass:token_seq",
    )  # fmt: skip
    with pytest.raises(InputError) as error:
        locate(TINY.model_copy(update={"label": "click"}), Storage(str(tmp_path)))
    assert [fault.problem for fault in error.value.faults] == [
        "has no column 'item_id', which MovieLens' layout names",
        "has no column 'timestamp', which MovieLens' layout names",
        "has no column 'click', which data.label names",
        "has no column 'release_year', which MovieLens' layout names",
    ]
    assert error.value.faults[0].where.endswith("raw/tiny/tiny.inter")
    assert error.value.faults[0].hint == "it has user_id:token, film:token, rating:float"
    assert error.value.faults[3].where.endswith("raw/tiny/tiny.item")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_label_may_only_name_columns_of_the_log(tmp_path: Path, name: str) -> None:
    lay(tmp_path / "ml", name)
    with pytest.raises(InputError, match=r"has no column 'ratings', which data\.label names; did you mean 'rating'"):
        locate(DataConfig(path=str(tmp_path / "ml"), label="ratings > 3"), Storage("unused"))


def test_logs_with_different_headings_are_refused(tmp_path: Path, write_raw) -> None:
    folder = write_raw([], ITEMS)
    (folder / "zz.inter").write_text("user_id:float\titem_id:token\trating:float\ttimestamp:float\n")
    with pytest.raises(InputError, match=r"zz\.inter: has no column 'user_id:token'.*it has user_id:float"):
        locate(TINY, Storage(str(tmp_path)))
