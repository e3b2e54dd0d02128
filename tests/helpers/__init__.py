"""What tests share: whole runs, forged checkpoints, hosts in namespaces, a Slurm cluster."""
