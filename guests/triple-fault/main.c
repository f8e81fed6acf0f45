/* triple-fault: how a CPU gives up.
 *
 * An exception whose delivery fails raises another; if delivering the double fault (#DF) fails as
 * well, the CPU shuts down (SDM vol. 3A, "Interrupt 8—Double Fault Exception (#DF)"). On a PC the
 * chipset turns that into a reset, which is why a broken kernel "just reboots". A VMM sees a
 * shutdown exit; pyvmm reports the registers and ends with status 126: the guest crashed.
 */
#include <stdint.h>

#include "print.h"
#include "serial.h"

struct __attribute__((packed)) idt_pointer {
    uint16_t limit;
    uint64_t base;
};

void guest_main(void)
{
    serial_init();
    print("No interrupt table, and now a page fault.\n");

    /* Limit 0: not even entry 0 is inside. */
    const struct idt_pointer nothing = {0, 0};
    __asm__ volatile("lidt %0" : : "m"(nothing));

    /* 1. The read: #PF, since only the low 4 GiB are mapped.
     * 2. Entry 14 is outside the IDT: #GP. #PF followed by #GP is a double fault.
     * 3. Entry 8 is outside the IDT as well: shutdown. */
    volatile uint64_t *unmapped = (volatile uint64_t *)(1ull << 40);
    (void)*unmapped;

    print("still here, so the fault did not come\n");
}
