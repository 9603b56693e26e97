"""The decoder: in plain PyTorch, its parameters in one flat buffer, and its `.cap` file."""
