"""The two messages that start another CPU at an address. Chapter 8."""


def messages(address: int) -> list[int]:
    """What is written to the low half of the local APIC's command register (Intel SDM volume 3, 11.6.1), in order:
    INIT, asserted, then start-up. ``address`` is where the CPU is to begin. ValueError if it cannot be told to.
    """
    return []
