/* A tiny library for test images in the format of kvm-unit-tests: what they print, how they end, what they are told.
 *
 * The format, not the code, is theirs: "PASS: name" lines, a SUMMARY, and an exit status that says whether all is
 * well, so that every runner of such images can run these. It builds for 32 and for 64 bits.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "cpu.h"

#define STATUS_SKIPPED 77 /* nothing could be tested */

static inline void outl(uint16_t port, uint32_t value)
{
    __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}

static inline uint32_t inl(uint16_t port)
{
    uint32_t value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline void outw(uint16_t port, uint16_t value)
{
    __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port));
}

static inline uint16_t inw(uint16_t port)
{
    uint16_t value;
    __asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

void say(const char *text);
void say_number(uint32_t value);

void report(bool pass, const char *name);
/* It is known not to work: failing is as expected, passing is news. */
void report_xfail(bool pass, const char *name);
void report_skip(const char *name);
/* The SUMMARY line; returns the status to end with. */
int report_summary(void);

/* End the machine with this status: debug-exit, or the shutdown port, or never. */
_Noreturn void test_exit(int status);

/* fw_cfg items (QEMU docs/specs/fw_cfg.rst). */
#define FW_CFG_SIGNATURE 0x00
#define FW_CFG_RAM_SIZE 0x03
#define FW_CFG_CPUS 0x05
uint64_t fw_cfg(uint16_t item, unsigned size);

/* The value of NAME in the environ module ("NAME=value" lines), copied to `value` of `size` bytes;
 * false if there is no such module or name. */
bool environ_get(const char *name, char *value, unsigned size);
bool text_equal(const char *one, const char *other);

/* Multiboot information, as the loader left it. */
struct boot_info {
    uint32_t flags, memory_lower, memory_upper, boot_device, command_line, module_count, modules;
    uint32_t symbols[4], memory_map_length, memory_map;
};
extern const struct boot_info *boot_info;

/* What each image brings. */
int test_main(void);
