/* A 16550A UART at port 0x3f8, without interrupts.
 *
 * Source: National Semiconductor PC16550D data sheet, section 8 (registers).
 */
#include "serial.h"

#include "cpu.h"

#define SERIAL 0x3f8
#define DATA (SERIAL + 0)             /* transmit holding register; divisor low if DLAB */
#define INTERRUPT_ENABLE (SERIAL + 1) /* divisor high if DLAB */
#define FIFO_CONTROL (SERIAL + 2)
#define LINE_CONTROL (SERIAL + 3)
#define MODEM_CONTROL (SERIAL + 4)
#define LINE_STATUS (SERIAL + 5)

#define LINE_8N1 0x03
#define LINE_DLAB 0x80
#define FIFO_ENABLE_AND_CLEAR 0x07
#define STATUS_TRANSMITTER_EMPTY 0x20

#define FIFO_SIZE 16
#define POLL_LIMIT 100000

void serial_init(void)
{
    outb(INTERRUPT_ENABLE, 0);     /* polled: no interrupt, no handler needed */
    outb(LINE_CONTROL, LINE_DLAB); /* the first two ports are the divisor now */
    outb(DATA, 1);                 /* 115200 baud / 1; a virtual port ignores it, a real one not */
    outb(INTERRUPT_ENABLE, 0);
    outb(LINE_CONTROL, LINE_8N1);  /* and the data register is back */
    outb(FIFO_CONTROL, FIFO_ENABLE_AND_CLEAR);
    outb(MODEM_CONTROL, 0x03);     /* DTR and RTS: "I am here, you may send" */
}

void serial_write(const char *text, unsigned length)
{
    while (length) {
        /* With the FIFO on, "transmitter empty" means that all 16 places are free: ask once, write
         * 16 bytes. In a VM every port access is an exit, so this nearly halves the exits. */
        unsigned polls = 0;
        while (!(inb(LINE_STATUS) & STATUS_TRANSMITTER_EMPTY))
            if (++polls == POLL_LIMIT)
                return; /* no such port, or a stuck one: losing text beats hanging */
        unsigned chunk = length < FIFO_SIZE ? length : FIFO_SIZE;
        for (unsigned i = 0; i < chunk; i++)
            outb(DATA, (uint8_t)*text++);
        length -= chunk;
    }
}
