"""What my_project learns: to read handwritten digits of 8 x 8 pixels. Put your network and your data in their place."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset

from midge.tasks.simple import SimpleTask


class Net(nn.Sequential):
    """Inputs float32[n, 1, 8, 8], outputs float32[n, 10]. Coordinator and agents must make the same network."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


def load_train():
    """What an agent trains on, as any data set of (input, label). Called on agents alone.

    Here every agent has the same data and takes its share of them, as agent.toml says. On real devices: what is on the device.
    With a parameter `data_dir`, it gets what `--data-dir` says.
    """
    return digits()[0]


def load_test():
    """What the coordinator evaluates each version on. With `test_data=None`, agents evaluate, on their own data."""
    return digits()[1]


def digits():
    """1,437 images to train on and 360 to test with; they come with scikit-learn, without a download."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    labels = torch.tensor(labels)
    cut = train_test_split(range(len(labels)), test_size=360, random_state=0, stratify=labels)
    return [TensorDataset(images[part], labels[part]) for part in cut]


task = SimpleTask(model=Net, train_data=load_train, test_data=load_test, loss=nn.CrossEntropyLoss(), name="my_project")
