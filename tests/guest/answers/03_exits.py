"""cld; mov di,0xa000; mov dx,0x60; rep insb; hlt"""

CODE = bytes.fromhex("fc bf00a0 ba6000 f36c f4")
WRONG = {"backwards": bytes.fromhex("fd bf00a0 ba6000 f36c f4"), "elsewhere": bytes.fromhex("fc bf00b0 ba6000 f36c f4")}
