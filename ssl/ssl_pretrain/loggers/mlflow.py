"""MLflow: curves, scores, flags and pictures in the run folder (a SQLite file), or on the server of MLFLOW_TRACKING_URI."""

import logging
import os
import re
import time
from pathlib import Path
from typing import Any, final

import numpy as np

from .. import plugins
from . import Logger
from ._rows import Row, Rows

EXPERIMENT = "ssl-pretrain"  # unless MLFLOW_EXPERIMENT_NAME names another one
MOST_PARAMETERS = 100  # in one request
LONGEST_PARAMETER = 500
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


@final
class MLflow(Logger):
    """A run of the library mlflow, by its client alone: no code, git commit, user or system metrics. A user name, password
    or token for a server stays in MLFLOW_TRACKING_USERNAME, _PASSWORD or _TOKEN; none is read here."""

    def begin(self, out: Path, config: dict[str, Any], step: int) -> None:
        """Open the run, or the same run again."""
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = os.environ["DO_NOT_TRACK"] = "true"  # before its import
        server = os.environ.get("MLFLOW_TRACKING_URI")
        if server is None:
            for library in ("sqlalchemy", "alembic"):
                plugins.optional(library, "--logger mlflow", "'ssl-pretrain[mlflow]'")
        plugins.optional("mlflow", "--logger mlflow", "'ssl-pretrain[mlflow]'")
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they tell the console of each new table
        self._metric = Metric
        folder = (out / "mlflow").absolute()
        folder.mkdir(exist_ok=True)
        self._client = MlflowClient(tracking_uri=server or f"sqlite:///{out.absolute() / 'mlflow.db'}")
        self._rows = Rows(out, folder / "continue.json")
        self._run = self._found(self._rows.run) or self._new(out, config, None if server else folder.as_uri(), Param)
        self._client.update_run(self._run, status="RUNNING")
        self._rows.begin(self._run, step, self._send)

    def metrics(self, line: dict[str, Any]) -> None:
        """See `Logger.metrics`."""
        self._rows.metrics(line)

    def scores(self, group: str, values: dict[str, float], step: int) -> None:
        """See `Logger.scores`."""
        self._rows.scores(group, values, step)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """See `Logger.picture`."""
        self._rows.picture(name, pixels, step)

    def end(self, state: str) -> None:
        """Send what is left, and how the run stands."""
        self._rows.flush()
        self._client.set_tag(self._run, "state", state)
        self._client.set_terminated(self._run, STATUS[state.partition(":")[0]])

    def _found(self, run: str | None) -> str | None:
        """The run of an earlier start, where the database has it."""
        from mlflow.exceptions import MlflowException

        if run is not None:
            try:
                return self._client.get_run(run).info.run_id
            except MlflowException as problem:
                if problem.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        return None

    def _new(self, out: Path, config: dict[str, Any], artifacts: str | None, kind: Any) -> str:
        """A new run with the flags as its parameters."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name, artifact_location=artifacts)
        run = self._client.create_run(experiment, run_name=out.name).info.run_id
        flags = [kind(name, str(value)[:LONGEST_PARAMETER]) for name, value in config.items()]
        for first in range(0, len(flags), MOST_PARAMETERS):
            self._client.log_batch(run, params=flags[first : first + MOST_PARAMETERS])
        return run

    def _send(self, row: Row) -> None:
        at = round((row.time or time.time()) * 1000)
        metrics = [self._metric(_allowed(name), value, at, row.step) for name, value in row.numbers.items()]
        self._client.log_batch(self._run, metrics=metrics)
        for name, pixels in row.pictures.items():
            self._client.log_image(self._run, pixels, key=_allowed(name), step=row.step)


def _allowed(name: str) -> str:
    """A name in the letters that MLflow takes."""
    return re.sub(r"[^\w\-. /]", "-", name, flags=re.ASCII)
