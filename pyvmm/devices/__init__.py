"""Device models. They know offsets, an interrupt line and a backend; never KVM."""
