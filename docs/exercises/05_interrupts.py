"""A guest that sleeps, and counts at 0xa000 how often it was woken. Chapter 5."""

# Real mode; DS is 0. `hlt` is an exit here, and the next step is as if an interrupt had come.
CODE = bytes.fromhex(
    "fa"  # cli
    "f4"  # hlt
)
