"""For trying and for tests; nothing in production imports it."""
