"""pyvmm: a small virtual machine monitor on /dev/kvm, in Python over one small native core."""

__version__ = "0.1.0"
