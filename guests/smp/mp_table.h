/* The MP configuration table: how software learned about other CPUs before ACPI. */
#pragma once

#include <stdint.h>

#define MAX_CPUS 64

struct cpu_list {
    unsigned count;              /* enabled CPUs, at most MAX_CPUS */
    uint8_t apic_ids[MAX_CPUS];
    uint8_t boot_apic_id;        /* the one the table marks as the boot CPU */
};

/* The reason there is none, or a null pointer: `list` is filled in. */
const char *mp_table_read(struct cpu_list *list);
