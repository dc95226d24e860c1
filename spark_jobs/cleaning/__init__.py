"""Cleaning of raw lines."""
