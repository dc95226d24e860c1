"""Tools for trials and tests; production code does not import them."""
