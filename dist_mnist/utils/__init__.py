"""Helpers that do not depend on training: errors, files, schemas, clocks, hashes."""
