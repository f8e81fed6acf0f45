/* The device's thread: waits for doorbells and the backend, and moves frames in batches. See net_pump.h. */

#include "net_pump.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

enum source { WAKE, RX_BELL, TX_BELL, CONTROL_BELL, BACKEND };

/* -- made and ended by the device --------------------------------------------------------------- */

/*
 * Doorbells are waited for edge-triggered: each write of an eventfd is an edge, whatever its count, so nobody needs to
 * read it back to zero. That is one system call less for each time the driver rings.
 */
static int watch(struct pv_net *n, int fd, enum source source)
{
	struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u32 = source};
	return epoll_ctl(n->epoll, EPOLL_CTL_ADD, fd, &event);
}

struct pv_net *pv_net_new(struct pv_queue *rx, struct pv_queue *tx, struct pv_interrupt *interrupt)
{
	struct pv_net *n = calloc(1, sizeof(*n));
	if (!n)
		return NULL;
	pthread_mutex_init(&n->lock, NULL);
	n->rx = rx;
	n->tx = tx;
	n->interrupt = interrupt;
	n->fd = -1;
	n->writable = true;
	n->expected = PV_NET_HEADER + PV_NET_FRAME_MIN;
	n->epoll = epoll_create1(EPOLL_CLOEXEC);
	n->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	n->chains = calloc(PV_NET_MERGE, sizeof(*n->chains));
	n->tx_chain = calloc(1, sizeof(*n->tx_chain));
	n->input = malloc(PV_NET_INPUT_SIZE);
	n->output = malloc(PV_NET_OUTPUT_SIZE);
	if (n->epoll < 0 || n->wake < 0 || !n->chains || !n->tx_chain || !n->input || !n->output ||
	    watch(n, n->wake, WAKE)) {
		int why = errno;
		pv_net_free(n);
		errno = why;
		return NULL;
	}
	return n;
}

/* The thread must have left pv_net_run(). */
void pv_net_free(struct pv_net *n)
{
	if (!n)
		return;
	if (n->epoll >= 0)
		close(n->epoll);
	if (n->wake >= 0)
		close(n->wake);
	free(n->chains);
	free(n->tx_chain);
	free(n->input);
	free(n->output);
	pthread_mutex_destroy(&n->lock);
	free(n);
}

int pv_net_add_doorbells(struct pv_net *n, int rx, int tx, int control)
{
	return watch(n, rx, RX_BELL) || watch(n, tx, TX_BELL) || watch(n, control, CONTROL_BELL) ? -1 : 0;
}

static void wake(struct pv_net *n)
{
	eventfd_write(n->wake, 1);
}

/* Before the thread runs, or while it stands still: a descriptor that stays the caller's, non-blocking. */
void pv_net_set_backend(struct pv_net *n, int kind, int fd)
{
	pthread_mutex_lock(&n->lock);
	n->kind = (enum pv_net_backend)kind;
	n->fd = fd;
	n->link_up = true;
	n->readable = true;
	pthread_mutex_unlock(&n->lock);
	wake(n);
}

void pv_net_configure(struct pv_net *n, uint32_t features, uint16_t mtu)
{
	pthread_mutex_lock(&n->lock);
	n->features = features;
	n->mtu = mtu;
	pthread_mutex_unlock(&n->lock);
}

/* A link that is down loses what is sent either way; one without a backend stays down. */
void pv_net_set_link(struct pv_net *n, int up)
{
	pthread_mutex_lock(&n->lock);
	n->link_up = up && n->kind != PV_NET_NONE;
	pthread_mutex_unlock(&n->lock);
}

/* From here on, or no longer, each frame goes through the interpreter. No frame is between the two ways then. */
void pv_net_set_filtered(struct pv_net *n, int on)
{
	pthread_mutex_lock(&n->lock);
	n->filtered = on;
	n->tx_due = n->rx_due = n->readable = true;
	pthread_mutex_unlock(&n->lock);
	wake(n);
}

/* Off: returns when the thread has left the queues, and it stays away. On: it looks at all of them. */
void pv_net_allow(struct pv_net *n, int on)
{
	if (!on)
		n->allowed = false; /* at once, so that a busy thread does not take the lock again and again */
	pthread_mutex_lock(&n->lock);
	n->allowed = on;
	if (on) {
		n->tx_due = n->rx_due = n->control_due = n->readable = n->writable = true;
		n->poked = true;
	}
	pthread_mutex_unlock(&n->lock);
	wake(n);
}

/* Make pv_net_run() return PV_NET_STOPPED, now and ever after. */
void pv_net_stop(struct pv_net *n)
{
	n->stop = true;
	wake(n);
}

/* Make pv_net_run() return PV_NET_FRAMES soon if frames are filtered: there is one to push. */
void pv_net_poke(struct pv_net *n)
{
	n->poked = true;
	wake(n);
}

/* -- the loop ----------------------------------------------------------------------------------- */

/* Under the lock: a moment later the ring may be another one, of a driver that has reset the device. */
int pv_net_broken(struct pv_net *n, int queue, int result)
{
	n->broken_queue = queue;
	n->broken_result = result;
	/* Also where the ring itself is in order but not what it offers. */
	(queue ? n->tx : n->rx)->broken = true;
	n->taken = 0;
	n->room = 0;
	return PV_NET_BROKEN;
}

/* Both return 0 or PV_NET_BROKEN. */
static int serve_tx(struct pv_net *n)
{
	int flow = PV_NET_DONE;
	pv_queue_disable_kicks(n->tx);
	for (unsigned i = 0; i < PV_NET_BATCH && flow == PV_NET_DONE; i++) {
		flow = pv_net_transmit_frame(n);
		if (flow == PV_NET_NOTHING && pv_queue_enable_kicks(n->tx))
			flow = PV_NET_DONE;
	}
	if (pv_queue_wants_interrupt(n->tx))
		pv_interrupt_raise(n->interrupt, PV_INTERRUPT_USED_BUFFER);
	if (flow < 0)
		return pv_net_broken(n, 1, flow);
	n->tx_due = flow != PV_NET_NOTHING;
	n->writable = flow != PV_NET_WAIT && !n->output_end;
	return 0;
}

