"""Many runs of one search: its trials, its study and its processes."""
