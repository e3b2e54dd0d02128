"""Commands around training: bench, doctor, drill, sweep."""
