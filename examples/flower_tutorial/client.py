"""The class that the tutorial has its user add: of the shape of Flower's `NumPyClient`, here without Flower."""

from collections import OrderedDict

import torch
from tutorial import DEVICE, Net, load_data, test, train


class FlowerClient:
    """Trains and tests the network of tutorial.py on all of its data."""

    def __init__(self):
        self.net = Net().to(DEVICE)
        self.trainloader, self.testloader = load_data()

    def get_parameters(self, config):
        return [value.cpu().numpy() for value in self.net.state_dict().values()]

    def set_parameters(self, parameters):
        pairs = zip(self.net.state_dict(), parameters, strict=True)
        self.net.load_state_dict(OrderedDict((name, torch.tensor(value)) for name, value in pairs), strict=True)

    def fit(self, parameters, config):
        self.set_parameters(parameters)
        train(self.net, self.trainloader, epochs=1)
        return self.get_parameters({}), len(self.trainloader.dataset), {}

    def evaluate(self, parameters, config):
        self.set_parameters(parameters)
        loss, accuracy = test(self.net, self.testloader)
        return loss, len(self.testloader.dataset), {"accuracy": accuracy}
