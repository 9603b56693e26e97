"""The commands from a cache to models, and how they show training."""
