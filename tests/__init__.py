"""The tests, one file a module. They are run beside other work, as the command line is."""

from train.torch_import import spin_briefly

spin_briefly()  # before `tests.conftest` imports torch
