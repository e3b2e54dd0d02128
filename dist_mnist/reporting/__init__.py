"""What people see of a run: console, TensorBoard, tables, pages."""
