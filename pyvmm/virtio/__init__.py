"""virtio 1.2 over MMIO: queues, the transport, and the devices behind it. Knows no KVM."""
