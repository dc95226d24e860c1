"""Spark engines, sessions, and the code archives shipped with jobs."""
