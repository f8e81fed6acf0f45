"""Guest memory and what was written to it."""
