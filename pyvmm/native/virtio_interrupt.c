/* See virtio_interrupt.h. */

#include "virtio_interrupt.h"

#include <unistd.h>

static void pulse(const struct pv_interrupt *interrupt)
{
	uint64_t one = 1;

	/* Cannot fail but for a counter at its maximum, which is a pulse that nobody has taken yet. */
	ssize_t written = write(interrupt->fd, &one, sizeof(one));
	(void)written;
}

/*
 * Every notification is a pulse, also one that finds its bit set: a driver acknowledges what it read and then looks
 * at its queues, and a bit that rises between the two needs its own edge.
 */
void pv_interrupt_raise(struct pv_interrupt *interrupt, uint32_t bits)
{
	atomic_fetch_or(&interrupt->status, bits);
	pulse(interrupt);
}

/* What was not acknowledged is pending still, and an edge is all the driver would hear of it. */
void pv_interrupt_acknowledge(struct pv_interrupt *interrupt, uint32_t bits)
{
	if (atomic_fetch_and(&interrupt->status, ~bits) & ~bits)
		pulse(interrupt);
}

/* After a reset or a load: whoever had the line before knows nothing of these bits. */
void pv_interrupt_set(struct pv_interrupt *interrupt, uint32_t status)
{
	atomic_store(&interrupt->status, status);
	if (status)
		pulse(interrupt);
}

uint32_t pv_interrupt_status(struct pv_interrupt *interrupt)
{
	return atomic_load(&interrupt->status);
}
