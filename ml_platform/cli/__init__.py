"""The command ``ml-platform``."""
