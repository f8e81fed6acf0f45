/* net-echo: a network card's driver, in the smallest form that is still of use.
 *
 *   ip=192.0.2.2   the address to answer at
 *
 * Answers ARP, ICMP echo ("ping") and UDP to port 7 (RFC 862), and ends when a datagram to that port
 * says "quit". A card has two rings: one of empty buffers that the device fills with what comes in,
 * one of full buffers that it is to send. Here each buffer goes round: received, turned into its own
 * answer in place, sent, offered for receiving again.
 *
 * This half sets the card up; user.c, in user mode, does all the rest.
 */
#include <stdint.h>

#include "apic.h"
#include "calls.h"
#include "ending.h"
#include "idt.h"
#include "multiboot.h"
#include "print.h"
#include "serial.h"
#include "user_mode.h"

#define F_MAC (1ull << 5)
#define LARGE_PAGE 0x200000ull
/* Plain memory above the user program, zeroed by the loader as all of it. */
#define RINGS 0x800000ull
#define RING_SIZE 0x2000ull
#define BUFFERS 0x810000ull

extern char user_start[], user_stack_top[];
extern void user_main(uint64_t card);

/* In the user's page: user.c reads it. */
__attribute__((section(".user_data"))) static struct card card;

static _Noreturn void refuse(const char *why)
{
    print("net-echo: %s\n", why);
    debug_exit(1);
}

static void on_call(struct interrupt_frame *frame)
{
    if (frame->rax != CALL_QUIT)
        refuse("no such call");
    print("net-echo: quit after %lu ARP, %lu ICMP, %lu UDP\n", frame->rdi, frame->rsi, frame->rdx);
    debug_exit(0x10);
}

/* "A.B.C.D", ended by a space or the end. */
static bool parse_ip(const char *text, uint8_t ip[4])
{
    for (unsigned part = 0; part < 4; part++) {
        unsigned value = 0, digits = 0;
        for (; *text >= '0' && *text <= '9' && digits < 4; text++, digits++)
            value = value * 10 + (unsigned)(*text - '0');
        if (!digits || value > 255 || (part < 3 && *text++ != '.'))
            return false;
        ip[part] = (uint8_t)value;
    }
    return !*text || *text == ' ';
}

static struct ring make_ring(uint64_t at)
{
    return (struct ring){
        .descriptors = (struct virtq_desc *)at,
        .available = (volatile struct virtq_avail *)(at + 0x800),
        .used = (volatile struct virtq_used *)(at + 0x1000),
    };
}

void guest_main(const struct multiboot_info *info)
{
    serial_init();
    idt_init();
    idt_set(USER_CALL_VECTOR, on_call, true);
    pic_mask_all();
    tss_load();

    const char *ip = multiboot_text(info, "ip");
    if (!parse_ip(ip ? ip : "192.0.2.2", card.ip))
        refuse("ip= takes four numbers up to 255, as in ip=192.0.2.2");
    card.registers = virtio_find(VIRTIO_ID_NET);
    if (!card.registers)
        refuse("no virtio-net device; give me one");
    uint64_t agreed;
    /* No offloads and no merged buffers: a frame is complete, and in one buffer. */
    if (!virtio_negotiate(card.registers, F_MAC, &agreed) || !(agreed & F_MAC))
        refuse("the device does not agree, or has no address");
    for (unsigned i = 0; i < 6; i++)
        card.mac[i] = *(volatile uint8_t *)(card.registers + VIRTIO_CONFIG + i);
    for (uint32_t i = 0; i < 2; i++) {
        card.rings[i] = make_ring(RINGS + i * RING_SIZE);
        struct ring *ring = &card.rings[i];
        if (!virtio_queue(card.registers, i, ENTRIES, ring->descriptors,
                          (struct virtq_avail *)ring->available, (struct virtq_used *)ring->used))
            refuse("the device lacks a queue");
    }
    card.buffers = (uint8_t *)BUFFERS;
    virtio_start(card.registers);

    allow_user((uint64_t)user_start, LARGE_PAGE);
    allow_user(RINGS, LARGE_PAGE);
    allow_user(card.registers, VIRTIO_CONFIG);
    print("net-echo: %u.%u.%u.%u at %02x:%02x:%02x:%02x:%02x:%02x\n", card.ip[0], card.ip[1], card.ip[2],
          card.ip[3], card.mac[0], card.mac[1], card.mac[2], card.mac[3], card.mac[4], card.mac[5]);
    enter_user_mode(user_main, (uint64_t)user_stack_top, (uint64_t)&card);
}
