/* What Python sees of virtio_interrupt.h; the comments are there. */

#define PV_INTERRUPT_USED_BUFFER ...
#define PV_INTERRUPT_CONFIGURATION ...

struct pv_interrupt { int fd; ...; };

void pv_interrupt_raise(struct pv_interrupt *interrupt, uint32_t bits);
void pv_interrupt_acknowledge(struct pv_interrupt *interrupt, uint32_t bits);
void pv_interrupt_set(struct pv_interrupt *interrupt, uint32_t status);
uint32_t pv_interrupt_status(struct pv_interrupt *interrupt);
