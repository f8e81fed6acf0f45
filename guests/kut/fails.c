/* One of each verdict, among them a real failure: what a runner must not lose. */
#include "kut.h"

int test_main(void)
{
    report(true, "arithmetic: 2 + 2 = 4");
    report(false, "arithmetic: 2 + 2 = 5");
    report_xfail(false, "arithmetic: 1 / 3 is exact");
    report_skip("arithmetic: no FPU used");
    return report_summary();
}
