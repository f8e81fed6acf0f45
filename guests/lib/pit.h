/* The programmable interval timer: the one clock of a PC whose frequency is known beforehand. */
#pragma once

#include <stdbool.h>

/* Start a countdown of 1 to 50 ms on channel 2, which raises no interrupt; where a PC's port 0x61 is missing, on
 * channel 0, which raises IRQ 0 at its end. */
void pit_start(unsigned milliseconds);
/* Wait for its end. False: it never came (the number of polls is bounded), there is no PIT. */
bool pit_wait(void);
