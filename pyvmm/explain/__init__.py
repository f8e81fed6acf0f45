"""What a guest does, told: each exit, its instruction, the register it touched; modes, interrupts, page tables."""
