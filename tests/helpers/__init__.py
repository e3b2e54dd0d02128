"""Shared test helpers: whole runs, forged checkpoints, hosts in namespaces, a Slurm cluster."""

# After this many seconds, a process that a test waits for counts as hung. Even the slowest machine stays far below it,
# so a test that fails by this limit has found a hang, not a slow machine.
HANGS_AFTER_S = 600
