"""What a step of training takes, and why."""
