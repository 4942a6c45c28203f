"""The coordinator: invites agents, gathers their updates, averages them, and shows every round.

Its numerical core is five files, none of which knows of MQTT, of the database or of torch:

    spool       where the frames of updates wait, on disk
    models      models as files named by their digest
    strategies  how a mean of updates becomes the next model
    aggregate   from spool and base model to the next model, frame by frame
    gates       what an update must pass before it counts
"""
