/* Setting a device up, by the book (3.1.1, 4.2.3). */
#include "virtio_mmio.h"

/* Where transports are, as nobody tells a guest without ACPI: pyvmm's slots, and QEMU's microvm's. */
static const struct {
    uint64_t first;
    uint32_t stride, count;
} places[] = {{0xd0000000, 0x1000, 16}, {0xfeb00000, 0x200, 24}};

/* 4.2.2, MMIO Device Register Layout */
#define MAGIC 0x00
#define VERSION 0x04
#define DEVICE_ID 0x08
#define DEVICE_FEATURES 0x10
#define DEVICE_FEATURES_SELECT 0x14
#define DRIVER_FEATURES 0x20
#define DRIVER_FEATURES_SELECT 0x24
#define QUEUE_SELECT 0x30
#define QUEUE_SIZE_MAX 0x34
#define QUEUE_SIZE 0x38
#define QUEUE_READY 0x44
#define STATUS 0x70
#define QUEUE_DESCRIPTORS 0x80
#define QUEUE_AVAILABLE 0x90
#define QUEUE_USED 0xa0

#define MAGIC_VALUE 0x74726976 /* "virt" */
#define VERSION_MODERN 2

/* 2.1, Device Status Field */
#define ACKNOWLEDGE 1
#define DRIVER 2
#define DRIVER_OK 4
#define FEATURES_OK 8

static volatile uint32_t *at(uint64_t registers, uint32_t offset)
{
    return (volatile uint32_t *)(registers + offset);
}

uint64_t virtio_find(uint32_t device_id)
{
    for (unsigned p = 0; p < sizeof(places) / sizeof(places[0]); p++)
        for (unsigned i = 0; i < places[p].count; i++) {
            uint64_t registers = places[p].first + i * places[p].stride;
            /* Where nothing is, reads give all ones, or all zeros. */
            if (*at(registers, MAGIC) != MAGIC_VALUE)
                break;
            if (*at(registers, VERSION) == VERSION_MODERN && *at(registers, DEVICE_ID) == device_id)
                return registers;
        }
    return 0;
}

static void add_status(uint64_t registers, uint32_t bit)
{
    *at(registers, STATUS) = *at(registers, STATUS) | bit;
}

bool virtio_negotiate(uint64_t registers, uint64_t wanted, uint64_t *agreed)
{
    *at(registers, STATUS) = 0;
    add_status(registers, ACKNOWLEDGE);
    add_status(registers, DRIVER);
    *agreed = 0;
    for (uint32_t half = 0; half < 2; half++) {
        *at(registers, DEVICE_FEATURES_SELECT) = half;
        *agreed |= (uint64_t)*at(registers, DEVICE_FEATURES) << 32 * half;
    }
    *agreed &= wanted | VIRTIO_F_VERSION_1;
    for (uint32_t half = 0; half < 2; half++) {
        *at(registers, DRIVER_FEATURES_SELECT) = half;
        *at(registers, DRIVER_FEATURES) = (uint32_t)(*agreed >> 32 * half);
    }
    add_status(registers, FEATURES_OK);
    return *agreed & VIRTIO_F_VERSION_1 && *at(registers, STATUS) & FEATURES_OK;
}

static void set_address(uint64_t registers, uint32_t offset, const volatile void *address)
{
    *at(registers, offset) = (uint32_t)(uint64_t)address;
    *at(registers, offset + 4) = (uint32_t)((uint64_t)address >> 32);
}

bool virtio_queue(uint64_t registers, uint32_t index, uint32_t size, struct virtq_desc *descriptors,
                  struct virtq_avail *available, struct virtq_used *used)
{
    *at(registers, QUEUE_SELECT) = index;
    if (*at(registers, QUEUE_SIZE_MAX) < size)
        return false;
    available->flags = VIRTQ_AVAIL_NO_INTERRUPT;
    *at(registers, QUEUE_SIZE) = size;
    set_address(registers, QUEUE_DESCRIPTORS, descriptors);
    set_address(registers, QUEUE_AVAILABLE, available);
    set_address(registers, QUEUE_USED, used);
    *at(registers, QUEUE_READY) = 1;
    return true;
}

void virtio_start(uint64_t registers)
{
    add_status(registers, DRIVER_OK);
}
