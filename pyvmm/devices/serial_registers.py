"""Registers of the 16550A (PC16550D data sheet, section 8, tables I and II; the names of bits are the data sheet's)."""

from __future__ import annotations

from pyvmm.registers import Bit, Register, RegisterTable

RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR = 3
MCR = 4
LSR = 5
MSR = 6
SCR = 7

IER_ERBFI = 0x01
IER_ETBEI = 0x02
IER_ELSI = 0x04
IER_EDSSI = 0x08

IIR_NONE = 0x01
IIR_LINE_STATUS = 0x06
IIR_RECEIVED = 0x04
IIR_TIMEOUT = 0x0C
IIR_THRE = 0x02
IIR_MODEM_STATUS = 0x00
IIR_FIFOS = 0xC0

FCR_ENABLE = 0x01
FCR_RESET_RX = 0x02
FCR_RESET_TX = 0x04
FCR_TRIGGER = 0xC0

LCR_WORD_LENGTH = 0x03
LCR_STOP_BITS = 0x04
LCR_PARITY = 0x38
LCR_BREAK = 0x40
LCR_DLAB = 0x80

MCR_DTR = 0x01
MCR_RTS = 0x02
MCR_OUT1 = 0x04
MCR_OUT2 = 0x08
MCR_LOOP = 0x10

LSR_DR = 0x01
LSR_OE = 0x02
LSR_THRE = 0x20
LSR_TEMT = 0x40

MSR_DCTS = 0x01
MSR_DDSR = 0x02
MSR_TERI = 0x04
MSR_DDCD = 0x08
MSR_CTS = 0x10
MSR_DSR = 0x20
MSR_RI = 0x40
MSR_DCD = 0x80

_IDENTITIES = {
    IIR_NONE: "no interrupt is pending",
    IIR_LINE_STATUS: "line status",
    IIR_RECEIVED: "received data",
    IIR_TIMEOUT: "received data has waited",
    IIR_THRE: "the transmitter is empty",
    IIR_MODEM_STATUS: "modem status",
}

TABLE = RegisterTable(
    "16550A UART",
    (
        Register(RBR, "RBR", "receiver buffer: the next byte that came", access="r"),
        Register(THR, "THR", "transmitter holding: the byte goes out", access="w"),
        Register(IER, "IER", "interrupt enable", bits=(
            Bit(IER_ERBFI, "ERBFI", "received data"),
            Bit(IER_ETBEI, "ETBEI", "the transmitter is empty"),
            Bit(IER_ELSI, "ELSI", "line status"),
            Bit(IER_EDSSI, "EDSSI", "modem status"),
        )),
        Register(IIR, "IIR", "interrupt identification", access="r",
                 values=_IDENTITIES | {IIR_FIFOS | value: f"{text}; FIFOs on" for value, text in _IDENTITIES.items()}),
        Register(FCR, "FCR", "FIFO control", access="w", bits=(
            Bit(FCR_ENABLE, "ENABLE"), Bit(FCR_RESET_RX, "RESET_RX"), Bit(FCR_RESET_TX, "RESET_TX"),
            Bit(FCR_TRIGGER, "TRIGGER", "receive trigger: 1, 4, 8 or 14 bytes"),
        )),
        Register(LCR, "LCR", "line control", bits=(
            Bit(LCR_WORD_LENGTH, "WLS", "word length, less 5"), Bit(LCR_STOP_BITS, "STB"), Bit(LCR_PARITY, "PARITY"),
            Bit(LCR_BREAK, "BREAK"), Bit(LCR_DLAB, "DLAB", "offsets 0 and 1 are the divisor"),
        )),
        Register(MCR, "MCR", "modem control", bits=(
            Bit(MCR_DTR, "DTR"), Bit(MCR_RTS, "RTS"), Bit(MCR_OUT1, "OUT1"),
            Bit(MCR_OUT2, "OUT2", "interrupts reach the line"), Bit(MCR_LOOP, "LOOP", "what is sent is received"),
        )),
        Register(LSR, "LSR", "line status", bits=(
            Bit(LSR_DR, "DR", "received data is there"), Bit(LSR_OE, "OE", "a received byte was lost"),
            Bit(LSR_THRE, "THRE", "the transmitter takes a byte"), Bit(LSR_TEMT, "TEMT", "all is sent"),
        )),
        Register(MSR, "MSR", "modem status", bits=(
            Bit(MSR_DCTS, "DCTS"), Bit(MSR_DDSR, "DDSR"), Bit(MSR_TERI, "TERI"), Bit(MSR_DDCD, "DDCD"),
            Bit(MSR_CTS, "CTS"), Bit(MSR_DSR, "DSR"), Bit(MSR_RI, "RI"), Bit(MSR_DCD, "DCD"),
        )),
        Register(SCR, "SCR", "scratch: kept, and that is all"),
    ),
)  # fmt: skip
DIVISOR_LOW = Register(DLL, "DLL", "divisor latch, low byte")
DIVISOR_HIGH = Register(DLM, "DLM", "divisor latch, high byte")
