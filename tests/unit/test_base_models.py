"""Base models: a name keeps a model, runs begin from it by its digest, and nothing in use can be removed."""

from __future__ import annotations

import numpy as np
import pytest
import sqlalchemy as sa
import torch
from safetensors.torch import save_file

from coordinator import base_models
from coordinator import evaluator_messages as msg
from coordinator import run_events as ev
from coordinator.base_models import BaseModelError
from coordinator.evaluation_worker import EvaluationWorker
from coordinator.models import ModelStore
from coordinator.store import DATABASE, Store
from midge.wire.errors import TopicError
from tests.broker.tasks import linear

TASK = "tests.broker.tasks:linear"


class Disk:
    """A state directory, and what may be done in it."""

    def __init__(self, directory) -> None:
        self.directory = directory
        self.store = Store(directory)
        self.models = ModelStore(directory / "models")

    def push(self, name: str, *, seed: int = 0, file=None, task: str = TASK) -> str:
        return base_models.push(self.store, self.models, name, task=task, seed=seed, file=file)

    def remove(self, name: str) -> bool:
        return base_models.remove(self.store, self.models, name)

    def run_from(self, digest: str) -> str:
        definition = {"base_model": digest}
        return self.store.create_run(federation="lab", task=TASK, fingerprint="f", definition=definition, rounds=9)


@pytest.fixture
def disk(tmp_path):
    made = Disk(tmp_path)
    yield made
    made.store.close()


def test_a_tasks_initial_model_is_registered_under_a_name(disk):
    digest = disk.push("base", seed=3)
    assert base_models.digest_of(disk.store, "base") == digest
    assert base_models.digest_of(disk.store, "") == ""
    with disk.models.open(digest) as model:
        np.testing.assert_array_equal(model.state()["weight"], linear.initial_state(3)["weight"])
    (row,) = disk.store.base_models()
    assert (row["name"], row["task"], row["source"], row["num_elements"]) == ("base", TASK, "seed 3", 5)
    assert disk.push("base", seed=3) == digest  # once more changes nothing
    assert disk.store.base_models() == [row]


def test_a_file_of_a_torch_user_is_registered(disk, tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file({"bias": torch.tensor([0.5]), "weight": torch.full((1, 4), 2.0)}, file)
    with disk.models.open(disk.push("mine", file=file)) as model:
        state = model.state()
    assert list(state) == list(linear.initial_state(0))
    assert (state["weight"].tolist(), state["bias"].tolist()) == ([[2.0] * 4], [0.5])
    assert disk.store.base_model("mine")["source"] == "weights.safetensors"


def test_a_file_that_does_not_fit_says_which_tensor_and_both_shapes_and_registers_nothing(disk, tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file({"bias": torch.zeros(1), "weight": torch.zeros(1, 8)}, file)
    problem = (
        rf"weights\.safetensors does not fit task {TASK}: it has weight \(1, 8\) float32, "
        r"expected \(1, 4\) float32"
    )
    with pytest.raises(BaseModelError, match=f"^{problem}"):
        disk.push("mine", file=file)
    assert disk.store.base_models() == []
    assert disk.models.digests() == set()


def test_a_name_that_has_another_model_is_not_given_away(disk):
    digest = disk.push("base", seed=1)
    with pytest.raises(
        BaseModelError, match=r"base is another model already, .*: choose another name, or free it with"
    ):
        disk.push("base", seed=2)
    assert disk.models.digests() == {digest}


def test_a_name_is_an_identifier_and_a_task_that_is_not_there_is_told(disk):
    with pytest.raises(TopicError, match="base model 'My Base': expected 1 to 64 characters"):
        disk.push("My Base")
    with pytest.raises(BaseModelError, match="Did you mean 'linear'"):
        disk.push("base", task="tests.broker.tasks:linaer")


def test_a_name_that_nobody_registered_is_told_with_those_that_are(disk):
    with pytest.raises(BaseModelError, match="`coordinator models push other` does it; none is registered yet"):
        base_models.digest_of(disk.store, "other")
    disk.push("base")
    with pytest.raises(BaseModelError, match=r"no model of that name is registered.*there are base"):
        base_models.digest_of(disk.store, "other")
    with pytest.raises(BaseModelError, match="there is no base model other; there are base"):
        disk.remove("other")


def test_what_is_removed_takes_its_file_along_unless_something_uses_it(disk):
    digest = disk.push("base")
    assert disk.push("twin") == digest
    assert disk.remove("base") is False
    assert disk.models.digests() == {digest}
    assert disk.remove("twin") is True
    assert disk.models.digests() == set()
    digest = disk.push("base")
    run_id = disk.run_from(digest)
    with pytest.raises(BaseModelError, match=rf"run {run_id} begins from base and is not over \(preparing\)"):
        disk.remove("base")
    disk.store.save(run_id, [ev.SaveVersion(0, digest, None), ev.SaveRun("done", "", 9, None, None)])
    assert disk.remove("base") is False  # version 0 of the run is that model
    assert disk.models.digests() == {digest}


def test_retention_never_deletes_a_base_model(disk):
    digest = disk.push("base")
    run_id = disk.run_from(digest)
    disk.store.save(run_id, [ev.SaveVersion(0, digest, None)])
    assert disk.store.lone_digest(run_id, 0, kept_from=1) is None
    disk.store.remove_base_model("base")
    assert disk.store.lone_digest(run_id, 0, kept_from=1) == digest


def test_a_database_from_before_there_were_base_models_has_none(disk):
    with sa.create_engine(f"sqlite:///{disk.directory / DATABASE}").begin() as connection:
        connection.execute(sa.text("drop table base_models"))
    store = Store(disk.directory, read_only=True)
    assert store.base_models() == []
    store.close()


def test_a_run_begins_from_the_base_model_only_where_it_fits_the_task(disk):
    worker, replies = EvaluationWorker(), []

    def ask(request) -> msg.Reply:
        worker.handle(base_models._encode(request), replies.append)
        return base_models._decode(replies[-1])

    worker.handle(base_models._encode(msg.SetUp(task=TASK, models_dir=str(disk.models.path))), replies.append)
    digest = disk.push("base", seed=9)
    assert ask(msg.MakeModel(request=1, seed=0, base_digest=digest)).digest == digest
    other = disk.models.save_state({**linear.initial_state(0), "weight": np.zeros((1, 8), np.float32)})
    failed = ask(msg.MakeModel(request=2, seed=0, base_digest=other))
    assert failed.reason.startswith("base_model does not fit: it has weight (1, 8) float32, expected (1, 4) float32")
    (disk.models.path / f"{digest}.safetensors").write_bytes(b"damaged")
    assert "the file is damaged" in ask(msg.MakeModel(request=3, seed=0, base_digest=digest)).reason
