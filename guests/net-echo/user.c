/* net-echo, the part that drives the card. It runs in user mode.
 *
 * On a host that emulates CPL 0 one instruction at a time, 64-bit CPL 3 runs at the speed of the CPU,
 * and all that a driver needs there are its rings and one register. Nothing is copied: buffer n of the
 * receive ring becomes buffer n of the transmit ring.
 *
 * Nor is any checksum computed. Those of IP and UDP are sums (RFC 1071), which do not change when source
 * and destination change places; ICMP's changes by the one word that does. So a packet that came in
 * damaged goes out damaged, and who sent it will notice.
 */
#include <stdbool.h>

#include "calls.h"
#include "user_mode.h"

#define HEADER 12u /* struct virtio_net_hdr (5.1.6), in front of each frame; all zeros is "as it is" */
#define ETHERNET 14u
#define TYPE_IPV4 0x0800
#define TYPE_ARP 0x0806
#define PROTOCOL_ICMP 1
#define PROTOCOL_UDP 17
#define ECHO_PORT 7
#define SPIN_LIMIT 100000000u

static uint64_t arps, icmps, udps;

static uint16_t get16(const uint8_t *at)
{
    return (uint16_t)(at[0] << 8 | at[1]);
}

static void put16(uint8_t *at, uint16_t value)
{
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

static uint32_t load32(const uint8_t *at)
{
    uint32_t value;
    __builtin_memcpy(&value, at, 4);
    return value;
}

static void store32(uint8_t *at, uint32_t value)
{
    __builtin_memcpy(at, &value, 4);
}

static void copy6(uint8_t *to, const uint8_t *from)
{
    __builtin_memcpy(to, from, 6); /* a fixed size: two moves, no call */
}

static void call(uint64_t number, uint64_t a, uint64_t b, uint64_t c)
{
    __asm__ volatile("int %1" : "+a"(number) : "i"(USER_CALL_VECTOR), "D"(a), "S"(b), "d"(c)
                     : "memory");
}

/* RFC 826: who has our address? Length of the answer, or 0. */
static uint32_t answer_arp(const struct card *card, uint8_t *arp, uint32_t length)
{
    /* Ethernet, IPv4, sizes 6 and 4, request. */
    if (length < 28 || load32(arp) != 0x00080100 || load32(arp + 4) != 0x01000406 ||
        load32(arp + 24) != load32(card->ip))
        return 0;
    arp[7] = 2; /* reply */
    copy6(arp + 18, arp + 8);
    store32(arp + 24, load32(arp + 14));
    copy6(arp + 8, card->mac);
    store32(arp + 14, load32(card->ip));
    arps++;
    return 28;
}

/* RFC 791. *quit: the datagram said so. Length of the answer, or 0. */
static uint32_t answer_ip(const struct card *card, uint8_t *ip, uint32_t length, bool *quit)
{
    if (length < 20 || ip[0] >> 4 != 4)
        return 0;
    uint32_t head = (ip[0] & 15u) * 4, total = get16(ip + 2);
    bool fragment = get16(ip + 6) & 0x3fff; /* more to come, or not the first */
    if (head < 20 || total < head + 8 || total > length || fragment ||
        load32(ip + 16) != load32(card->ip))
        return 0;
    uint8_t *body = ip + head;
    if (ip[9] == PROTOCOL_ICMP && body[0] == 8 && body[1] == 0) {
        body[0] = 0; /* RFC 792: echo reply */
        uint32_t sum = get16(body + 2) + 0x0800u; /* RFC 1624, equation 3: the word 0x0800 became 0 */
        put16(body + 2, (uint16_t)(sum + (sum >> 16)));
        icmps++;
    } else if (ip[9] == PROTOCOL_UDP && get16(body + 2) == ECHO_PORT) {
        put16(body + 2, get16(body));
        put16(body, ECHO_PORT);
        *quit = get16(body + 4) == 12 && total >= head + 12 && load32(body + 8) == 0x74697571; /* "quit" */
        udps++;
    } else {
        return 0;
    }
    store32(ip + 16, load32(ip + 12));
    store32(ip + 12, load32(card->ip));
    return total;
}

/* Turn the frame into its answer; the answer's length, or 0. */
static uint32_t answer(const struct card *card, uint8_t *frame, uint32_t length, bool *quit)
{
    uint32_t size;
    if (length < ETHERNET)
        return 0;
    uint16_t type = get16(frame + 12);
    if (type == TYPE_IPV4)
        size = answer_ip(card, frame + ETHERNET, length - ETHERNET, quit);
    else if (type == TYPE_ARP)
        size = answer_arp(card, frame + ETHERNET, length - ETHERNET);
    else
        return 0;
    if (!size)
        return 0;
    copy6(frame, frame + 6);
    copy6(frame + 6, card->mac);
    return ETHERNET + size;
}

/* Offer descriptor `id`, and ring if the device wants to hear of it (2.7.13, 2.7.10). */
static void offer(const struct card *card, unsigned queue, uint16_t id)
{
    const struct ring *ring = &card->rings[queue];
    uint16_t index = ring->available->index;
    ring->available->ring[index % ENTRIES] = id;
    __atomic_store_n(&ring->available->index, (uint16_t)(index + 1), __ATOMIC_RELEASE);
    /* Without a full barrier the CPU may look at the flags before the device can see the index. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (!(ring->used->flags & VIRTQ_USED_NO_NOTIFY))
        *(volatile uint32_t *)(card->registers + VIRTIO_QUEUE_NOTIFY) = queue;
}

/* Whether the device has used an entry beyond *seen; if so, which and how much it wrote. */
static bool take_used(const struct ring *ring, uint16_t *seen, uint16_t *id, uint32_t *length)
{
    if (__atomic_load_n(&ring->used->index, __ATOMIC_ACQUIRE) == *seen)
        return false;
    *id = (uint16_t)(ring->used->ring[*seen % ENTRIES].id % ENTRIES);
    *length = ring->used->ring[*seen % ENTRIES].length;
    ++*seen;
    return true;
}

void user_main(uint64_t argument)
{
    const struct card *card = (const struct card *)argument;
    const struct ring *receive = &card->rings[RECEIVE], *transmit = &card->rings[TRANSMIT];
    uint16_t received = 0, sent = 0, id;
    uint32_t length;

    for (uint16_t i = 0; i < ENTRIES; i++) {
        uint64_t buffer = (uint64_t)card->buffers + i * BUFFER_SIZE;
        receive->descriptors[i] = (struct virtq_desc){buffer, BUFFER_SIZE, VIRTQ_DESC_WRITE, 0};
        transmit->descriptors[i] = (struct virtq_desc){buffer, 0, 0, 0};
        offer(card, RECEIVE, i);
    }
    for (;;) {
        if (!take_used(receive, &received, &id, &length)) {
            /* Nothing to answer: a moment for the buffers that were sent. */
            if (take_used(transmit, &sent, &id, &length))
                offer(card, RECEIVE, id);
            else
                __builtin_ia32_pause();
            continue;
        }
        uint8_t *buffer = card->buffers + id * BUFFER_SIZE;
        bool quit = false;
        uint32_t size = length > HEADER && length <= BUFFER_SIZE
                            ? answer(card, buffer + HEADER, length - HEADER, &quit)
                            : 0;
        if (!size) {
            offer(card, RECEIVE, id);
            continue;
        }
        for (unsigned i = 0; i < HEADER; i += 4)
            store32(buffer + i, 0);
        transmit->descriptors[id].length = HEADER + size;
        offer(card, TRANSMIT, id);
        if (quit)
            break;
    }
    /* The last answer shall get out. */
    for (unsigned spins = 0; sent != transmit->available->index && spins < SPIN_LIMIT; spins++)
        if (!take_used(transmit, &sent, &id, &length))
            __builtin_ia32_pause();
    call(CALL_QUIT, arps, icmps, udps);
}
