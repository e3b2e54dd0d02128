"""Conversion of pictures, tables and archives to folders of idx files, and back."""
