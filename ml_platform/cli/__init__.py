"""Command-line interface ``ml-platform``."""
