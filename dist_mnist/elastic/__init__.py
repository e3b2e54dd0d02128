"""Processes of a run: launch, rendezvous, preemption, watchdog."""
