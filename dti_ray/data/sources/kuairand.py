"""KuaiRand (Pure, 1K, 27K): the logs of a short-video app, and what is known of its videos.

Stage: sources. In: a folder with `log_*.csv`, and beside or below it the captions, the categories, or at the least
`video_features_basic_*.csv`. Out: a `RawLog`.
Invariant: the catalogue's columns follow from the files that are there: caption and cover_text from the captions,
category from the categories, tag and video_type where there is neither. The captions are those of all three sizes:
where `video_features_basic_*` is there, only its videos are kept.

    log_standard_4_08_to_4_21_pure.csv    user_id,video_id,…,time_ms,is_click,…,long_view,…
    kuairand_video_captions.csv           final_video_id,caption,show_cover_text
    kuairand_video_categories.csv         final_video_id,first_level_category_id,first_level_category_name,second_…
"""

# pyarrow.compute makes its functions at run time, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from dti_ray.config.data import DataConfig
from dti_ray.config.label import parse_label
from dti_ray.data.sources import formats, headings
from dti_ray.data.sources.files import base_name, raw_place, with_members
from dti_ray.data.sources.formats import Format
from dti_ray.data.sources.headings import Wanted
from dti_ray.data.sources.raw import ITEM, LABEL, TIME, USER, RawLog
from dti_ray.data.sources.tabular import read_batches
from dti_ray.errors import Fault, InputError
from dti_ray.storage import Storage

COLUMNS = {USER: "user_id", ITEM: "video_id", TIME: "time_ms"}
FORM = Format("csv")
LOG, CAPTIONS, CATEGORIES, BASICS = "log_", "captions", "categories", "video_features_basic"
IDS = ("final_video_id", "video_id")
LEVELS = tuple(f"{level}_level_category_name" for level in ("first", "second", "third", "fourth"))
NOTHING = pa.array(["", "UNKNOWN", "nan", "-124", "-124.0"])  # how the categories say that there is none


@dataclass(frozen=True)
class Texts:
    """A file that says something about videos.

    Attributes:
        file: its name.
        columns: name in the batch (`item_id` first) → heading.
    """

    file: str
    columns: Mapping[str, str]


def locate(config: DataConfig, storage: Storage) -> RawLog:
    """Find the logs and what describes the videos, and check all columns.

    Args:
        config: `path` is a folder or zip, null means `<root>/raw/<name>`.
        storage: the root.

    Raises:
        InputError: there is no log or nothing that describes a video, or a column is missing; StorageError: a place
            cannot be reached.
    """
    place = with_members(raw_place(config.path, config.name, storage))
    tables = [file for file in place.files if formats.ending(file) == FORM.kind]
    logs = tuple(file for file in tables if base_name(file).startswith(LOG))
    captions, categories, basics = (_one(place.name, tables, part) for part in (CAPTIONS, CATEGORIES, BASICS))
    if not logs or not (captions or categories or basics):
        problem = f"holds {len(logs)} logs and no captions" if logs else "holds no log"
        expected = "log_*.csv, and *captions*.csv, *categories*.csv or video_features_basic_*.csv"
        raise InputError(Fault(place.name, problem, expected, "set data.path to the folder of all"))
    columns = COLUMNS | {LABEL + heading: heading for heading in parse_label(config.label).columns}
    wanted = [
        Wanted(heading, "data.label" if name.startswith(LABEL) else "KuaiRand's layout")
        for name, heading in columns.items()
    ]
    skip_damaged = config.on_bad_file == "quarantine"
    headings.check(place.storage, logs, FORM, wanted, skip_damaged)
    texts = [
        _texts(place.storage, file, kind) for kind, file in ((CAPTIONS, captions), (CATEGORIES, categories)) if file
    ]
    known = _texts(place.storage, basics, BASICS) if basics else None
    read = partial(read_videos, place.storage, texts, known)
    shown = tuple(place.storage.display(file) for file in (captions, categories, basics) if file)
    return RawLog(place.storage, logs, FORM, columns, shown, read_catalogue=read)


def read_videos(storage: Storage, texts: list[Texts], known: Texts | None) -> pa.Table:
    """Return one row per video that any of the files names, in their order.

    Args:
        storage: where the files lie.
        texts: captions and categories; where there are none, the known videos describe themselves.
        known: the videos that matter; None keeps all.

    Raises:
        InputError: a file is missing or damaged, or has rows that cannot be read; StorageError: it cannot be reached.
    """
    if known is not None and not texts:
        return _read(storage, known, None)
    ids = None if known is None else _read(storage, known, None)["item_id"].combine_chunks()
    first, *others = (_read(storage, one, ids) for one in texts)
    for other in others:
        new = other.filter(pc.invert(pc.is_in(other["item_id"], first["item_id"].combine_chunks())))
        first = pa.concat_tables([first, new.select(["item_id"])], promote_options="default")
        places = pc.index_in(first["item_id"], other["item_id"].combine_chunks())
        for name in other.column_names[1:]:
            first = first.append_column(name, other[name].take(places))
    return first


def _read(storage: Storage, texts: Texts, ids: pa.Array | None) -> pa.Table:
    schema = pa.schema([(name, pa.string()) for name in texts.columns])
    batches = read_batches(storage, [texts.file], FORM, texts.columns)
    if ids is not None:
        batches = (batch.filter(pc.is_in(batch["item_id"], ids)) for batch in batches)
    table = pa.Table.from_batches(batches, schema)
    levels = [name for name in LEVELS if name in texts.columns]
    if not levels:
        return table
    named = [pc.if_else(pc.is_in(table[name], NOTHING), None, table[name]) for name in levels]
    return table.select(["item_id"]).append_column("category", _path(named))


def _path(levels: list[pa.ChunkedArray]) -> pa.ChunkedArray:
    """Join the levels of each row by spaces, without those that are null or repeat the level above."""
    path = above = pc.fill_null(levels[0], "")
    for level in levels[1:]:
        level = pc.fill_null(level, "")
        is_new = pc.and_(pc.not_equal(level, ""), pc.not_equal(level, above))
        path = pc.if_else(is_new, pc.binary_join_element_wise(path, level, " "), path)
        above = level
    return pc.utf8_trim_whitespace(path)


def _texts(storage: Storage, file: str, kind: str) -> Texts:
    """Check a describing file's columns and return how it is read."""
    (found,) = headings.read_all(storage, [file], FORM)
    names = [name for name, _ in found] if isinstance(found, list) else []
    item = next((name for name in IDS if name in names), IDS[0])
    texts = {
        CAPTIONS: {"caption": "caption", "cover_text": "show_cover_text"},
        CATEGORIES: {name: name for name in LEVELS if name in names or name == LEVELS[0]},
        BASICS: {"tag": "tag", "video_type": "video_type"},
    }[kind]
    columns = {"item_id": item} | texts
    headings.check(storage, [file], FORM, [Wanted(name, "KuaiRand's layout") for name in columns.values()], False)
    return Texts(file, columns)


def _one(where: str, files: list[str], part: str) -> str | None:
    """Return the file whose name holds a part; None where there is none."""
    found = [file for file in files if part in base_name(file) and not base_name(file).startswith(LOG)]
    if len(found) > 1:
        raise InputError(Fault(where, f"holds {len(found)} files of {part}: {', '.join(found)}", "one"))
    return found[0] if found else None
