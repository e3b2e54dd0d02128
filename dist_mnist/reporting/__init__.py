"""Reports of a run: console, TensorBoard, trackers, tables, pages."""
