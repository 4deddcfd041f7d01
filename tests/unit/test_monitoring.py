"""Dashboard, rules and documentation name the declared series, all of them and no other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from dti_ray.telemetry.series import SCORING, SERIES, SERVING
from tests.manifests import render

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "k8s" / "monitoring"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((FOLDER / "rules.yaml").read_text(encoding="utf-8"))["spec"]["groups"]
    for rule in group["rules"]
]
ALL = (*SERIES, *SCORING, *SERVING)
DECLARED = {series.exported for series in ALL}
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
WORDS = {"and", "or", "unless", "on", "ignoring", "by", "without", "offset", "bool", "group_left", "group_right"}
COLUMNS = 24  # of Grafana's grid


def names(expression: str) -> set[str]:
    """Return the series that a PromQL expression names: what is neither word, function, label nor literal."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^]]*\]|\b(by|without|on|ignoring|group_\w+)\s*\([^)]*\)', " ", expression)
    return {found for found in re.findall(r"\b[a-zA-Z_][\w:]*(?!\s*\(|[\w:])", bare) if found not in WORDS}


def panels(kind: str | None = None) -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if kind is None or panel["type"] == kind]


def expressions() -> Iterator[str]:
    """Yield what the dashboard asks Prometheus for."""
    for panel in panels():
        yield from (target["expr"] for target in panel.get("targets", ()))
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.*), \w+\)", variable["query"]["query"])
            assert found is not None
            yield found[1]


@pytest.mark.parametrize(
    ("expression", "named"),
    [
        ('max by (run) (ray_dti_loss{run=~"$run|ray_x"})', {"ray_dti_loss"}),
        ("rate(ray_a_total[15m]) / on (run) group_left (x) ray_b offset 5m > 0.2", {"ray_a_total", "ray_b"}),
        ("(namespace_run:a:ratio == 1) unless max by (namespace, run) (up)", {"namespace_run:a:ratio", "up"}),
    ],
)
def test_names_of_an_expression_are_found(expression: str, named: set[str]) -> None:
    assert names(expression) == named


def test_dashboard_shows_every_declared_series_and_no_other() -> None:
    assert set().union(*map(names, expressions())) == DECLARED


def test_rules_name_declared_and_recorded_series_only() -> None:
    assert set().union(*(names(rule["expr"]) for rule in RULES)) <= DECLARED | RECORDED


def test_every_recorded_series_is_used_by_an_alert() -> None:
    assert set().union(*(names(rule["expr"]) for rule in RULES if "alert" in rule)) >= RECORDED


def test_alerts_say_which_run_what_is_wrong_and_what_to_do() -> None:
    for rule in RULES:
        if "alert" in rule:
            assert "{{ $labels.run }}" in rule["annotations"]["summary"]
            assert rule["annotations"]["description"]
            assert rule["labels"]["severity"] in ("info", "warning", "critical")


def test_series_have_the_names_that_prometheus_wants() -> None:
    assert len({series.name for series in ALL}) == len(ALL)
    assert len({(series.line, series.key) for series in ALL}) == len(ALL)
    for series in ALL:
        assert re.fullmatch(r"dti_[a-z_]+", series.name)
        assert not series.name.endswith("_total"), "the format appends it to counters"
        assert series.name.endswith("_ratio") == (series.unit == "share")


def test_panels_are_grouped_and_do_not_overlap() -> None:
    assert [row["title"] for row in panels("row")] == ["Speed", "Quality", "Health", "Data", "Serving"]
    assert len({panel["id"] for panel in panels()}) == len(panels())
    for panel in panels():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= COLUMNS
    for one, other in combinations([panel["gridPos"] for panel in panels()], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above


def test_every_panel_asks_the_chosen_data_source_for_the_chosen_runs() -> None:
    assert DASHBOARD["schemaVersion"] >= 39
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "group", "run"]
    for panel in panels():
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
            assert panel["description"]
            for target in panel["targets"]:
                assert target["datasource"] == panel["datasource"]
                assert "$run" in target["expr"]


def test_folder_renders_with_the_dashboard_where_grafana_looks_for_it() -> None:
    found = {manifest["kind"]: manifest for manifest in render(FOLDER)}
    assert set(found) == {"ConfigMap", "PodMonitor", "PrometheusRule"}
    assert found["ConfigMap"]["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(found["ConfigMap"]["data"]["dti-ray.json"]) == DASHBOARD
    assert {manifest["metadata"]["namespace"] for manifest in found.values()} == {"dti-ray"}
    assert {manifest["metadata"]["labels"]["release"] for manifest in found.values()} == {"prometheus"}


def test_documented_table_is_the_declared_one() -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    rows = [tuple(cell.strip(" `") for cell in line.split("|")[1:-1]) for line in text.splitlines() if "`ray_" in line]
    assert [row for row in rows if len(row) == 5] == [
        (series.exported, series.kind, series.unit, f"{series.line}.{series.key}", series.description) for series in ALL
    ]


def test_documented_alerts_are_those_of_the_rules() -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(DtiRay\w+)`", text)) == {rule["alert"] for rule in RULES if "alert" in rule}
