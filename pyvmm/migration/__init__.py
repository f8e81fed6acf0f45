"""Moving a running machine: its state in sections, its memory in rounds."""
