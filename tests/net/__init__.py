"""Real taps and bridges, in network namespaces that the test made. They need root."""
