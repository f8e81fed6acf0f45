"""What the guest's architecture demands; only x86 so far."""
