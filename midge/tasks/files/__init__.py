"""Data from files on the device: tables in CSV, NumPy arrays, and folders of images by class.

A task calls one of these from its `load_data`, and that is all it needs to write about data:

    def load_data(self, spec: DataSpec) -> Data:
        return load_csv(spec, label="species", class_names=("setosa", "versicolor", "virginica")).tensors()

Each reads what lies at `spec.data_dir`, takes the share of it that `spec` gives this agent (partition, classes, `sel_prob`,
`def_prob`), and raises a `TaskError` that names file, line and column where something is wrong. `midge.tasks.file_tasks` has
tasks that call them already.

**Give `class_names`** wherever classes are words. A label is a number to the model, and without a list of names each device
counts those that it happens to have, in sorted order: a device with cats and dogs would call dogs 1, and one with dogs alone
would call them 0. With a list, a name means the same number everywhere, and one that is not in it is an error.
"""

from midge.tasks.files.arrays import load_arrays
from midge.tasks.files.images import ImageFolder, load_images
from midge.tasks.files.places import Examples
from midge.tasks.files.tables import load_csv

__all__ = ["Examples", "ImageFolder", "load_arrays", "load_csv", "load_images"]
