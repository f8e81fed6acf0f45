"""The KVM API and nothing else: System -> Vm -> Vcpu, each owning its file descriptor."""
