"""Somebody's own training, which knows nothing of federated learning: `python tutorial.py` trains in one place.

The network and the settings are those of Flower's PyTorch tutorial: CIFAR-10, SGD with learning rate 0.001 and momentum 0.9,
batches of 32. Where CIFAR-10 is not there, scikit-learn's digits stand in for it, enlarged to its shape.
"""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

DEVICE = torch.device("cpu")


class Net(nn.Module):
    """Two convolutions and three linear layers: images of 3 x 32 x 32, ten classes."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, images):
        hidden = self.pool(functional.relu(self.conv1(images)))
        hidden = self.pool(functional.relu(self.conv2(hidden))).flatten(1)
        return self.fc3(functional.relu(self.fc2(functional.relu(self.fc1(hidden)))))


def load_data(data_dir="data"):
    """A training and a test loader."""
    try:
        trainset, testset = cifar10(data_dir)
    except (ImportError, RuntimeError) as error:
        print(f"digits stand in for the CIFAR-10 of {data_dir}: {error}")
        trainset, testset = digits()
    return DataLoader(trainset, batch_size=32, shuffle=True), DataLoader(testset, batch_size=32)


def cifar10(data_dir):
    """50,000 and 10,000 images, if they lie in `data_dir`."""
    try:
        from torchvision import datasets, transforms
    except RuntimeError as error:
        raise ImportError(f"torchvision is installed and does not load ({error})") from error

    scaled = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])
    return (datasets.CIFAR10(data_dir, train=train, transform=scaled, download=False) for train in (True, False))


def digits():
    """1,437 and 360 images of digits; each of their 8 x 8 pixels becomes 4 x 4, in three equal colours."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 8 - 1, dtype=torch.float32).reshape(-1, 1, 8, 8)
    images = functional.interpolate(images, scale_factor=4).expand(-1, 3, -1, -1)
    cut = train_test_split(range(len(labels)), test_size=360, random_state=0, stratify=labels)
    return (TensorDataset(images[part], torch.tensor(labels)[part]) for part in cut)


def train(net, trainloader, epochs, device=DEVICE):
    """Train the network in place."""
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    for _ in range(epochs):
        for images, labels in trainloader:
            optimizer.zero_grad()
            criterion(net(images.to(device)), labels.to(device)).backward()
            optimizer.step()


def test(net, testloader, device=DEVICE):
    """The mean loss and the accuracy."""
    loss, correct = 0.0, 0
    with torch.no_grad():
        for images, labels in testloader:
            outputs = net(images.to(device))
            loss += functional.cross_entropy(outputs, labels.to(device), reduction="sum").item()
            correct += (outputs.argmax(dim=1) == labels.to(device)).sum().item()
    return loss / len(testloader.dataset), correct / len(testloader.dataset)


if __name__ == "__main__":
    torch.manual_seed(0)
    net = Net().to(DEVICE)
    trainloader, testloader = load_data()
    for epoch in range(1, 31):
        train(net, trainloader, epochs=1)
        loss, accuracy = test(net, testloader)
        print(f"epoch {epoch}: loss {loss:.4f}, accuracy {accuracy:.4f}")
