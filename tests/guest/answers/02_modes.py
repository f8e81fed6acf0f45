"""mov ax,16; jmp to the end, which 32- and 64-bit code takes for a number; inc eax or a prefix; 64, or 32."""

CODE = bytes.fromhex("b81000eb0c 31c0 4090 85c0 b040 7402 b020 f4")
WRONG = {"no difference between 32 and 64": bytes.fromhex("b81000eb02 b020 f4")}
