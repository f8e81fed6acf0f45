"""QMP, QEMU's machine protocol: the server of a machine's monitors, its commands and events, and a client.

What a start pays for is ``monitor.py``, ``endpoints.py`` and ``control.py``; everything else is imported when the
first client connects.
"""
