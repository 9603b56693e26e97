"""The tests, one file a module. They are run beside other work, as the command line is."""

from train.openmp import spin_briefly

spin_briefly()  # before `tests.conftest` imports torch
