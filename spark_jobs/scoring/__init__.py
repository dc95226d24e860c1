"""Scoring of files with the champion, and the comparison of what it meets with what it was trained on."""
