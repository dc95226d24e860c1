"""Learners, their fits in Spark's tasks, and the portable scorer."""
