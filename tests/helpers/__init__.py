"""What tests share: whole runs, forged checkpoints, hosts in namespaces, a Slurm cluster."""

# After which a process that a test waits for is taken to hang. On the slowest machine none comes near it: a test that
# fails by this limit has found a hang, and not a slow machine.
HANGS_AFTER_S = 600
