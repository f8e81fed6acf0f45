"""A guest that reads a text from port 0x60 in one exit, not in one for each byte. Chapter 3."""

# Real mode. The text is to be at 0xa000; how long it is stands in CX, and ES is 0.
CODE = bytes.fromhex(
    "bf 00 a0"  # mov di,0xa000
    "ba 60 00"  # mov dx,0x60
    "6c"  # 1: insb
    "e2 fd"  # loop 1b
    "f4"  # hlt
)
