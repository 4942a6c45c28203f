"""What makes the class in client.py a task of Midge."""

from client import FlowerClient

from midge.tasks.numpy_client import numpy_client_task

task = numpy_client_task(FlowerClient)
