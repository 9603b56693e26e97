"""A sweep: the trials, the study that remembers them, and the processes that train them."""
