"""What a study finds out once: what padding costs the published baseline, and how good counting and fitting are.

Stage: study, beside its runs. In: a `Study`. Out: `padded.json` and `classics/` in its folder.
Invariant: what is stored is not measured or fitted again.
"""

from __future__ import annotations

import json

from dti_ray.bench.train import bench_train
from dti_ray.study.answers import read_classics, store_classics
from dti_ray.study.check import Study
from dti_ray.study.follow import Follow
from dti_ray.telemetry import write_json

STEPS, REPEATS = 2, 3  # of the sample that padded and packed rows take turns on


def measure_once(study: Study, follow: Follow) -> None:
    """Time the reference padded and packed, in turns, if it is a sliding window and `study.padded` asks for it."""
    path = _padded_path(study)
    reference = study.of_row(study.reference)[0]
    if not study.base.study.padded or reference.config.packing.k != 1 or study.storage.exists(path):
        return
    inputs, step = study.inputs[study.reference], reference.config.optim.targets_per_step
    rows = bench_train(
        reference.config, inputs.dataset, inputs.table, [],
        targets=STEPS * step, targets_per_step=step, repeats=REPEATS, device=study.device,
        done=lambda done, total: follow.stage("timing the sliding window, padded and packed", done, total),
    )  # fmt: skip
    packed = next(row for row in rows if row.paradigm == "sliding_packed")
    write_json(study.storage, path, {"padded_over_packed": packed.speedup_padded, "spread": packed.spread})
    follow.say(f"the padded sliding window takes {packed.speedup_padded:.2f} times as long as the packed one")


def padded_over_packed(study: Study) -> float | None:
    """Return the seconds of the padded over those of the packed sliding window, or None where nobody measured them."""
    path = _padded_path(study)
    return json.loads(study.storage.read(path))["padded_over_packed"] if study.storage.exists(path) else None


def fit_once(study: Study, follow: Follow) -> None:
    """Fit the baselines without a language model, if they are asked for.

    Raises:
        ConfigError: a package of the extra `study` is not installed.
    """
    if not study.base.study.classical or read_classics(study.storage, study.name, study.splits) is not None:
        return
    from dti_ray.study.classical import fit_classics  # its packages are an extra

    dataset, base = study.inputs[study.reference].dataset, study.base
    classics = fit_classics(
        dataset, study.splits, base.packing.min_context, base.train.seed,
        on_progress=lambda done, total: follow.stage("fitting baselines without a language model", done, total),
    )  # fmt: skip
    store_classics(study.storage, study.name, classics)


def _padded_path(study: Study) -> str:
    return f"{study.folder}/padded.json"
