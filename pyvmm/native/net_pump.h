/*
 * The data path of a network device (virtio 1.2, 5.1.6): frames between a pair of virtqueues and a backend, on one
 * thread that runs without the interpreter.
 *
 *   driver's transmit queue --> header checked --> backend (tap, stream socket) --> driver's receive queue
 *
 * Every frame is led by the 12 bytes of struct virtio_net_hdr (5.1.6). A tap takes and gives just these, so bytes go
 * straight between guest memory and the tap. A stream socket carries a big-endian u32 length and the bare frame.
 *
 * Nothing is buffered without bound: frames that the driver has no buffers for stay in the backend, frames that the
 * backend cannot take stay in the driver's queue. One frame at most is on its way in each direction.
 *
 * Threads. pv_net_run() is the device's thread; it holds `lock` while it touches queues, for a bounded batch. The others
 * may be called by any thread. Between pv_net_allow(0) and pv_net_allow(1) no queue is touched and no chain is out.
 *
 * Frames that somebody wants to look at (filtered) are moved one at a time by pv_net_pull_*() and pv_net_push_*(),
 * called from the device's thread between two pv_net_run(). A native filter would sit in the same two places, send_chain()
 * and receive_frame(): it sees the frame as segments, header first, and says pass, drop or "hold, I have a copy".
 */
#ifndef PYVMM_NET_PUMP_H
#define PYVMM_NET_PUMP_H

#include "virtio_interrupt.h"
#include "virtqueue.h"

#define PV_NET_HEADER 12u
/* 64 KiB is what segmentation offload makes of a packet at most; and room for link-layer headers. */
#define PV_NET_FRAME_MAX (65536u + 64u)
#define PV_NET_FRAME_MIN 14u
/* A frame and its virtio_net_hdr: what the bytes between driver and backend are at most. */
#define PV_NET_UNIT (PV_NET_HEADER + PV_NET_FRAME_MAX)
/* Receive buffers that one frame may be spread over (5.1.6.4, num_buffers). */
#define PV_NET_MERGE 128u
/* Frames moved in one direction before the other has its turn. */
#define PV_NET_BATCH 64u

enum pv_net_backend { PV_NET_NONE, PV_NET_TAP, PV_NET_STREAM };

/* Why pv_net_run() returned. */
enum pv_net_event {
	PV_NET_STOPPED = 1,
	PV_NET_CONTROL,   /* the control queue's doorbell was rung */
	PV_NET_FRAMES,    /* filtered: there may be something to pull or to push */
	PV_NET_LINK_LOST, /* the backend is gone; link_error says why */
	PV_NET_BROKEN,    /* a ring breaks a rule: broken_queue, broken_result */
};

/* link_error beside errno values: the peer sent a length that is none. */
#define PV_NET_BAD_LENGTH (-1)
/* broken_result beside enum pv_queue_result: a receive buffer that no header fits into, or that is not writable. */
#define PV_NET_BAD_BUFFER (-100)

/* What became of one frame. Negative: a pv_queue_result. */
enum pv_net_flow {
	PV_NET_NOTHING = 0, /* no frame there */
	PV_NET_DONE = 1,    /* moved, or dropped and counted */
	PV_NET_WAIT = 2,    /* the other side cannot take it now; it is where it was */
	PV_NET_GONE = 3,    /* the backend is lost */
};

struct pv_net_counters {
	uint64_t tx_frames, tx_bytes;
	uint64_t rx_frames, rx_bytes;
	uint64_t tx_malformed;            /* header or length against the rules */
	uint64_t tx_refused;              /* the backend did not take the frame */
	uint64_t tx_link_down, rx_link_down;
	uint64_t rx_oversized;            /* larger than the MTU allows, or than all buffers the driver could offer */
	uint64_t rx_undersized;           /* no Ethernet header in it */
	uint64_t rx_inactive;             /* came before the driver was ready */
};