static int serve_rx(struct pv_net *n)
{
	/*
	 * A lone frame is followed by the wait that is due anyway, not by a read that finds nothing. Only a backend
	 * that is readable time after time is read further, twice as far each time.
	 */
	unsigned limit = n->kind == PV_NET_TAP ? 1u << n->streak : PV_NET_BATCH;
	int flow = PV_NET_DONE;
	pv_queue_disable_kicks(n->rx);
	for (unsigned i = 0; i < limit && flow == PV_NET_DONE; i++)
		flow = pv_net_receive_frame(n); /* which asks for a doorbell where it has to wait */
	if (pv_queue_wants_interrupt(n->rx))
		pv_interrupt_raise(n->interrupt, PV_INTERRUPT_USED_BUFFER);
	if (flow < 0)
		return pv_net_broken(n, 0, flow);
	n->rx_due = flow != PV_NET_WAIT;
	if (flow == PV_NET_NOTHING || (flow == PV_NET_DONE && n->kind == PV_NET_TAP))
		n->readable = false; /* a tap that has more says so again: level-triggered */
	return 0;
}

/* Out of the set altogether while nothing can be done about it: a socket hung up would be reported for ever. */
static void set_interest(struct pv_net *n)
{
	uint32_t wanted = 0;
	if (n->allowed && n->kind != PV_NET_NONE) {
		if (n->rx_due && !n->unit_size)
			wanted |= EPOLLIN;
		if (!n->writable)
			wanted |= EPOLLOUT;
	}
	if (wanted == n->interest)
		return;
	struct epoll_event event = {.events = wanted, .data.u32 = BACKEND};
	int operation = !wanted ? EPOLL_CTL_DEL : n->interest ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;
	epoll_ctl(n->epoll, operation, n->fd, &event);
	n->interest = wanted;
}

static void note(struct pv_net *n, const struct epoll_event *events, int count)
{
	bool readable = false;
	for (int i = 0; i < count; i++) {
		switch (events[i].data.u32) {
		case RX_BELL:
			n->rx_due = true;
			n->poked = true; /* a filter may have a frame for it */
			break;
		case TX_BELL:
			n->tx_due = true;
			break;
		case CONTROL_BELL:
			n->control_due = true;
			break;
		case BACKEND:
			if (events[i].events & (EPOLLOUT | EPOLLERR | EPOLLHUP)) {
				n->writable = true;
				n->poked = true;
			}
			if (events[i].events & (EPOLLIN | EPOLLERR | EPOLLHUP))
				readable = n->readable = true;
			break;
		}
	}
	if (count)
		n->streak = readable ? n->streak + (1u << n->streak < PV_NET_BATCH) : 0;
}

static int serve(struct pv_net *n, bool *more)
{
	if (n->control_due) {
		n->control_due = false;
		return PV_NET_CONTROL;
	}
	if (n->output_end && n->writable) {
		n->writable = pv_backend_flush(n) != PV_NET_WAIT;
	}
	if (!n->allowed)
		return 0;
	if (n->filtered) {
		if (!n->poked && !(n->tx_due && n->writable) && !(n->rx_due && n->readable))
			return 0;
		n->poked = false;
		return PV_NET_FRAMES;
	}
	int event = 0;
	if (n->tx_due && n->writable)
		event = serve_tx(n);
	if (!event && n->rx_due && (n->readable || n->unit_size))
		event = serve_rx(n);
	*more = (n->tx_due && n->writable) || (n->rx_due && (n->readable || n->unit_size));
	return event;
}

struct scheduling { /* struct sched_attr of <linux/sched/types.h>, which glibc's <sched.h> clashes with */
	uint32_t size, policy;
	uint64_t flags;
	int32_t nice;
	uint32_t priority;
	uint64_t runtime, deadline, period;
};

/*
 * Ask for short time slices. The thread works for microseconds each time it is woken, often on the CPU where a vCPU
 * polls for what it is about to bring; a scheduler that lets that one finish its slice first makes milliseconds of
 * it. A thread with shorter slices need not wait (EEVDF, Linux 6.12 on; earlier kernels ignore it). Its share of the
 * CPU stays the same.
 */
void pv_net_be_prompt(void)
{
	struct scheduling attributes = {.size = sizeof(attributes)};
	if (syscall(SYS_sched_getattr, 0, &attributes, sizeof(attributes), 0))
		return;
	attributes.runtime = 100000; /* ns; the least there is */
	syscall(SYS_sched_setattr, 0, &attributes, 0);
}

/* Serve until something is up that is not the data path's; an enum pv_net_event. */
int pv_net_run(struct pv_net *n)
{
	struct epoll_event events[5];
	/* Also if there is work: doorbells must be heard while frames for filters keep the caller coming back. */
	bool more = true;
	for (;;) {
		int count = epoll_wait(n->epoll, events, 5, more ? 0 : -1);
		if (count < 0) /* EINTR: a debugger, or a signal meant for another thread */
			count = 0;
		more = false;
		pthread_mutex_lock(&n->lock);
		note(n, events, count);
		int event = serve(n, &more);
		if (!event && n->lost) {
			n->lost = false;
			event = PV_NET_LINK_LOST;
		}
		set_interest(n);
		pthread_mutex_unlock(&n->lock);
		if (n->stop)
			return PV_NET_STOPPED;
		if (event)
			return event;
	}
}
