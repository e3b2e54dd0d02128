"""Starting, meeting, stopping and watching the processes of a run."""
