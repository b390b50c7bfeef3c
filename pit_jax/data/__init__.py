"""Rows of text, and how they become arrays."""
