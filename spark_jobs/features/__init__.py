"""What the features are, and how their windows are computed."""
