from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from midge.tasks.base import TaskError
from tests.environment import unmeasured

pytest.importorskip("torch")

from midge.tasks import torchvision_compat

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")


def run(code, environment=None):
    """Run `code` in a process of its own: whether torchvision is imported cannot be undone."""
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    # Coverage would make torch's import take twice as long.
    environment = unmeasured() if environment is None else environment
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, env=environment)


def test_models_data_sets_and_transforms_work_whatever_torchvision_was_compiled_against():
    done = run(
        """
import torch
from midge.tasks.torchvision_compat import import_torchvision
torchvision = import_torchvision()
assert import_torchvision() is torchvision
from torchvision import datasets, models, transforms
from torchvision.transforms import v2
assert datasets.FashionMNIST.__name__ == "FashionMNIST"
model = models.squeezenet1_1(num_classes=3).eval()
assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
assert transforms.CenterCrop(2)(torch.zeros(1, 4, 4)).shape == (1, 2, 2)
assert v2.CenterCrop(2)(torch.zeros(1, 4, 4)).shape == (1, 2, 2)
""",
        dict(os.environ),
    )
    assert done.returncode == 0, done.stderr


def test_operators_that_are_there_are_not_declared_again():
    # As where the extension does load: both operators exist before torchvision is imported.
    done = run("""
import torch
library = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, name):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from midge.tasks import torchvision_compat
torchvision_compat.import_torchvision()
assert torchvision_compat._declared == []
""")
    assert done.returncode == 0, done.stderr


def test_only_what_is_missing_is_declared():
    done = run("""
import torch
library = torch.library.Library("torchvision", "FRAGMENT")
from midge.tasks import torchvision_compat
torchvision_compat._load_extension(__import__("importlib.util").util.find_spec("torchvision").submodule_search_locations)
if not hasattr(torch.ops.torchvision, "nms"):
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
torchvision_compat.import_torchvision()
assert hasattr(torch.ops.torchvision, "nms")
assert hasattr(torch.ops.torchvision, "qnms")
""")
    assert done.returncode == 0, done.stderr


def test_a_missing_torchvision_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(torchvision_compat, "find_spec", lambda _name: None)
    with pytest.raises(TaskError, match=r"torchvision is not installed: pip install 'midge\[torch\]'"):
        torchvision_compat.import_torchvision()
