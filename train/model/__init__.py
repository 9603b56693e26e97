"""The decoder: as plain PyTorch, as one flat buffer of parameters, and as a `.cap` file."""
