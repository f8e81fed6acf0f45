"""Every guest-physical address, port and IRQ of the machine, on one page.

::

    0x0000_0000  real-mode IVT and BIOS data area (zero; page 0 is writable: SIPI vector 0)
    0x0000_1000  boot GDT, IDT placeholder
    0x0000_7000  boot_params ("zero page") / Multiboot info / PVH start info
    0x0000_8000  their tables (memory map, module list, names)
    0x0001_0000  boot page tables (PML4, PDPT, PDs: 4 GiB identity-mapped with 2 MiB pages)
    0x0002_0000  kernel command line (up to 64 KiB)
    0x0003_0000  stack of entered images, growing down from 0x0003_8000
    0x0009_fc00  EBDA: MP floating pointer, MP configuration table   -- end of low RAM (639 KiB)
    0x000a_0000  hole (VGA)                                             not RAM
    0x000e_0000  ACPI: RSDP, XSDT, FADT, MADT, DSDT, FACS               RAM, reserved in e820
    0x0010_0000  high RAM: kernels, initrd at its end
    0xc000_0000  end of RAM below 4 GiB (the 3-4 GiB hole starts)
    0xd000_0000  virtio-mmio transports, 4 KiB each
    0xff00_0000  the test device's 64 KiB (--device testdev)
    0xfec0_0000  IOAPIC (in the kernel)        0xfee0_0000  local APICs (in the kernel)
    0xfeff_c000  identity-map page + 3 TSS pages KVM wants on VMX (3 pages from 0xfeff_d000)
    0x1_0000_0000  RAM above 4 GiB
"""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

BOOT_GDT = 0x1000
BOOT_IDT = 0x1800
BOOT_INFO = 0x7000
BOOT_TABLES = 0x8000
BOOT_TABLES_END = 0x10000
BOOT_PAGE_TABLES = 0x10000
BOOT_PAGE_TABLES_END = 0x20000
COMMAND_LINE = 0x20000
COMMAND_LINE_MAX = 0x10000
BOOT_STACK_TOP = 0x38000
EBDA = 0x9FC00
EBDA_END = 0xA0000
LOW_RAM_END = 0xA0000
ACPI_TABLES = 0xE0000
VMGENID = 0xFF000
"""A page of its own: the GUID in it changes while the guest runs."""
ACPI_TABLES_END = 0x100000
HIGH_RAM = 0x100000

HOLE_START = 0xC0000000
HOLE_END = 0x100000000
VIRTIO_MMIO = 0xD0000000
VIRTIO_MMIO_SIZE = 0x1000
IOAPIC = 0xFEC00000
LOCAL_APIC = 0xFEE00000
IDENTITY_MAP = 0xFEFFC000
TSS = 0xFEFFD000
TESTDEV_MEMORY = 0xFF000000

# Ports (first port, number of ports).
PORT_I8042 = (0x60, 5)  # 0x60 data, 0x64 status/command; 0x61 lies between and is KVM's PIT gate
PORT_RTC = (0x70, 2)
PORT_POST = (0x80, 1)
PORT_SYSTEM_CONTROL_A = (0x92, 1)
PORT_RESET_CONTROL = (0xCF9, 1)
PORT_DEBUG_CONSOLE = (0xE9, 1)
PORT_DEBUG_EXIT = (0xF4, 1)
PORT_SERIAL = (0x3F8, 8)
PORT_FW_CFG = (0x510, 2)
PORT_TASK = (0x580, 64)
PORT_ACPI_PM = (0x600, 8)  # PM1a event block (4), PM1a control (2)
PORT_SHUTDOWN = (0x8900, 1)
PORT_TESTDEV = (0xE0, 12)  # latch, page flush, latch by bytes; takes the debug console's port
PORT_TESTDEV_LINES = (0x2000, 24)

IRQ_SERIAL = 4
IRQ_RTC = 8
IRQ_ACPI_SCI = 9
IRQ_I8042_KEYBOARD = 1
IRQS_VIRTIO = (10, 11, 12, 13, 14, 15, 5, 6, 7, 3)
"""ISA pins that nothing else of this machine has, in the order of virtio slots."""
