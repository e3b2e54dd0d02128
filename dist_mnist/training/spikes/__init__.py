"""Steps whose loss or gradient norm is beyond what is usual: said, and taken again."""
