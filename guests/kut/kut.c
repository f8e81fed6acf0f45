#include "kut.h"

#include "serial.h"

#define DEBUG_EXIT_PORT 0xf4
#define SHUTDOWN_PORT 0x8900
#define FW_CFG_SELECT 0x510
#define FW_CFG_DATA 0x511
#define HAS_MODULES (1u << 3)

const struct boot_info *boot_info;

static uint32_t tests, failures, expected_failures, skipped;

static unsigned length_of(const char *text)
{
    unsigned length = 0;
    while (text[length])
        length++;
    return length;
}

void say(const char *text)
{
    serial_write(text, length_of(text));
}

void say_number(uint32_t value)
{
    char digits[10];
    unsigned at = sizeof digits;
    do {
        digits[--at] = (char)('0' + value % 10);
        value /= 10;
    } while (value);
    serial_write(digits + at, sizeof digits - at);
}

static void line(const char *verdict, const char *name)
{
    say(verdict);
    say(name);
    say("\n");
    tests++;
}

void report(bool pass, const char *name)
{
    failures += !pass;
    line(pass ? "PASS: " : "FAIL: ", name);
}

void report_xfail(bool pass, const char *name)
{
    failures += pass;
    expected_failures += !pass;
    line(pass ? "XPASS: " : "XFAIL: ", name);
}

void report_skip(const char *name)
{
    skipped++;
    line("SKIP: ", name);
}

static void count(uint32_t value, const char *what)
{
    if (value) {
        say(", ");
        say_number(value);
        say(what);
    }
}

int report_summary(void)
{
    say("SUMMARY: ");
    say_number(tests);
    say(" tests");
    count(failures, " unexpected failures");
    count(expected_failures, " expected failures");
    count(skipped, " skipped");
    say("\n");
    if (tests == skipped)
        return STATUS_SKIPPED;
    return failures > 0;
}

_Noreturn void test_exit(int status)
{
    outl(DEBUG_EXIT_PORT, (uint32_t)status);
    for (const char *letter = "Shutdown"; *letter; letter++)
        outb(SHUTDOWN_PORT, (uint8_t)*letter);
    for (;;)
        __asm__ volatile("cli; hlt");
}

uint64_t fw_cfg(uint16_t item, unsigned size)
{
    uint64_t value = 0;
    outw(FW_CFG_SELECT, item);
    for (unsigned i = 0; i < size; i++)
        value |= (uint64_t)inb(FW_CFG_DATA) << 8 * i;
    return value;
}

bool text_equal(const char *one, const char *other)
{
    while (*one && *one == *other)
        one++, other++;
    return *one == *other;
}

bool environ_get(const char *name, char *value, unsigned size)
{
    if (!(boot_info->flags & HAS_MODULES) || boot_info->module_count != 1)
        return false;
    const uint32_t *module = (const uint32_t *)(uintptr_t)boot_info->modules;
    const char *at = (const char *)(uintptr_t)module[0], *end = (const char *)(uintptr_t)module[1];
    while (at < end) {
        const char *wanted = name;
        while (at < end && *wanted && *at == *wanted)
            at++, wanted++;
        bool found = !*wanted && at < end && *at == '=';
        unsigned length = 0;
        for (at += found; at < end && *at != '\n'; at++)
            if (found && length + 1 < size)
                value[length++] = *at;
        at++; /* the line's end */
        if (found) {
            value[length] = 0;
            return true;
        }
    }
    return false;
}

void kut_main(uint32_t info)
{
    boot_info = (const struct boot_info *)(uintptr_t)info;
    serial_init();
    test_exit(test_main());
}
