"""Where the platform's data are, and what must hold of them."""
