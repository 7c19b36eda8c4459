"""The bridge to the C core, with an express lane, plans, calls by address, and functions for jitted code."""
