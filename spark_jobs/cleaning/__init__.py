"""From raw lines to cleaned rows."""
