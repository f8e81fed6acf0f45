/* What an image is told: the Multiboot information and fw_cfg. All of it passes. */
#include "kut.h"

int test_main(void)
{
    report(boot_info->flags & 1, "boot: memory sizes");
    report(boot_info->flags & (1u << 6), "boot: memory map");
    report(boot_info->memory_lower > 500 && boot_info->memory_upper > 8192, "boot: enough of it");
    report(fw_cfg(FW_CFG_SIGNATURE, 4) == 0x554d4551, "fw_cfg: signature");
    report(fw_cfg(FW_CFG_CPUS, 2) == 1, "fw_cfg: one CPU");
    /* mem_upper leaves out the first MiB, and firmware keeps a little at the end. */
    uint64_t kib = fw_cfg(FW_CFG_RAM_SIZE, 8) / 1024;
    report(kib >= boot_info->memory_upper + 1024 && kib < boot_info->memory_upper + 2048, "fw_cfg: RAM size");
    report(fw_cfg(0x3f00, 4) == 0, "fw_cfg: an unknown item is empty");
    volatile uint32_t *first;
    __asm__("xor %0, %0" : "=r"(first)); /* hidden from the compiler, which takes address 0 for a mistake */
    *first = 0x12345678;
    report(*first == 0x12345678, "page 0 is writable");
    return report_summary();
}
