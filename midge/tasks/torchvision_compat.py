"""torchvision where its compiled half does not load.

On a device without a GPU one installs torch for the CPU, from torch's own package index, and then some package pulls in
torchvision from PyPI, whose wheel is compiled against CUDA. Its extension `_C` needs CUDA's libraries, does not load, and
torchvision swallows that; but a few lines on it describes two operators that only the extension would have declared:

    RuntimeError: operator torchvision::nms does not exist

and no import of torchvision works, though models, data sets and transforms need no compiled code at all. The right
cure is a torchvision from the same index as torch. The remedy here is for fleets where that is not to be had: declare
the two operators, without an implementation, and import. Everything works but what really needs compiled operators
(non-maximum suppression, RoI pooling, deformable convolution: detection models), which says so when it is called.

    models = import_torchvision().models
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.library

from midge.tasks.base import TaskError

_NAMESPACE = "torchvision"
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

_torch: Any = torch  # torch.library has no type hints in some versions
_declared: list[Any] = []
"""Kept: what a library declares is undone when the library is collected."""


def import_torchvision() -> ModuleType:
    """Import torchvision, having first declared the operators that its extension would have, if it does not load.

    A torchvision that works is imported as it is.

    Raises:
        TaskError: torchvision is not installed.
    """
    if _NAMESPACE in sys.modules:
        return sys.modules[_NAMESPACE]
    spec = find_spec(_NAMESPACE)
    if spec is None:
        raise TaskError("torchvision is not installed: pip install 'midge[torch]'")
    _load_extension(list(spec.submodule_search_locations or []))
    missing = [schema for name, schema in _SCHEMAS.items() if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = _torch.library.Library(_NAMESPACE, "FRAGMENT")
        _declared.append(library)
        for schema in missing:
            library.define(schema)
    return importlib.import_module(_NAMESPACE)


def _load_extension(package_path: list[str]) -> None:
    """Load the extension as torchvision does, so that what it declares is there to be seen. Loading twice is harmless."""
    extension = PathFinder.find_spec("_C", package_path)
    if extension is None or extension.origin is None:
        return
    try:
        _torch.ops.load_library(extension.origin)
    except OSError:
        return  # as torchvision does: CUDA's libraries are not there
