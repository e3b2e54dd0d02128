"""Tools around training: bench, doctor, drill, replay, suspects, sweep."""
