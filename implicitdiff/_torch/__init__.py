"""All that is private to torch: its transforms, modes, settings and trees."""
