"""The edge agent: trains the federation's model on the data of one device, which never leave it.

It is two processes. The supervisor holds the connection, the journal and the state machine, and stays small: nothing that
it imports at rest may import torch or numpy. The worker is started once there is something to train.
"""
