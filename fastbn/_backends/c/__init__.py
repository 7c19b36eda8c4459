"""The bridge to the C core. Its parts: express lane, plans, memory of others, and functions for jitted code."""
