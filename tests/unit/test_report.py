from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dti_ray.data.leaks import CHECKS
from dti_ray.errors import InputError
from dti_ray.report import MaskPicture, write_report
from dti_ray.storage import Storage
from tests.builders import streaming_mask, write_dataset

SECTIONS = ("headline", "metrics", "learning", "probabilities", "speed", "log", "mask", "configuration", "versions")
VOID = {"meta", "br", "hr", "img", "link", "input"}


def estimate(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def metrics(auc: float) -> dict[str, object]:
    return {
        "auc": estimate(auc, 0.0061), "log_loss": estimate(1.34 - auc, 0.008),
        "f1": estimate(auc - 0.08, 0.009),
        "gauc": estimate(auc - 0.045, 0.007), "ne": estimate(1.62 - auc, 0.012),
        "calibration": estimate(1.8 - auc, 0.014), "ece": estimate(0.82 - auc, 0.004),
        "targets": 9_876, "users": 943, "gauc_users_left_out": 87,
    }  # fmt: skip


def parquet(columns: Mapping[str, object]) -> bytes:
    content = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), content)
    return content.getvalue()


def put_lines(storage: Storage, path: str, lines: list[dict[str, float]]) -> None:
    storage.write(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def put_training(storage: Storage, run: str, lines: int, validations: int) -> None:
    """Write what `dti-ray train` leaves."""
    rng = np.random.default_rng(7)
    folder = f"runs/{run}"
    storage.write(f"{folder}/config.yaml", b"packing:\n  k: 20\n  n: 10\nprompt:\n  yes_token: <yes>\n")
    meta = {
        "run": run, "config_hash": "5d41402abc4b2a76b9719d911017c592", "git_commit": "ca350140ffee",
        "versions": {"torch": "2.13.0", "ray": "2.60.1", "deepspeed": "0.19.8", "transformers": "5.17.2",
                     "numpy": "2.4.6", "pyarrow": "26.0.1", "dti_ray": "0.1.0"},
        "machine": {"cpus": 2, "cpu": "AMD EPYC 7B13", "gpus": []}, "started_at": "2026-11-03T14:02:11+00:00",
    }  # fmt: skip
    storage.write(f"{folder}/meta.json", json.dumps(meta).encode())
    train = []
    for line in range(1, lines + 1):
        targets = 4_000 * line
        train.append({
            "step": 16 * line, "targets": targets, "tokens": 27.3 * targets, "lr": 3e-3, "grad_norm": 0.8,
            "loss": 0.545 + 0.15 * np.exp(-targets / 40_000) + rng.normal(0, 0.012),
            "targets_per_s": 410 + rng.normal(0, 14) - 120 * (line % 10 == 0), "tokens_per_s": 11_190.0,
            "padding": 0.031 + rng.normal(0, 0.003), "data_wait": abs(rng.normal(0.012, 0.006)),
            "seconds": targets / 395,
        })  # fmt: skip
    put_lines(storage, f"{folder}/metrics/train.jsonl", train)
    auc = (0.7421, 0.7603, 0.7688, 0.7741, 0.7769, 0.7758)
    valid = [
        {
            "step": 160 * (i + 1),
            "targets": 40_000 * (i + 1),
            "auc": auc[i],
            "log_loss": 1.335 - auc[i],
            "seconds": 9.0,
        }
        for i in range(validations)
    ]
    if valid:
        put_lines(storage, f"{folder}/metrics/valid.jsonl", valid)


def put_evaluation(storage: Storage, run: str, predictions: int, checkpoint: str = "best-000800") -> None:
    """Write what `dti-ray evaluate` leaves."""
    tree = {
        "protocol": "sliding", "split": "test", "checkpoint": checkpoint, "n": 10, "metrics": metrics(0.7962),
        "baselines": {"item mean": metrics(0.7411), "item + user mean": metrics(0.7795),
                      "item mean + last 10 feedbacks": metrics(0.7997)},
    }  # fmt: skip
    storage.write(f"runs/{run}/metrics/evaluation_test.json", json.dumps(tree).encode())
    rng = np.random.default_rng(3)
    logit = rng.normal(0.3, 1.25, predictions)
    label = rng.random(predictions) < 1 / (1 + np.exp(-0.9 * logit))
    columns = {
        "user_id": [str(user) for user in rng.integers(0, 900, predictions)],
        "position": pa.array(rng.integers(0, 200, predictions), pa.int32()),
        "label": pa.array(label.astype(np.int8)),
        "probability": 1 / (1 + np.exp(-logit)),
    }  # fmt: skip
    storage.write(f"runs/{run}/metrics/predictions_test.parquet", parquet(columns))


def put_log(storage: Storage, run: str) -> None:
    """Write a data set of 12 users with 260 interactions, and its name into the run's configuration."""
    write_dataset(Path(storage.root), [1, 2, 3, 5, 9, 20, 20, 25, 30, 35, 40, 70])
    config = f"runs/{run}/config.yaml"
    storage.write(config, storage.read(config) + b"data:\n  name: tiny\n")


class Balance(HTMLParser):
    """Fails where a tag is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.identifiers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.identifiers += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(str(tmp_path))


@pytest.fixture
def full(storage: Storage) -> Storage:
    put_training(storage, "demo", lines=60, validations=6)
    put_log(storage, "demo")
    put_evaluation(storage, "demo", predictions=3_000)
    return storage


def page_of(storage: Storage, run: str = "demo", mask: MaskPicture | None = None) -> str:
    path = write_report(storage, run, mask)
    assert path == storage.display("runs", run, "report", "index.html")
    return storage.read(f"runs/{run}/report/index.html").decode()


def section(page: str, name: str) -> str:
    return page.partition(f'<section id="{name}">')[2].partition("</section>")[0]


def test_page_is_complete_in_itself(full: Storage) -> None:
    page = page_of(full, mask=streaming_mask(4, 5))
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    assert "@import" not in page
    references = re.findall(r"(?:src|href)=\"([^\"]{0,30})|url\(([^)]{0,30})", page)
    assert references
    assert all((link or url).startswith(("#", "data:")) for link, url in references)
    assert len(page) < 1_500_000


def test_page_is_well_formed_and_names_nothing_twice(full: Storage) -> None:
    reader = Balance()
    reader.feed(page_of(full, mask=streaming_mask(4, 5)))
    assert not reader.open
    assert len(reader.identifiers) == len(set(reader.identifiers))


def test_sections_stand_in_order_and_nothing_is_missing(full: Storage) -> None:
    page = page_of(full, mask=streaming_mask(4, 5))
    assert re.findall(r'<section id="(\w+)">', page) == list(SECTIONS)
    assert 'class="missing"' not in page
    assert page.count("<figure") == 9
    assert section(page, "probabilities").count("<svg") == 2


def test_headline_numbers_are_those_of_the_artefacts(full: Storage) -> None:
    tiles = section(page_of(full), "headline")
    for text in (
        "Test AUC",
        "0.7962",
        "0.7901 to 0.8023",
        "\N{MINUS SIGN}0.0035",
        "last 10 feedbacks",
        "27.3",
        "10.1",
    ):
        assert text in tiles
    assert "87 users" in tiles


def test_log_is_told_of(full: Storage) -> None:
    log = section(page_of(full), "log")
    assert log.count("<svg") == 2
    for text in (
        "<dd>260</dd>",
        "<dd>12</dd>",
        "user_time",
        "From 1 to 70 interactions, 21.7 on average",
        "at most 20",
    ):
        assert text in log
    for name in CHECKS:
        assert f"<dt>{name.replace(chr(39), '&#x27;')}</dt><dd>" in log


def test_log_that_is_not_there_is_named_with_the_command_that_tells_of_it(storage: Storage) -> None:
    put_training(storage, "young", lines=6, validations=0)
    log = section(page_of(storage, "young"), "log")
    assert "datasets/ml-100k: is no complete data set" in log
    assert f"dti-ray data stats data.name=ml-100k storage.root={storage.root}" in log


def test_large_log_is_not_read_for_a_page(full: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dti_ray.report.log.MOST_INTERACTIONS", 259)
    log = section(page_of(full), "log")
    assert "260 interactions are too many to read for a page." in log
    assert "dti-ray data stats data.name=tiny" in log


def test_configuration_of_another_version_names_no_log(storage: Storage) -> None:
    storage.write("runs/old/config.yaml", b"data: {colour: red}\n")
    assert "No configuration says which log" in section(page_of(storage, "old"), "log")


def test_best_value_of_each_column_is_bold(full: Storage) -> None:
    table = section(page_of(full), "metrics")
    bold = re.findall(r'<td class="best">([\d.]+)', table)
    assert bold == ["0.7997", "0.5403", "0.7547", "0.8203", "0.7197", "1.000", "0.0203"]
    assert "<b>Sliding</b> protocol" in table
    assert "n = <b>10</b>" in table
    assert "87 users" in table


def test_metrics_without_an_interval_are_shown_plainly(full: Storage) -> None:
    path = "runs/demo/metrics/evaluation_test.json"
    tree = json.loads(full.read(path))
    tree["metrics"] |= {"f1": 0.7123, "gauc": None}
    full.write(path, json.dumps(tree).encode())
    page = page_of(full)
    assert "<td>0.7123</td>" in section(page, "metrics")
    assert "<td>\N{EN DASH}</td>" in section(page, "metrics")
    assert "nan" not in section(page, "headline")


def test_unevaluated_run_says_how_to_evaluate_it(storage: Storage) -> None:
    put_training(storage, "young", lines=60, validations=0)
    storage.write("runs/young/metrics/valid.jsonl", b"")
    page = page_of(storage, "young")
    command = f"dti-ray evaluate train.run=young storage.root={storage.root}"
    for name in ("headline", "metrics", "probabilities"):
        assert command in section(page, name)
    assert "Not validated yet." in section(page, "learning")
    assert "<svg" in section(page, "learning")
    assert "<svg" in section(page, "speed")
    assert "no mask is drawn" in section(page, "mask")


def test_run_with_nothing_but_its_configuration_still_has_a_page(storage: Storage) -> None:
    storage.write("runs/bare/config.yaml", b"train: {}\n")
    page = page_of(storage, "bare")
    assert page.count('class="missing"') == 9
    assert "dti-ray train train.run=bare" in page


def test_log_of_one_line_works(storage: Storage) -> None:
    put_training(storage, "one", lines=1, validations=1)
    page = page_of(storage, "one")
    assert section(page, "learning").count("<svg") == 2


def test_long_log_does_not_make_the_page_heavy(storage: Storage) -> None:
    put_training(storage, "long", lines=20_000, validations=6)
    put_evaluation(storage, "long", predictions=3_000)
    assert len(page_of(storage, "long", mask=streaming_mask(10, 30, prompts=4))) < 1_500_000


def test_run_that_diverged_still_has_a_page(storage: Storage) -> None:
    put_training(storage, "diverged", lines=4, validations=2)
    for name in ("train", "valid"):
        path = f"runs/diverged/metrics/{name}.jsonl"
        lines = [json.loads(line) for line in storage.read(path).splitlines()]
        kept = ("step", "targets", "tokens", "seconds")
        nulls = [{key: value if key in kept else None for key, value in line.items()} for line in lines]
        put_lines(storage, path, nulls)
    assert "nan" not in section(page_of(storage, "diverged"), "headline")


def test_step_that_was_logged_twice_counts_once(storage: Storage) -> None:
    put_training(storage, "resumed", lines=3, validations=0)
    path = "runs/resumed/metrics/train.jsonl"
    lines = storage.read(path).splitlines()
    storage.write(path, b"\n".join([*lines, *lines[1:]]))
    assert "for 12,000 targets" in section(page_of(storage, "resumed"), "headline")


def test_markup_in_artefacts_is_escaped(storage: Storage) -> None:
    put_training(storage, "bad", lines=3, validations=2)
    storage.write("runs/bad/config.yaml", b"prefix: </pre><script>alert(1)</script>\n")
    put_evaluation(storage, "bad", predictions=50, checkpoint="<b>&best</b>")
    picture = streaming_mask(2, 2)
    labels = ["<i>$x^$</i>", "\n", "電影", *picture.label[3:]]
    page = page_of(storage, "bad", MaskPicture(picture.visible, picture.kind, labels, "<u>row</u>"))
    for markup in ("<script", "<u>", "<i>$", "<b>&best"):
        assert markup not in page
    for text in ("&lt;/pre&gt;&lt;script&gt;", "&lt;b&gt;&amp;best", "&lt;u&gt;row", "&lt;i&gt;$x^$", "電影"):
        assert text in page


def test_unknown_run_lists_the_known_ones(full: Storage) -> None:
    put_training(full, "other", lines=1, validations=0)
    with pytest.raises(InputError, match="runs that exist: demo, other"):
        write_report(full, "dmeo", None)
    assert not full.exists("runs/dmeo")


def test_run_name_cannot_leave_the_runs_folder(full: Storage) -> None:
    with pytest.raises(InputError, match="no such run"):
        write_report(full, "../runs/demo", None)


def test_empty_root_has_no_runs_yet(storage: Storage) -> None:
    with pytest.raises(InputError, match="none yet"):
        write_report(storage, "demo", None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics/train.jsonl", b'{"step": 1, "targ'),
        ("metrics/valid.jsonl", b'{"step": 1, "targets": 5}\n'),
        ("metrics/evaluation_test.json", b"[]"),
        ("metrics/predictions_test.parquet", b"PAR1"),
        ("metrics/predictions_test.parquet", parquet({"label": [2], "probability": [0.5]})),
        ("metrics/predictions_test.parquet", parquet({"label": [1], "probability": [None]})),
        ("meta.json", b"{}"),
    ],
)
def test_unreadable_artefact_is_named(full: Storage, name: str, content: bytes) -> None:
    full.write(f"runs/demo/{name}", content)
    with pytest.raises(InputError, match=re.escape(name)):
        write_report(full, "demo", None)
