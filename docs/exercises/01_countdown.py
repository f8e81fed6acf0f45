"""A guest that counts down from 9 to 0 on port 0xe9, and halts. Chapter 1."""

# 16-bit code; it is loaded at 0x8000. `objdump -D -b binary -m i8086 FILE` shows what bytes mean, `as` makes them.
CODE = bytes.fromhex(
    "b0 39"  # mov al,'9'
    "e6 e9"  # out 0xe9,al
    "f4"  # hlt
)
