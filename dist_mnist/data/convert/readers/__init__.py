"""Readers of the sources that can be imported, each of which yields its pictures in work items."""
