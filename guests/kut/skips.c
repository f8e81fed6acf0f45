/* Nothing here can be tested, and that is a status of its own. */
#include "kut.h"

int test_main(void)
{
    report_skip("no such device");
    return report_summary();
}
