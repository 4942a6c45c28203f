"""What can go wrong before any broker is there: python -m pytest"""

from pathlib import Path

from coordinator.config import load_settings
from midge.tasks.base import DataSpec, TrainSpec
from midge.tasks.registry import find_task

HERE = Path(__file__).parent
task = find_task(str(HERE / "my_project.py"))


def test_one_training_on_one_agents_share_makes_the_model_better():
    settings = load_settings(file=HERE / "midge.toml", environ={})
    share = task.load_data(DataSpec(partition="iid", part=0, num_parts=2))
    spec = TrainSpec(
        local_epochs=settings.local_epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        momentum=settings.momentum,
    )
    before = task.initial_state(settings.seed)
    after = task.train(before, share, spec, lambda fraction: None)
    assert after.num_examples == len(share)
    assert task.evaluate(after.state, task.test_data()).loss < task.evaluate(before, task.test_data()).loss


def test_the_shares_of_two_agents_are_all_the_data():
    shares = [task.load_data(DataSpec(partition="iid", part=part, num_parts=2)) for part in (0, 1)]
    assert sum(len(share) for share in shares) == len(task.load_data(DataSpec()))
