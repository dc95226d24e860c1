"""Feature definitions and the computation of their windows."""
