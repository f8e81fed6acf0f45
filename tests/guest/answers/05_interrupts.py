"""sti; 1: hlt; inc byte [0xa000]; jmp 1b"""

CODE = bytes.fromhex("fb f4 fe0600a0 ebf9")
WRONG = {
    "with interrupts off": bytes.fromhex("fa f4 fe0600a0 ebf9"),
    "counts before it sleeps": bytes.fromhex("fb fe0600a0 f4 ebf9"),
}
