"""MovieLens as GroupLens publishes it, and in RecBole's atomic files: find the files, name their columns.

Stage: sources. In: a folder, one with the files a folder below, or the zip itself. Out: a `RawLog`.
Invariant: every layout has the same log columns (a label may name `rating` or `timestamp`) and the same catalogue.

    u.data       u.item        tab, no heading            100K
    ratings.dat  movies.dat    "::", no heading           1M, 10M
    ratings.csv  movies.csv    comma, heading             20M, 25M, 32M, latest
    *.inter      *.item        tab, heading "name:type"   RecBole
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import PurePosixPath

from dti_ray.config.data import DataConfig
from dti_ray.config.label import parse_label
from dti_ray.data.sources import films, headings
from dti_ray.data.sources.files import MEMBER, Place, base_name, raw_place, with_members
from dti_ray.data.sources.formats import Format, Layout
from dti_ray.data.sources.get import KNOWN
from dti_ray.data.sources.headings import Wanted
from dti_ray.data.sources.raw import ITEM, LABEL, TIME, USER, RawLog
from dti_ray.errors import Fault, InputError
from dti_ray.storage import Storage

COLUMNS_100K = ("user_id", "item_id", "rating", "timestamp")
COLUMNS_1M = ("user_id", "", "item_id", "", "rating", "", "timestamp")  # "::" is two delimiters of one colon


@dataclass(frozen=True, eq=False)
class Age:
    """One way in which MovieLens is laid out.

    Attributes:
        logs: pattern of the names of its logs.
        catalogue: pattern of its catalogue's name.
        form: of the logs.
        columns: canonical name → heading in the logs, without a type.
        item_columns: name in the ItemTable → heading in a catalogue that is a table; empty where lines are parsed.
    """

    logs: str
    catalogue: str
    form: Format
    columns: Mapping[str, str]
    item_columns: Mapping[str, str]


PLAIN = {USER: "user_id", ITEM: "item_id", TIME: "timestamp"}
RECBOLE = Age(
    "*.inter", "*.item", Format("csv", Layout("\t", quoting=False)), PLAIN,
    {"item_id": "item_id", "title": "movie_title", "year": "release_year", "genres": "class"},
)  # fmt: skip
OF_100K = Age("u.data", "u.item", Format("csv", Layout("\t", False, COLUMNS_100K)), PLAIN, {})
OF_1M = Age("ratings.dat", "movies.dat", Format("csv", Layout(":", False, COLUMNS_1M)), PLAIN, {})
OF_20M = Age(
    "ratings.csv", "movies.csv", Format("csv"), {USER: "userId", ITEM: "movieId", TIME: "timestamp"},
    {"item_id": "movieId", "title": "title", "genres": "genres"},
)  # fmt: skip
AGES = (RECBOLE, OF_100K, OF_1M, OF_20M)


def locate(config: DataConfig, storage: Storage) -> RawLog:
    """Find the raw files that a configuration names and check their columns.

    Args:
        config: `path` is a folder or zip, null means `<root>/raw/<name>`.
        storage: the root.

    Raises:
        InputError: the folder, a file or a column is missing, or there are several logs to choose from.
        StorageError: a place cannot be reached.
    """
    place = raw_place(config.path, config.name, storage)
    age, logs, catalogue = _choose(place, config)
    storage, form = place.storage, age.form
    columns = dict(age.columns) | {LABEL + name: name for name in parse_label(config.label).columns}
    columns = _with_types(storage, logs, form, columns)
    item_columns = _with_types(storage, (catalogue,), form, age.item_columns) if age.item_columns else {}
    keys = {name: "data.label" if name.startswith(LABEL) else "MovieLens' layout" for name in columns}
    wanted = [Wanted(heading, keys[name]) for name, heading in columns.items()]
    item_wanted = [Wanted(heading, "MovieLens' layout") for heading in item_columns.values()]
    headings.together(
        partial(headings.check, storage, logs, form, wanted, config.on_bad_file == "quarantine"),
        partial(headings.check, storage, [catalogue] if item_wanted else [], form, item_wanted, skip_damaged=False),
    )
    readers = {
        RECBOLE: partial(films.read_recbole, storage, catalogue, form, item_columns),
        OF_20M: partial(films.read_csv, storage, catalogue, form, item_columns),
        OF_1M: partial(films.read_dat, storage, catalogue),
        OF_100K: partial(films.read_100k, storage, catalogue),
    }
    shown = (storage.display(catalogue),)
    return RawLog(storage, logs, form, columns, shown, read_catalogue=readers[age])


def _choose(place: Place, config: DataConfig) -> tuple[Age, tuple[str, ...], str]:
    """Return the layout, the logs and the catalogue of the uppermost folder that holds any; zips come last."""
    for candidates in (place, with_members(place)):
        found = _found(candidates)
        depth = min((len(PurePosixPath(folder).parts) for folder, _ in found), default=0)
        uppermost = [key for key in found if len(PurePosixPath(key[0]).parts) == depth]
        if len(uppermost) > 1:
            problem = f"holds several logs: {', '.join(sorted(found[key][0][0] for key in uppermost))}"
            raise InputError(Fault(place.name, problem, "one", "set data.path to the folder of one of them"))
        if uppermost:
            age, (logs, catalogues) = uppermost[0][1], found[uppermost[0]]
            if len(catalogues) == 1:
                return age, logs, catalogues[0]
            problem = f"holds {logs[0]} and {len(catalogues)} {age.catalogue} beside it"
            raise InputError(Fault(place.name, problem, f"exactly one {age.catalogue}"))
    known = config.path is None and config.name in KNOWN
    hint = f"get them with `dti-ray data get {config.name}`, or set data.path" if known else "set data.path"
    expected = " or ".join(f"{age.logs} with {age.catalogue}" for age in AGES)
    raise InputError(Fault(place.name, "holds no MovieLens log", expected, hint))


def _found(place: Place) -> dict[tuple[str, Age], tuple[tuple[str, ...], list[str]]]:
    """Return (folder, layout) → its logs and catalogues, for those that have logs."""
    by_folder: dict[str, list[str]] = {}
    for file in place.files:
        by_folder.setdefault(str(PurePosixPath(file.replace(MEMBER, "/")).parent), []).append(file)
    found = {}
    for folder, files in by_folder.items():
        for age in AGES:
            logs = tuple(file for file in files if _is_named(file, age.logs))
            if logs:
                found[folder, age] = logs, [file for file in files if _is_named(file, age.catalogue)]
    return found


def _is_named(file: str, pattern: str) -> bool:
    return fnmatch(base_name(file).lower(), pattern)


def _with_types(storage: Storage, files: tuple[str, ...], form: Format, columns: Mapping[str, str]) -> dict[str, str]:
    """Return the columns with the headings as they stand in the first file that can be read, `rating:float` say."""
    found = next((read for read in headings.read_all(storage, files, form) if isinstance(read, list)), [])
    typed = {name.partition(":")[0]: name for name, _ in found}
    return {name: typed.get(heading, heading) for name, heading in columns.items()}
