"""The bench: fastbn, its peers and a plain copy, timed side by side on the same arrays."""
