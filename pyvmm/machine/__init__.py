"""A whole machine: configuration, wiring, vCPU threads, run state."""
