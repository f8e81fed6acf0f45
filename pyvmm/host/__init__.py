"""What this host and its KVM can and cannot do, found out by trying."""
