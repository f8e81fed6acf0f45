/* Multiboot 1: how the loader and the image find each other, and what the image is told.
 *
 * Source: Multiboot Specification 0.6.96, section 3.1 (header), 3.2 (machine state) and
 * 3.3 (boot information format).
 */
#pragma once

/* The image says: "I am a Multiboot image." */
#define MULTIBOOT_HEADER_MAGIC 0x1badb002
/* The loader says in EAX: "I am a Multiboot loader, EBX points to what I know." */
#define MULTIBOOT_LOADER_MAGIC 0x2badb002

#define MULTIBOOT_PAGE_ALIGN (1 << 0)  /* modules on page boundaries */
#define MULTIBOOT_MEMORY_INFO (1 << 1) /* tell me how much memory there is */

#define MULTIBOOT_HAS_MEMORY (1 << 0)
#define MULTIBOOT_HAS_COMMAND_LINE (1 << 2)

#ifndef __ASSEMBLER__
#include <stdbool.h>
#include <stdint.h>

struct multiboot_info {
    uint32_t flags; /* which of the fields below mean something */
    uint32_t memory_lower_kib;
    uint32_t memory_upper_kib; /* from 1 MiB up to the first hole */
    uint32_t boot_device;
    uint32_t command_line;
    uint32_t module_count;
    uint32_t modules;
    uint32_t symbols[4];
    uint32_t memory_map_length;
    uint32_t memory_map;
};

/* What follows "name=" on the command line (up to its end, with whatever words follow); null: no such option. */
const char *multiboot_text(const struct multiboot_info *info, const char *name);
/* The decimal number after "name=" on the command line, or `otherwise` if there is none.
 * Returns false (and leaves *value alone) if there is something but it is not a number. */
bool multiboot_option(const struct multiboot_info *info, const char *name, uint64_t otherwise,
                      uint64_t *value);
#endif
