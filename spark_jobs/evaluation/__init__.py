"""Figures of scores with known labels, shared by the jobs and the promotion gate."""
