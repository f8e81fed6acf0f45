/* Intel 8254, channel 2. Source: Intel 8254 data sheet (modes, read-back command), IBM PC/AT Technical
 * Reference (port 0x61: gate and output of channel 2).
 *
 * QEMU's microvm has an 8254 but no port 0x61: it reads all ones, as if every wait were over at once. Channel 0
 * is counted with there; its gate is always on, and the read-back command tells its output. */
#include "pit.h"

#include "cpu.h"

#define PIT_HZ 1193182u
#define PIT_CHANNEL0 0x40
#define PIT_CHANNEL2 0x42
#define PIT_COMMAND 0x43
#define CHANNEL0_MODE0 0x30 /* channel 0, low byte then high byte, mode 0: output rises at zero */
#define CHANNEL2_MODE0 0xb0
#define READ_BACK_STATUS0 0xe2 /* the next read of channel 0 is its status */
#define STATUS_OUT 0x80

#define SYSTEM_PORT_B 0x61
#define GATE2 0x01
#define SPEAKER 0x02
#define OUT2 0x20

/* A poll takes from 0.2 us (an emulated PC) to 20 us (a slow exit); 50 ms must fit at the fast end
 * and giving up must not take long at the slow end. */
#define POLL_LIMIT 300000

static bool has_port_b;

void pit_start(unsigned milliseconds)
{
    unsigned count = PIT_HZ * milliseconds / 1000;
    /* Gate on (it enables counting), speaker off (channel 2 is wired to it). */
    outb(SYSTEM_PORT_B, (uint8_t)((inb(SYSTEM_PORT_B) & ~SPEAKER) | GATE2));
    outb(PIT_COMMAND, CHANNEL2_MODE0);
    has_port_b = !(inb(SYSTEM_PORT_B) & OUT2); /* mode 0's output is low until it has counted */
    if (!has_port_b)
        outb(PIT_COMMAND, CHANNEL0_MODE0);
    uint16_t channel = has_port_b ? PIT_CHANNEL2 : PIT_CHANNEL0;
    outb(channel, (uint8_t)count);
    outb(channel, (uint8_t)(count >> 8)); /* counting starts with the second byte */
}

static bool output(void)
{
    if (has_port_b)
        return inb(SYSTEM_PORT_B) & OUT2;
    outb(PIT_COMMAND, READ_BACK_STATUS0);
    return inb(PIT_CHANNEL0) & STATUS_OUT;
}

bool pit_wait(void)
{
    for (unsigned polls = 0; polls < POLL_LIMIT; polls++)
        if (output())
            return true;
    return false;
}
