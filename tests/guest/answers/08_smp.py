"""INIT is 5 in bits 10:8 and asserted (bit 14), start-up 6 and the page."""


def messages(address: int) -> list[int]:
    if address & 0xFFF or address >> 20:
        raise ValueError(f"{address:#x} is no page below 1 MiB")
    return [0x4500, 0x4600 | address >> 12]


WRONG = {"the address, not its page": lambda address: [0x4500, 0x4600 | address & 0xFF]}
