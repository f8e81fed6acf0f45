/* Find and read the MP table.
 *
 * Source: Intel MultiProcessor Specification 1.4, chapter 4 ("MP Configuration Table").
 * The table comes from outside this program, so lengths and checksums are checked before use.
 */
#include "mp_table.h"

#include <stdbool.h>

/* Section 4.1. */
struct floating_pointer {
    uint32_t signature; /* "_MP_" */
    uint32_t table;
    uint8_t length; /* in units of 16 bytes */
    uint8_t revision;
    uint8_t checksum;
    uint8_t features[5];
};

/* Section 4.2. */
struct table_header {
    uint32_t signature; /* "PCMP" */
    uint16_t length;    /* header and entries */
    uint8_t revision;
    uint8_t checksum;
    char oem[8];
    char product[12];
    uint32_t oem_table;
    uint16_t oem_length;
    uint16_t entry_count;
    uint32_t local_apic;
    uint16_t extended_length;
    uint8_t extended_checksum;
    uint8_t reserved;
};

/* Section 4.3.1. All other entry types have 8 bytes. */
struct processor_entry {
    uint8_t type;
    uint8_t apic_id;
    uint8_t apic_version;
    uint8_t flags;
    uint32_t signature;
    uint32_t features;
    uint32_t reserved[2];
};

#define SIGNATURE_FLOATING 0x5f504d5f /* "_MP_" */
#define SIGNATURE_TABLE 0x504d4350    /* "PCMP" */
#define ENTRY_PROCESSOR 0
#define ENTRY_LAST_BASE_TYPE 4
#define CPU_ENABLED 0x01
#define CPU_IS_BOOT 0x02

static bool sums_to_zero(const void *start, unsigned length)
{
    const uint8_t *bytes = start;
    uint8_t sum = 0;
    for (unsigned i = 0; i < length; i++)
        sum += bytes[i];
    return sum == 0;
}

static const struct floating_pointer *search(uint32_t start, uint32_t length)
{
    /* It lies on a 16-byte boundary, so one comparison per 16 bytes is enough. */
    for (uint32_t at = start; at < start + length; at += 16) {
        const struct floating_pointer *found = (const struct floating_pointer *)(uint64_t)at;
        if (found->signature == SIGNATURE_FLOATING && sums_to_zero(found, sizeof(*found)))
            return found;
    }
    return 0;
}

/* The order of section 4: the extended BIOS data area, the end of base memory, the BIOS ROM. */
static const struct floating_pointer *find(void)
{
    const struct floating_pointer *found = 0;
    /* The BIOS data area keeps the EBDA's segment at 40:0e. Without a BIOS it may be 0. In assembly,
     * because to a C compiler an address that near to 0 is a null pointer. */
    uint16_t segment;
    __asm__ volatile("movw 0x40e, %0" : "=r"(segment));
    uint32_t ebda = segment * 16u;
    if (ebda >= 0x80000 && ebda < 0xa0000)
        found = search(ebda, 1024);
    if (!found)
        found = search(0x9fc00, 1024); /* the last KiB of 640 */
    if (!found)
        found = search(0xf0000, 0x10000);
    return found;
}

const char *mp_table_read(struct cpu_list *list)
{
    const struct floating_pointer *floating = find();
    if (!floating)
        return "no MP floating pointer";
    const struct table_header *table = (const struct table_header *)(uint64_t)floating->table;
    /* Without a table the pointer's first feature byte names a default configuration, always with two
     * CPUs (section 5). No machine of this century does that. */
    if (!table)
        return "a default configuration, no MP table";
    if (table->signature != SIGNATURE_TABLE || table->length < sizeof(*table) ||
        !sums_to_zero(table, table->length))
        return "a damaged MP table";

    list->count = 0;
    const uint8_t *entry = (const uint8_t *)(table + 1);
    const uint8_t *end = (const uint8_t *)table + table->length;
    for (unsigned i = 0; i < table->entry_count && entry < end && *entry <= ENTRY_LAST_BASE_TYPE;
         i++) {
        if (*entry != ENTRY_PROCESSOR) {
            entry += 8;
            continue;
        }
        const struct processor_entry *cpu = (const struct processor_entry *)entry;
        entry += sizeof(*cpu);
        if (entry > end || list->count == MAX_CPUS)
            break;
        if (!(cpu->flags & CPU_ENABLED))
            continue;
        if (cpu->flags & CPU_IS_BOOT)
            list->boot_apic_id = cpu->apic_id;
        list->apic_ids[list->count++] = cpu->apic_id;
    }
    return list->count ? 0 : "an MP table without CPUs";
}
