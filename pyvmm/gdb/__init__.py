"""GDB's remote protocol: a debugger that sees the guest's vCPUs as threads. See server.py for the whole picture."""
