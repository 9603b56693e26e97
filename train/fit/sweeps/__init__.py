"""Many runs: the table of them, and sweeps with their trials, their study and their processes."""
