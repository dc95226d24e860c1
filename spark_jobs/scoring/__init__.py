"""Scores of new rows: ranks, alerts with reasons, grades, drift."""
