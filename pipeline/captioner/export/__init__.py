"""A trained model as a file that other programs run without this one."""
