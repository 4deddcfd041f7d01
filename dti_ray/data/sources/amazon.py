"""Amazon reviews of 2014, 2018 and 2023: JSON Lines of reviews, and of what the products are.

Stage: sources. In: a folder or zip with review files and `meta_*` files, each perhaps with .gz. Out: a `RawLog`.
Invariant: a label may say `rating` or `overall` whatever the year; the catalogue is item_id, title, brand, category;
products that say the same twice are one, and those that contradict themselves stay two, for `checks` to refuse.

              reviews: user, item, time, label                       products
    2014/18   reviewerID   asin          unixReviewTime   overall    asin         brand   categories or category
    2023      user_id      parent_asin   timestamp (ms)   rating     parent_asin  store   categories
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any

import pyarrow as pa

from dti_ray.config.data import DataConfig
from dti_ray.config.label import parse_label
from dti_ray.data.sources import formats, headings, lines
from dti_ray.data.sources.files import base_name, raw_place, with_members
from dti_ray.data.sources.formats import Format, nested_text
from dti_ray.data.sources.headings import Wanted
from dti_ray.data.sources.jsonlines import parsed
from dti_ray.data.sources.raw import ITEM, LABEL, TIME, USER, RawLog
from dti_ray.errors import Fault, InputError
from dti_ray.storage import Storage

OLD = {USER: "reviewerID", ITEM: "asin", TIME: "unixReviewTime"}
NEW = {USER: "user_id", ITEM: "parent_asin", TIME: "timestamp"}
RATINGS = ("rating", "overall")
META = "meta_"
FORM = Format("jsonl")
BLOCK_PRODUCTS = 100_000  # become Arrow columns at a time
ITEMS = pa.schema([(name, pa.string()) for name in ("item_id", "title", "brand", "category")])


def locate(config: DataConfig, storage: Storage) -> RawLog:
    """Find the review files and the product files that a configuration names, and check the reviews' columns.

    Args:
        config: `path` is a folder, file or zip, null means `<root>/raw/<name>`.
        storage: the root.

    Raises:
        InputError: there are no reviews or no products, or a column is missing; StorageError: a place cannot be
            reached.
    """
    place = with_members(raw_place(config.path, config.name, storage))
    files = [file for file in place.files if formats.ENDINGS.get(formats.ending(file)) == FORM.kind]
    meta = tuple(file for file in files if base_name(file).startswith(META))
    logs = tuple(file for file in files if file not in meta)
    if not meta or not logs:
        problem = f"holds {len(logs)} review files and {len(meta)} product files"
        expected = "reviews such as Books.jsonl.gz, and products such as meta_Books.jsonl.gz"
        raise InputError(Fault(place.name, problem, expected, "set data.path to the folder of both"))
    found = {name for columns in headings.read_all(place.storage, logs[:1], FORM) if isinstance(columns, list)
             for name, _ in columns}  # fmt: skip
    columns = dict(OLD if OLD[USER] in found else NEW)
    rating = next((name for name in RATINGS if name in found), RATINGS[0])
    for heading in parse_label(config.label).columns:
        columns[LABEL + heading] = rating if heading in RATINGS else heading
    wanted = [
        Wanted(heading, "data.label" if name.startswith(LABEL) else "Amazon's layout")
        for name, heading in columns.items()
    ]
    headings.check(place.storage, logs, FORM, wanted, config.on_bad_file == "quarantine")
    shown = tuple(map(place.storage.display, meta))
    return RawLog(place.storage, logs, FORM, columns, shown, read_catalogue=partial(read_products, place.storage, meta))


def read_products(storage: Storage, files: Sequence[str]) -> pa.Table:
    """Return the products of some files with the columns of `ITEMS`, in their order, each statement once.

    Raises:
        InputError: a file is missing or damaged, or a line is no object; StorageError: it cannot be reached.
    """
    tables = [ITEMS.empty_table()]
    for file in files:
        products = _products(storage, file)
        while some := list(islice(products, BLOCK_PRODUCTS)):
            tables.append(pa.Table.from_pylist(some, ITEMS))
    return _once(pa.concat_tables(tables))


def _products(storage: Storage, file: str) -> Iterator[dict[str, str | None]]:
    rows = chain.from_iterable(map(lines.split, lines.blocks(storage, file)))
    for row, line in enumerate(rows, start=1):
        tree = parsed(line) or _literal(line)
        if tree is None:
            problem, expected = f"has no product in row {row}", "one JSON object on each line"
            raise InputError(Fault(storage.display(file), problem, expected, "mend or delete the line"))
        yield _product(tree)


def _literal(line: bytes) -> dict[str, Any] | None:
    """Return a line of 2014, which is written as Python writes a dictionary."""
    try:
        tree = ast.literal_eval(line.decode().strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    return tree if isinstance(tree, dict) else None


def _product(tree: dict[str, Any]) -> dict[str, str | None]:
    item = tree.get("parent_asin") or tree.get("asin")
    return {
        "item_id": None if item is None else _text(item),
        "title": _text(tree.get("title")),
        "brand": _text(tree.get("brand") or tree.get("store")),
        "category": _category(tree.get("category") or tree.get("categories")),
    }


def _category(value: object) -> str:
    """Return a path of categories as text; of several paths (2014) the last one."""
    if isinstance(value, list) and value and isinstance(value[-1], list):
        value = value[-1]
    return ", ".join(map(_text, value)) if isinstance(value, list) else _text(value)


def _text(value: object) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else nested_text(value)
    return text.encode(errors="replace").decode()  # a lone surrogate is no character, and Arrow takes none


def _once(table: pa.Table) -> pa.Table:
    """Leave out rows that equal an earlier one."""
    numbered = table.append_column("number", pa.array(range(len(table)), pa.int64()))
    first = numbered.group_by(table.column_names, use_threads=False).aggregate([("number", "min")])
    return table.take(first["number_min"].combine_chunks().sort())
