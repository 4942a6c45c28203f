"""TensorBoard and MLflow. Each library is an extra, imported by the thread that uses it, once a run has begun.

TensorBoard's own package writes event files, with neither torch nor TensorFlow. MLflow is its client (mlflow-skinny), to a
server or to a database of its own; a run of ours is a run there, found again by the tag `midge.run_id`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coordinator.config import Settings
from coordinator.tracking import Tracker, TrackerError, Values

_MLFLOW_BATCH = 500
_MAX_PARAMETER = 500
_DATABASES = frozenset({"sqlite", "postgresql", "mysql", "mssql"})
_ENDS = {"done": "FINISHED", "failed": "FAILED"}


def make_trackers(settings: Settings) -> list[Tracker]:
    """Those that the settings name.

    Raises:
        TrackerError: the library of one is not installed.
    """
    trackers: list[Tracker] = []
    if settings.tensorboard_dir:
        _need("tensorboard", "tensorboard_dir", "tensorboard")
        trackers.append(TensorBoard(Path(settings.tensorboard_dir)))
    if settings.mlflow_uri:
        _need("mlflow", "mlflow_uri", "mlflow")
        if "://" in settings.mlflow_uri and settings.mlflow_uri.partition(":")[0].partition("+")[0] in _DATABASES:
            _need("alembic", "mlflow_uri", "mlflow")
        trackers.append(MLflow(settings.mlflow_uri, f"midge-{settings.federation}"))
    return trackers


def _need(library: str, setting: str, extra: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise TrackerError(
            f"{setting} is set, and {library} is not installed: pip install 'midge[{extra}]', or take {setting} out"
        )


class TensorBoard:
    """Event files in `<directory>/<run_id>/`.

    Args:
        directory: for all runs; what `tensorboard --logdir` is given.
    """

    name = "tensorboard"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: Any = None

    def open(self, run_id: str, task: str, definition: Mapping[str, object]) -> Mapping[str, int]:  # noqa: ARG002
        """See `Tracker.open`."""
        from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader  # noqa: PLC0415
        from tensorboard.compat.proto.event_pb2 import Event  # noqa: PLC0415
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # noqa: PLC0415

        directory = self._directory / run_id
        last: dict[str, int] = {}
        for path in sorted(directory.glob("events.out.tfevents.*")):
            for raw in RawEventFileLoader(str(path)).Load():
                event = Event.FromString(raw)
                for value in event.summary.value:
                    last[value.tag] = max(last.get(value.tag, 0), event.step)
        self._writer = EventFileWriter(str(directory))
        return last

    def log(self, step: int, values: Values) -> None:
        """See `Tracker.log`."""
        from tensorboard.compat.proto.event_pb2 import Event  # noqa: PLC0415
        from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415

        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._writer.add_event(Event(step=step, wall_time=time.time(), summary=summary))
        self._writer.flush()

    def close(self, state: str) -> None:  # noqa: ARG002
        """See `Tracker.close`."""
        self._writer.close()


class MLflow:
    """A run in an experiment of the federation.

    Args:
        uri: of the tracking server or database: `http://server:5000`, `sqlite:///mlflow.db`.
        experiment: its name.
    """

    name = "mlflow"

    def __init__(self, uri: str, experiment: str) -> None:
        self._uri = uri
        self._experiment = experiment
        self._client: Any = None
        self._id = ""

    def open(self, run_id: str, task: str, definition: Mapping[str, object]) -> Mapping[str, int]:
        """See `Tracker.open`."""
        for key, value in _MLFLOW_ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        from mlflow.entities import Param  # noqa: PLC0415
        from mlflow.tracking import MlflowClient  # noqa: PLC0415

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._client = MlflowClient(tracking_uri=self._uri)
        found = self._client.get_experiment_by_name(self._experiment)
        experiment_id = found.experiment_id if found else self._client.create_experiment(self._experiment)
        runs = self._client.search_runs([experiment_id], f"tags.`midge.run_id` = '{run_id}'")
        if runs:
            self._id = runs[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return {
                name: max(point.step for point in self._client.get_metric_history(self._id, name))
                for name in runs[0].data.metrics
            }
        tags = {"midge.run_id": run_id, "midge.task": task}
        self._id = self._client.create_run(experiment_id, run_name=run_id, tags=tags).info.run_id
        params = [Param(key, str(value)[:_MAX_PARAMETER]) for key, value in definition.items()]
        self._client.log_batch(self._id, params=params)
        return {}

    def log(self, step: int, values: Values) -> None:
        """See `Tracker.log`."""
        from mlflow.entities import Metric  # noqa: PLC0415

        now_ms = int(time.time() * 1000)
        metrics = [Metric(name, value, now_ms, step) for name, value in values.items()]
        for first in range(0, len(metrics), _MLFLOW_BATCH):
            self._client.log_batch(self._id, metrics=metrics[first : first + _MLFLOW_BATCH])

    def close(self, state: str) -> None:
        """See `Tracker.close`."""
        self._client.set_terminated(self._id, status=_ENDS.get(state, "KILLED"))


_MLFLOW_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # nobody is told that a federation runs
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
