from __future__ import annotations

from pathlib import Path

from dti_ray.bench.pack import bench_pack
from tests.builders import make_config, make_table, write_dataset


def test_rates_are_given_for_every_k(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [30, 25, 41])
    rows = bench_pack(make_config("packing.n=4"), dataset, make_table(), [1, "all"], repeats=2)
    assert [row.k for row in rows] == [1, "all"]
    assert all(row.tokens_per_s_per_core > row.targets_per_s_per_core > 0 for row in rows)
    assert rows[0].tokens_per_s_per_core / rows[0].targets_per_s_per_core > 5  # context of 4
