/*
 * The interrupt of a virtio-mmio transport (virtio 1.2, 4.2.2, InterruptStatus and InterruptACK): bits that stay until
 * acknowledged, and an event descriptor behind which is an edge-triggered line.
 *
 * Here and not in Python because queues are served by threads that run without the interpreter; all of it is
 * thread-safe without a lock.
 */
#ifndef PYVMM_VIRTIO_INTERRUPT_H
#define PYVMM_VIRTIO_INTERRUPT_H

#include <stdatomic.h>
#include <stdint.h>

#define PV_INTERRUPT_USED_BUFFER 1u
#define PV_INTERRUPT_CONFIGURATION 2u

struct pv_interrupt {
	_Atomic uint32_t status;
	int fd; /* eventfd; what is written to it becomes a pulse */
};

void pv_interrupt_raise(struct pv_interrupt *interrupt, uint32_t bits);
void pv_interrupt_acknowledge(struct pv_interrupt *interrupt, uint32_t bits);
void pv_interrupt_set(struct pv_interrupt *interrupt, uint32_t status);
uint32_t pv_interrupt_status(struct pv_interrupt *interrupt);

#endif
