"""What is known of a scoring job before any row is read, and what decides its output.

Stage: batch scoring. In: a `RunConfig`, the root. Out: `Job`; its `inputs`, which stay with its name.
Invariant: everything that can be wrong without reading a row is told here, on the driver.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from dti_ray.config import RunConfig
from dti_ray.config.score import NOT_IN_CONTENT
from dti_ray.data.interactions import Dataset, open_dataset
from dti_ray.errors import Fault, InputError
from dti_ray.score.histories import partitions_of
from dti_ray.score.log import HISTORY, TIME, WHERE, RequestLog, locate
from dti_ray.score.model import Chosen, choose
from dti_ray.score.scatter import Rules
from dti_ray.storage import Storage, fingerprint

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
SCRATCH = "scratch"  # below the scores, until the manifest is written
Inputs = dict[str, object]  # flat: what decides the content, by a name that a person knows


@dataclass(frozen=True)
class Job:
    """Everything that is known before any row is read.

    Attributes:
        config: `score`, `cluster` and the unit of times count.
        storage: the root.
        log: the requests.
        model: which scores.
        dataset: name of the data set that holds the histories.
        partitions: of the requests.
        inputs: all that decides the output.
    """

    config: RunConfig
    storage: Storage
    log: RequestLog
    model: Chosen
    dataset: str
    partitions: int
    inputs: Inputs

    @property
    def folder(self) -> str:
        """Path below the root."""
        return f"scores/{self.config.score.name}"

    @property
    def scratch(self) -> str:
        """Folder of scratch files and states."""
        return f"{self.folder}/{SCRATCH}"

    @property
    def rules(self) -> Rules:
        """How the log is read."""
        needs_time = self.model.config.prompt.time != "off"
        return Rules(self.log, self.config.score, self.config.data, needs_time)


def plan(config: RunConfig, storage: Storage) -> Job:
    """Check everything that needs no worker: files, columns, model, data set.

    Raises:
        InputError: with one fault per thing that is missing or wrong.
        StorageError: something cannot be reached.
    """
    log = locate(config.score)
    model = choose(config, storage)
    dataset = open_dataset(storage, config.score.dataset or model.config.data.name)
    if model.config.prompt.time != "off" and TIME not in log.columns:
        hint = "set score.columns.time to the column of the request's moment"
        raise InputError(Fault(f"{WHERE}.time", "is null; this model reads how long ago things happened", hint=hint))
    if model.config.prompt.time != "off" and HISTORY in log.columns:
        past = log.kinds[HISTORY].value_type
        if past.get_field_index("time") < 0:
            where = f"{WHERE}.history={log.columns[HISTORY]}"
            raise InputError(Fault(where, "holds no time; this model reads how long ago things happened"))
    if dataset.partitions is None and len({segment.shard for segment in dataset.segments}) > 1:
        logger.warning("data set %s does not say where its users lie: all of it is read for each unit", dataset.name)
    partitions = partitions_of(dataset, log.pairs, config.score.unit_pairs)
    return Job(config, storage, log, model, dataset.name, partitions, _inputs(config, log, model, dataset))


def _inputs(config: RunConfig, log: RequestLog, model: Chosen, dataset: Dataset) -> Inputs:
    """Return all that decides the output."""
    asked = config.score.model_dump(mode="json", exclude={"columns", *NOT_IN_CONTENT})
    infos = log.storage.infos(log.files)
    return {
        "schema_version": SCHEMA_VERSION,
        **{f"score.{key}": value for key, value in asked.items()},
        **{f"{WHERE}.{key}": value for key, value in config.score.columns.model_dump(mode="json").items()},
        **{f"data.{key}": getattr(config.data, key) for key in ("time_unit", "time_zone") if TIME in log.columns},
        **{f"model {key}": value for key, value in model.identity.items()},
        f"data set {dataset.name}": fingerprint(dataset.files),
        **{log.name(i): [info.size, str(info.mtime)] for i, info in enumerate(infos)},
    }
