"""One row of a study again, under a name of its own, and whether it says the same.

Stage: study, for whoever does not believe it. In: a row and a seed. Out: `Repeat`s, one for each of its answers.
Invariant: nothing of the study is changed; what was done again is not done once more.
"""

from __future__ import annotations

from dataclasses import dataclass

from dti_ray.errors import ConfigError, Fault
from dti_ray.metrics import auc
from dti_ray.study.answers import asked, compute_answers, find_answers, read_answers
from dti_ray.study.check import Study
from dti_ray.study.collect import collect_results
from dti_ray.study.compare import Asked, Quality, compare
from dti_ray.study.follow import Follow
from dti_ray.study.plan import PlannedRun
from dti_ray.study.results import Answer
from dti_ray.study.train import drop_states, train_run
from dti_ray.train.host import settle
from dti_ray.train.identity import check_same_run


@dataclass(frozen=True)
class Repeat:
    """One answer of a run that was done again.

    Attributes:
        split: valid or test.
        protocol: sliding or streaming.
        n: context at inference (interactions).
        auc: now.
        stated: what the study found with this seed; None where it has not come to this run.
        within: where the report says that a rerun lies with 95 %, whatever its seed; None where it cannot say.
    """

    split: str
    protocol: str
    n: int
    auc: float
    stated: float | None
    within: tuple[float, float] | None

    @property
    def is_inside(self) -> bool | None:
        """Whether the AUC lies in the stated interval; None where there is none."""
        return None if self.within is None else self.within[0] <= self.auc <= self.within[1]


def choose_run(study: Study, row: str, seed: int | None) -> PlannedRun:
    """Return the run of a row with a seed, its first one where none is named.

    Raises:
        ConfigError: the study has no such row, or the row no such seed.
    """
    runs = study.of_row(row)
    if not runs:
        raise ConfigError(Fault("--row", f"got {row!r}", f"one of {', '.join(study.base.study.rows)}"))
    found = next((run for run in runs if seed in (None, run.seed)), None)
    if found is None:
        seeds = ", ".join(str(run.seed) for run in runs)
        raise ConfigError(Fault("--seed", f"got {seed}", f"one of {seeds}, as row {row} has"))
    return found


def run_again(study: Study, run: PlannedRun, follow: Follow) -> list[Repeat]:
    """Train and ask a run again, and hold it against what the study has stored of it.

    Args:
        study: from `check_study`.
        run: of the study.
        follow: is told what happens.

    Raises:
        InputError: the name of the repetition was used with another configuration.
        RunError: a loss or gradient is not finite.
        StorageError: storage cannot be reached.
    """
    again, inputs = run.again, study.inputs[run.row]
    answers = find_answers(study.storage, study.name, again)
    if answers is None:
        check_same_run(again.config, study.storage)
        settle(study.device)
        follow.begin(again, 1, 1, study.total_targets(run))
        train_run(again.config, study.storage, inputs, study.device, follow.line, follow.say)
        answers = tuple(answer for split, n in asked(again) for answer in _ask(study, again, split, n, follow))
        drop_states(study.storage, again.name, is_best_kept=False)
    else:
        where = [study.storage.display(path) for path in (f"runs/{again.name}", f"{study.folder}/answers/{again.name}")]
        follow.say(f"{again.name} was done before; delete {' and '.join(where)} to do it once more")
    qualities = compare(collect_results(study, ""), replicates=0).qualities
    return [_held_against(qualities.get(Asked(one.split, run.row, one.protocol, one.n)), run, one) for one in answers]


def _ask(study: Study, run: PlannedRun, split: str, n: int, follow: Follow) -> tuple[Answer, ...]:
    found = read_answers(study.storage, study.name, run, split, n)
    return found or compute_answers(
        study.storage, study.name, run, split, n, study.inputs[run.row].table, study.device,
        on_progress=lambda done, total: follow.stage(f"asking {split}, n = {n}", done, total),
    )  # fmt: skip


def _held_against(found: Quality | None, run: PlannedRun, answer: Answer) -> Repeat:
    by_seed = {} if found is None else dict(zip(found.seeds, found.auc_by_seed, strict=True))
    return Repeat(
        answer.split, answer.protocol, answer.n,
        auc=float(auc(answer.predictions.label, answer.predictions.probability)),
        stated=by_seed.get(run.seed),
        within=None if found is None else found.rerun,
    )  # fmt: skip
