"""The sources that can be imported: what each holds, and its pictures in pieces of work."""
