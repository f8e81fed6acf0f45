"""``pyvmm colo demo``: two pyvmm protect one guest, clients talk to it, one dies, and what the clients noticed."""
