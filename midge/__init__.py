"""Midge: federated learning over nothing but an MQTT broker.

This package is what the coordinator and the agents share: the wire, the transport and the tasks.
"""

__version__ = "0.1.0"

PROTOCOL = 1
"""The protocol that this version speaks. Both sides announce theirs; unequal ones refuse each other."""
