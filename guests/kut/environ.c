/* The environ module (--initrd): exactly one, NAME=value lines. */
#include "kut.h"

int test_main(void)
{
    char value[32];
    report(boot_info->module_count == 1, "one module");
    report(environ_get("FIRST", value, sizeof value) && text_equal(value, "1"), "FIRST=1");
    report(environ_get("GREETING", value, sizeof value) && text_equal(value, "hello world"), "GREETING");
    report(environ_get("EMPTY", value, sizeof value) && text_equal(value, ""), "EMPTY=");
    report(!environ_get("GREET", value, sizeof value), "part of a name is no name");
    report(environ_get("LAST", value, sizeof value) && text_equal(value, "a=b"), "LAST, without a newline");
    return report_summary();
}
