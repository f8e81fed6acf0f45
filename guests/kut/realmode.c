/* Ends in real mode, where such images write 8 bits to debug-exit (kvm-unit-tests' realmode test does). */
#include "kut.h"

#define LOW_PAGE 0x60000

extern const char real_mode[], real_mode_end[];
_Noreturn void to_real_mode(void);

int test_main(void)
{
    report(true, "before real mode");
    report_summary();
    volatile char *to = (volatile char *)LOW_PAGE;
    for (const char *from = real_mode; from < real_mode_end; from++)
        *to++ = *from;
    to_real_mode();
}
