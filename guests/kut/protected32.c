/* The same library in 32-bit mode. */
#include "kut.h"

int test_main(void)
{
    report(sizeof(void *) == 4, "pointers have 32 bits");
    uint32_t cr0;
    __asm__ volatile("mov %%cr0, %0" : "=r"(cr0));
    report((cr0 & 1) && !(cr0 >> 31), "protection on, paging off");
    return report_summary();
}
