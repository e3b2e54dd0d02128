"""Pictures, tables and archives become folders of idx files, and back."""
