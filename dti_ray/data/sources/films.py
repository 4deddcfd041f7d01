"""MovieLens catalogues, of whatever age, as one table: item_id, title, year, genres.

Stage: sources. In: the file that describes the films. Out: strings, in the file's order.
Invariant: the four columns mean the same for every layout: a title is without its year, genres stand in a row with
spaces between; what is not known is an empty text.

    1|Toy Story (1995)|01-Jan-1995||http…|0|0|0|1|1|1|…    100K
    1::Toy Story (1995)::Animation|Children's|Comedy       1M, 10M   →   1  Toy Story  1995  Animation Children's Comedy
    1,Toy Story (1995),Animation|Children|Comedy           20M and later
    1  Toy Story  1995  Animation Children's Comedy        RecBole
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import pyarrow as pa

from dti_ray.data.sources import lines
from dti_ray.data.sources.formats import Format
from dti_ray.data.sources.tabular import read_tables
from dti_ray.errors import Fault, InputError
from dti_ray.storage import Storage

ITEMS = pa.schema([(name, pa.string()) for name in ("item_id", "title", "year", "genres")])

YEAR = re.compile(r"\s*\((\d{4})(?:\s*[-–]\s*\d{0,4})?\s*\)")  # "(1995)", and "(2009– )" of a series
NO_GENRES = "(no genres listed)"
GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
FIELDS_BEFORE_GENRES = 5  # of u.item: id, title, release date, date of the video, address

Film = tuple[str, str, str, str]


def read_recbole(storage: Storage, file: str, form: Format, columns: Mapping[str, str]) -> pa.Table:
    """Read a `*.item` file, whose columns are what is wanted already; see `tabular.read_tables` for the errors."""
    return read_tables(storage, [file], form, columns)


def read_csv(storage: Storage, file: str, form: Format, columns: Mapping[str, str]) -> pa.Table:
    """Read `movies.csv`; see `tabular.read_tables` for the errors."""
    table = read_tables(storage, [file], form, columns)
    rows = zip(*(table[name].to_pylist() for name in table.column_names), strict=True)
    return _table((item, *_title_and_year(title), _genres(genres)) for item, title, genres in rows)


def read_dat(storage: Storage, file: str) -> pa.Table:
    """Read `movies.dat`, whose fields stand between two colons; a title may hold one.

    Raises:
        InputError: the file is missing or damaged, or a line has another number of fields.
    """

    def film(line: str) -> Film:
        item, title, genres = line.split("::")
        return item, *_title_and_year(title), _genres(genres)

    return _by_line(storage, file, film, "id::title::genres")


def read_100k(storage: Storage, file: str) -> pa.Table:
    """Read `u.item`, whose last fields say of each genre whether the film is of it.

    Raises:
        InputError: the file is missing or damaged, or a line has another number of fields.
    """

    def film(line: str) -> Film:
        item, title, released, _, _, *flags = line.split("|")
        genres = [name for name, flag in zip(GENRES_100K, flags, strict=True) if flag == "1" and name != "unknown"]
        title, year = _title_and_year(title)
        return item, title, year or released[-4:], " ".join(genres)

    return _by_line(storage, file, film, f"{FIELDS_BEFORE_GENRES + len(GENRES_100K)} fields between bars")


def _by_line(storage: Storage, file: str, film: Callable[[str], Film], expected: str) -> pa.Table:
    content = b"".join(lines.blocks(storage, file))
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = content.decode("latin-1")  # as GroupLens wrote until 2003
    films = []
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        try:
            if line.strip():
                films.append(film(line))
        except ValueError:
            raise InputError(Fault(storage.display(file), f"has a line {number} that is no film", expected)) from None
    return _table(films)


def _table(films: Iterable[Film]) -> pa.Table:
    columns = [pa.array(column, pa.string()) for column in zip(*films, strict=True)]
    return pa.table(columns, schema=ITEMS) if columns else ITEMS.empty_table()


def _title_and_year(title: str) -> tuple[str, str]:
    years = list(YEAR.finditer(title))
    if not years:
        return title.strip(), ""
    start, end = years[-1].span()
    return (title[:start] + title[end:]).strip(), years[-1][1]


def _genres(text: str) -> str:
    return "" if text == NO_GENRES else text.replace("|", " ")
