"""Photos through the encoder into a feature cache, and the check of one."""
