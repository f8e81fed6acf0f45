/* The interrupt descriptor table. Source: SDM vol. 3A, "Interrupt and Exception Handling". */
#include "idt.h"

#include "cpu.h"
#include "ending.h"
#include "print.h"
#include "segments.h"

/* SDM vol. 3A, "64-Bit Mode IDT": 16 bytes, the handler's address in three pieces. */
struct gate {
    uint16_t offset_low;
    uint16_t selector;
    uint8_t ist; /* 0: stay on the stack, or take RSP0 from the TSS when the CPL changes */
    uint8_t type;
    uint16_t offset_middle;
    uint32_t offset_high;
    uint32_t reserved;
};

struct __attribute__((packed)) idt_pointer {
    uint16_t limit;
    uint64_t base;
};

/* An interrupt gate clears IF on entry (a trap gate, 0xf, would not), so a handler need not be
 * prepared to be interrupted itself. */
#define TYPE_INTERRUPT_GATE 0x8e /* present, DPL 0, type 14 */
#define TYPE_DPL_USER 0x60

#define VECTORS 256
#define EXCEPTIONS 32
#define STUB_SIZE 16

extern const char vector_stubs[]; /* vectors.S: one stub of 16 bytes for each vector */

static struct gate idt[VECTORS];
static interrupt_handler *handlers[VECTORS];

static void set_gate(unsigned vector, bool from_user)
{
    uint64_t address = (uint64_t)vector_stubs + vector * STUB_SIZE;
    idt[vector] = (struct gate){
        .offset_low = (uint16_t)address,
        .selector = KERNEL_CODE,
        .type = TYPE_INTERRUPT_GATE | (from_user ? TYPE_DPL_USER : 0),
        .offset_middle = (uint16_t)(address >> 16),
        .offset_high = (uint32_t)(address >> 32),
    };
}

void idt_load(void)
{
    const struct idt_pointer pointer = {sizeof(idt) - 1, (uint64_t)idt};
    __asm__ volatile("lidt %0" : : "m"(pointer));
}

void idt_init(void)
{
    /* The other gates stay not present: an interrupt nobody asked for is then a #GP that names the
     * vector in its error code, not a jump to nowhere. */
    for (unsigned vector = 0; vector < EXCEPTIONS; vector++)
        set_gate(vector, false);
    idt_load();
}

void idt_set(unsigned vector, interrupt_handler *handler, bool from_user)
{
    handlers[vector] = handler;
    set_gate(vector, from_user);
}

/* Called by vectors.S. */
void interrupt_dispatch(struct interrupt_frame *frame)
{
    interrupt_handler *handler = handlers[frame->vector];
    if (handler) {
        handler(frame);
        return;
    }
    print("unexpected exception %lu, error code 0x%lx, at 0x%lx, CPL %lu, CR2 0x%lx\n",
          frame->vector, frame->error_code, frame->rip, frame->cs & 3, read_cr2());
    debug_exit(0x7f);
}
