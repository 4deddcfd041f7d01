"""Three classical models, each fitted on training and chosen among a few on validation.

Stage: study, its baselines. In: numbers about each interaction (`known`), labels, and which rows are of training and
of validation. Out: `Fitted`, the one with the lowest log loss on validation.
Invariant: a model is fitted on rows of training alone, with the same seed to the same bits; rows of validation choose
among the fitted ones, and no other row is looked at before it is asked for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from dti_ray.errors import ConfigError, Fault
from dti_ray.metrics import log_loss

if TYPE_CHECKING:  # an extra
    from myfm import MyFMClassifier  # pyright: ignore[reportMissingImports]

# Before 0.5, which needs Python 3.12, myfm asks pkg_resources for its version: setuptools had that until 82.
NEEDED = ("myfm",) if sys.version_info >= (3, 12) else ("myfm", "pkg_resources")
PENALTIES = (0.1, 0.3, 1.0, 3.0)  # C of scikit-learn: the larger, the weaker
RANKS = (4, 8, 16)  # of the factorisation machine
SWEEPS = 100  # of Gibbs sampling over all parameters; predictions average over the last KEPT of them
KEPT = 60
LEAVES = (7, 15, 31)
MOST_TREES = 400
LEARNING_RATE = 0.05
LEAF_ROWS = 100

Rows: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Learning:
    """What a model may learn from, and what is chosen on.

    Attributes:
        label: int8 [N], of all interactions.
        train: rows that are fitted.
        valid: rows that choose.
        seed: of whatever is drawn.
    """

    label: NDArray[np.int8]
    train: Rows
    valid: Rows
    seed: int


@dataclass(frozen=True, eq=False)
class Fitted:
    """A model, and how good it is on validation.

    Attributes:
        choice: what it differs in from the others, for people.
        loss: on validation (nats per target).
        predict: rows -> P(click).
    """

    choice: str
    loss: float
    predict: Callable[[Rows], Floats]


def check_installed() -> None:
    """Look whether the baselines of a study can be fitted here.

    Raises:
        ConfigError: a package of the extra `study` is not installed.
    """
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            hint = "pip install 'dti-ray[study]', or leave them out: study.classical=false"
            raise ConfigError(Fault("study.classical", f"needs the package {name}", hint=hint))


def logistic_regression(blocks: list[sparse.csr_matrix], learning: Learning) -> Iterator[Fitted]:
    """Yield linear models of all columns, one for each penalty."""
    from sklearn.linear_model import LogisticRegression

    columns = sparse.csr_matrix(sparse.hstack(blocks))
    for penalty in PENALTIES:
        model = LogisticRegression(C=penalty, max_iter=5000)
        model.fit(columns[learning.train], learning.label[learning.train])

        def predict(rows: Rows, model: LogisticRegression = model) -> Floats:
            return np.asarray(model.predict_proba(columns[rows]))[:, 1]

        yield _fitted(f"C {penalty:g}", predict, learning)


def factorisation_machine(blocks: list[sparse.csr_matrix], learning: Learning) -> Iterator[Fitted]:
    """Yield factorisation machines of second order, one for each rank.

    Sampled by Gibbs, with a prior of its own for each block of columns, so that nothing else is left to choose
    (Rendle, "Factorization Machines with libFM", ACM TIST 3, 2012); the link is probit.
    """
    machine = _machine()
    columns = sparse.csr_matrix(sparse.hstack(blocks))
    widths = [block.shape[1] for block in blocks]  # pyright: ignore[reportOptionalSubscript] - SciPy has no types
    for rank in RANKS:
        model = machine(rank=rank, random_seed=learning.seed % 2**31)
        with contextlib.redirect_stderr(io.StringIO()):  # it draws a bar that nothing switches off
            model.fit(
                columns[learning.train], learning.label[learning.train].astype(np.int64),
                n_iter=SWEEPS, n_kept_samples=KEPT, group_shapes=widths,
            )  # fmt: skip
        yield _fitted(f"rank {rank}", lambda rows, model=model: model.predict_proba(columns[rows]), learning)


def gradient_boosting(columns: Floats, learning: Learning) -> Iterator[Fitted]:
    """Yield boosted trees, one for each number of leaves, with as many trees as are best on validation."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    for leaves in LEAVES:
        model = HistGradientBoostingClassifier(
            learning_rate=LEARNING_RATE, max_iter=MOST_TREES, max_leaf_nodes=leaves, min_samples_leaf=LEAF_ROWS,
            l2_regularization=1.0, random_state=learning.seed % 2**32,
            early_stopping=False,  # pyright: ignore[reportArgumentType] - its type is taken from the default, "auto"
        )  # fmt: skip
        model.fit(columns[learning.train], learning.label[learning.train])
        label, stages = learning.label[learning.valid], model.staged_predict_proba(columns[learning.valid])
        best = int(np.argmin([log_loss(label, stage[:, 1]) for stage in stages]))

        def predict(rows: Rows, model=model, best: int = best) -> Floats:
            return next(islice(model.staged_predict_proba(columns[rows]), best, None))[:, 1]

        yield _fitted(f"{leaves} leaves, {best + 1} trees", predict, learning)


def _machine() -> type[MyFMClassifier]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)
        from myfm import MyFMClassifier  # pyright: ignore[reportMissingImports]
    return MyFMClassifier


def _fitted(choice: str, predict: Callable[[Rows], Floats], learning: Learning) -> Fitted:
    loss = float(log_loss(learning.label[learning.valid], predict(learning.valid)))
    return Fitted(choice, loss, predict)
