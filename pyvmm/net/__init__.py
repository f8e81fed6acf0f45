"""Where a virtual network card's frames go: taps, stream sockets, and the filters between; no knowledge of KVM."""
