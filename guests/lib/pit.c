/* Intel 8254, channel 2. Source: Intel 8254 data sheet (modes), IBM PC/AT Technical Reference
 * (port 0x61: gate and output of channel 2). */
#include "pit.h"

#include "cpu.h"

#define PIT_HZ 1193182u
#define PIT_CHANNEL2 0x42
#define PIT_COMMAND 0x43
#define CHANNEL2_MODE0 0xb0 /* channel 2, low byte then high byte, mode 0: output rises at zero */

#define SYSTEM_PORT_B 0x61
#define GATE2 0x01
#define SPEAKER 0x02
#define OUT2 0x20

/* A poll takes from 0.2 us (an emulated PC) to 20 us (a slow exit); 50 ms must fit at the fast end
 * and giving up must not take long at the slow end. */
#define POLL_LIMIT 300000

void pit_start(unsigned milliseconds)
{
    unsigned count = PIT_HZ * milliseconds / 1000;
    /* Gate on (it enables counting), speaker off (channel 2 is wired to it). */
    outb(SYSTEM_PORT_B, (uint8_t)((inb(SYSTEM_PORT_B) & ~SPEAKER) | GATE2));
    outb(PIT_COMMAND, CHANNEL2_MODE0);
    outb(PIT_CHANNEL2, (uint8_t)count);
    outb(PIT_CHANNEL2, (uint8_t)(count >> 8)); /* counting starts with the second byte */
}

bool pit_wait(void)
{
    for (unsigned polls = 0; polls < POLL_LIMIT; polls++)
        if (inb(SYSTEM_PORT_B) & OUT2)
            return true;
    return false;
}
