"""What makes tutorial.py a task of Midge: its functions as they are."""

from tutorial import Net, load_data, test, train

from midge.tasks.loops import LoopTask

task = LoopTask(net=Net, load_data=load_data, train=train, test=test, test_data=lambda: load_data()[1])
