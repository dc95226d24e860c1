"""Learners, distributed fits, and the portable scorer."""