struct pv_net {
	pthread_mutex_t lock;
	struct pv_queue *rx, *tx;
	struct pv_interrupt *interrupt;
	int epoll, wake;
	_Atomic bool allowed, stop, poked;
	bool filtered, link_up;
	uint32_t features;                /* negotiated, bits 0 to 31 */
	uint16_t mtu;                     /* 0: not negotiated */

	enum pv_net_backend kind;
	int fd;
	uint32_t interest;                /* epoll events asked for on fd; 0: not in the set */
	bool readable, writable;          /* fd may have something, may take something */
	bool tx_due;                      /* the transmit queue may have something */
	bool rx_due;                      /* the receive queue may have buffers */
	bool control_due;
	unsigned streak;                  /* wakes in a row that found the backend readable */
	uint32_t expected;                /* size of the last frame received */

	struct pv_chain *chains;          /* PV_NET_MERGE of the receive queue */
	uint32_t taken;                   /* of these are out */
	uint64_t room;                    /* their bytes */
	struct pv_chain *tx_chain;

	uint8_t *input;                   /* tap: PV_NET_UNIT; stream: what was read and is not taken yet */
	uint32_t input_start, input_end;  /* stream: bytes of it that are not looked at */
	uint8_t *unit;                    /* header and frame in `input` that wait to be delivered */
	uint32_t unit_size;               /* 0: none */
	uint8_t *output;                  /* stream: a frame sent in part; for a moment, a chain of too many pieces */
	uint32_t output_start, output_end;

	bool lost;                        /* PV_NET_LINK_LOST is due, whoever found it out */
	int link_error;
	int broken_queue, broken_result;
	struct pv_net_counters counters;
};

/* In front of what is read from a stream: its first frame's length and these 8 make room for a virtio_net_hdr. */
#define PV_NET_HEADROOM 8u
#define PV_NET_INPUT_SIZE (PV_NET_HEADROOM + 4u * (4u + PV_NET_FRAME_MAX))
#define PV_NET_OUTPUT_SIZE (4u + PV_NET_UNIT)

struct pv_net *pv_net_new(struct pv_queue *rx, struct pv_queue *tx, struct pv_interrupt *interrupt);
void pv_net_free(struct pv_net *n);
int pv_net_add_doorbells(struct pv_net *n, int rx, int tx, int control);
void pv_net_set_backend(struct pv_net *n, int kind, int fd);
void pv_net_configure(struct pv_net *n, uint32_t features, uint16_t mtu);
void pv_net_set_link(struct pv_net *n, int up);
void pv_net_set_filtered(struct pv_net *n, int on);
void pv_net_allow(struct pv_net *n, int on);
void pv_net_stop(struct pv_net *n);
void pv_net_poke(struct pv_net *n);
void pv_net_be_prompt(void);
int pv_net_run(struct pv_net *n);

/* net_filtered.c */
uint32_t pv_net_discard(struct pv_net *n, uint32_t limit);
int pv_net_pull_guest(struct pv_net *n, uint8_t *unit, uint32_t *size);
int pv_net_pull_backend(struct pv_net *n, uint8_t *unit, uint32_t *size);
int pv_net_push_guest(struct pv_net *n, const uint8_t *unit, uint32_t size);
int pv_net_push_backend(struct pv_net *n, const uint8_t *unit, uint32_t size);

/* What follows is called with the lock held. */
int pv_net_broken(struct pv_net *n, int queue, int result);

/* net_frames.c */
int pv_net_transmit_frame(struct pv_net *n);
int pv_net_receive_frame(struct pv_net *n);
int pv_net_transmit_unit(struct pv_net *n, const uint8_t *unit, uint32_t size);
int pv_net_receive_unit(struct pv_net *n, const uint8_t *unit, uint32_t size);

/* net_backend.c */
int pv_backend_next(struct pv_net *n);
int pv_backend_read_tap(struct pv_net *n, struct iovec *iov, int count, uint32_t *size);
int pv_backend_send(struct pv_net *n, struct iovec *iov, int count, uint32_t size);
int pv_backend_flush(struct pv_net *n);
void pv_backend_lose(struct pv_net *n, int why);

#endif
