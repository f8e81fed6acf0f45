"""What human-monitor-command carries out: the few of QEMU's monitor commands that have no QMP counterpart."""
