"""The bench times fastbn, its peers and a plain copy, side by side on the same arrays."""
