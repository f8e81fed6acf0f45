/* The page tables that longmode.S built. */
#pragma once

/* Bits of a page-table entry: SDM vol. 3A, "4-Level Paging and 5-Level Paging". */
#define PAGE_PRESENT 0x001
#define PAGE_WRITABLE 0x002
#define PAGE_LARGE 0x080 /* in a page-directory entry: it maps 2 MiB itself */

#define ENTRIES 512
#define IDENTITY_MIB 16 /* how much of memory is mapped at its own address */

/* A second address for one 4 KiB page, far away from the first. Canonical: bits 63..47 equal. */
#define ALIAS_ADDRESS 0x00007abcdef01000
