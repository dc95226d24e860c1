"""Raw lines to cleaned rows."""
