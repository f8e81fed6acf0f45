"""mov al,'9'; 1: out 0xe9,al; dec al; cmp al,'0'; jae 1b; hlt"""

CODE = bytes.fromhex("b039 e6e9 fec8 3c30 73f8 f4")
WRONG = {
    "the zero is missing": bytes.fromhex("b039 e6e9 fec8 3c30 77f8 f4"),
    "without an end": bytes.fromhex("b039 e6e9 fec8 3c30 73f8 ebfe"),
}
