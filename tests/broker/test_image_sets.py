"""Scenario 3: ResNet-18 on images in CIFAR-10's files, from one JSON file with the original's keys, summed with lambda."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from midge.tasks.base import DataSpec, TrainSpec, seed_of
from tests.tasks import small_sets

pytestmark = pytest.mark.usefixtures("unmeasured")

TASK = "tests.tasks.small_sets:SmallCifar10"
CONF = {
    "model_name": "resnet18",
    "no_models": 3,
    "type": "cifar",
    "global_epochs": 1,
    "local_epochs": 1,
    "k": 2,
    "batch_size": 4,
    "lr": 0.01,
    "momentum": 0.0001,
    "lambda": 0.1,
}


@pytest.fixture(autouse=True)
def one_thread():
    """As in a worker: a sum over several threads has other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_k_of_the_agents_are_drawn_each_round_and_their_deltas_are_summed_with_lambda(
    mosquitto, make_federation, tmp_path
):
    small_sets.write_cifar10(tmp_path / "sets", per_batch=6, num_test=10)  # 30 images: 10 for each agent
    conf = tmp_path / "conf.json"
    conf.write_text(json.dumps(CONF))
    federation = make_federation(mosquitto.url, task=TASK)
    for part in range(3):
        share = ("--data-dir", str(tmp_path / "sets"), "--partition", "contiguous", "--of", "3")
        federation.start_agent(f"client-{part}", *share, part=part)
    # --task, which `Federation` gives, is cifar10 with the sums of these small files.
    coordinator = federation.start_coordinator("--data-dir", str(tmp_path / "sets"), str(conf), seed=1)
    assert coordinator.wait(90) == 0

    task = small_sets.SmallCifar10()
    spec = {"data_dir": tmp_path / "sets", "partition": "contiguous", "num_parts": 3}
    data = {f"client-{part}": task.load_data(DataSpec(part=part, **spec)) for part in range(3)}
    assert [labels.tolist() for _, labels in data.values()] == [
        [0, 1, 2, 3, 4, 5, 0, 1, 2, 3],
        [4, 5, 0, 1, 2, 3, 4, 5, 0, 1],
        [2, 3, 4, 5, 0, 1, 2, 3, 4, 5],
    ]
    before, after = federation.model(0), federation.model(1)
    drawn = sorted(federation.updates(1))
    assert len(drawn) == 2
    locals_ = [
        task.train(
            before,
            data[agent_id],
            TrainSpec(batch_size=4, learning_rate=0.01, momentum=0.0001, seed=seed_of(1, 1, agent_id)),
            lambda fraction: None,
        ).state
        for agent_id in drawn
    ]
    for name, start in before.items():
        if start.dtype.kind == "f":
            summed = sum(local[name].astype(np.float64) - start for local in locals_)
            np.testing.assert_allclose(after[name], start + 0.1 * summed, rtol=1e-6, atol=1e-7, err_msg=name)
        else:
            # 10 images are 3 batches of 4, 4 and 2: counted on each agent, and the largest count is kept.
            assert after[name] == max(local[name] for local in locals_) == 3
            assert after[name].dtype == np.int64
    assert not np.array_equal(before["fc.weight"], after["fc.weight"])
    for version in federation.versions():
        assert version["central"].num_examples == 10
        assert 0 <= version["central"].metrics["accuracy"] <= 1


def test_without_its_files_the_coordinator_goes_on_and_an_agent_refuses_both_saying_where_they_go(
    mosquitto, make_federation, tmp_path
):
    federation = make_federation(mosquitto.url, task="mnist")
    federation.start_agent("client-0", "--data-dir", str(tmp_path / "none"))
    coordinator = federation.start_coordinator(
        rounds=1, min_agents=1, data_dir=tmp_path / "none", max_attempts=1, selection_deadline_s=20
    )
    assert coordinator.wait() == 1
    assert f"{tmp_path}/none/MNIST/raw lacks train-images-idx3-ubyte, " in coordinator.log()
    assert federation.versions()[0]["central"] is None
