"""One piece of code that leaves 16, 32 or 64 in AL, by the mode it runs in. Chapter 2."""

# The same bytes are run in real mode, in 32-bit protected mode and in 64-bit mode, and end with hlt.
CODE = bytes.fromhex(
    "b0 10"  # mov al,16
    "f4"  # hlt
)
