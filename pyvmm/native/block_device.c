/* The threads of a block device; see block_device.h. */

#define _GNU_SOURCE
#include "block_device.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

struct pv_block_device *pv_block_new(struct pv_block_image *image, struct pv_queue *queue)
{
	struct pv_block_device *d = calloc(1, sizeof(*d));
	if (!d)
		return NULL;
	d->image = image;
	d->queue = queue;
	d->doorbell = -1;
	pv_forward_init(&d->forward);
	pthread_mutex_init(&d->lock, NULL);
	pthread_cond_init(&d->turn, NULL);
	pthread_condattr_t monotonic;
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&d->quiet, &monotonic);
	pthread_condattr_destroy(&monotonic);
	return d;
}

void pv_block_free(struct pv_block_device *d)
{
	pv_forward_destroy(&d->forward);
	pthread_mutex_destroy(&d->lock);
	pthread_cond_destroy(&d->turn);
	pthread_cond_destroy(&d->quiet);
	free(d);
}

static uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void ring(struct pv_block_device *d)
{
	uint64_t one = 1;
	ssize_t written = write(d->doorbell, &one, sizeof(one));
	(void)written; /* full is rung */
}

static void give_lead(struct pv_block_device *d, struct pv_block_worker *w)
{
	if (d->leader == w) {
		d->leader = NULL;
		pthread_cond_signal(&d->turn);
	}
}

struct leading {
	struct pv_block_device *d;
	struct pv_block_worker *w;
};

static void before_blocking(void *context)
{
	struct leading *l = context;
	pthread_mutex_lock(&l->d->lock);
	give_lead(l->d, l->w);
	pthread_mutex_unlock(&l->d->lock);
}

/* Called and left with the lock held. Spurious returns are harmless: the caller looks at everything again. */
static void wait_for_doorbell(struct pv_block_device *d)
{
	struct pollfd bell = {.fd = d->doorbell, .events = POLLIN};
	uint64_t count;

	pthread_mutex_unlock(&d->lock);
	while (poll(&bell, 1, -1) < 0 && errno == EINTR)
		;
	ssize_t taken = read(d->doorbell, &count, sizeof(count));
	(void)taken;
	pthread_mutex_lock(&d->lock);
}

/* Give the chain back and tell the driver if it wants to hear of it. */
static void complete(struct pv_block_device *d, struct pv_block_worker *w, const struct pv_block_done *done)
{
	struct pv_block_counter *counter = &d->counters[done->kind];
	counter->requests++;
	counter->errors += done->status != PV_BLOCK_S_OK;
	counter->bytes += done->bytes;
	pv_queue_push(d->queue, &w->chain, done->written);
	if (pv_queue_wants_interrupt(d->queue) && d->interrupt)
		pv_interrupt_raise(d->interrupt, PV_INTERRUPT_USED_BUFFER);
}

/* Take and serve until there is a reason to stop; called and left with the lock held, as the leader. */
static int lead(struct pv_block_device *d, struct pv_block_worker *w)
{
	struct leading context = {d, w};
	struct pv_block_done done;

	while (d->running && d->leader == w) {
		if (!d->queue->size) {
			wait_for_doorbell(d);
			continue;
		}
		int taken = pv_queue_pop(d->queue, &w->chain);
		if (taken == PV_QUEUE_STOPPED) {
			wait_for_doorbell(d); /* broken: until somebody has seen to it */
			continue;
		}
		if (taken == PV_QUEUE_EMPTY) {
			if (!pv_queue_enable_kicks(d->queue)) {
				wait_for_doorbell(d);
				pv_queue_disable_kicks(d->queue);
			}
			continue;
		}
		if (taken < 0) {
			w->problem = taken;
			return PV_BLOCK_BROKEN;
		}
		pthread_mutex_unlock(&d->lock);
		int problem = pv_block_serve(d, &w->chain, before_blocking, &context, &done);
		pthread_mutex_lock(&d->lock);
		if (problem) {
			d->queue->broken = true;
			w->problem = problem;
			return PV_BLOCK_BROKEN;
		}
		complete(d, w, &done);
		if (done.error) {
			w->error = -done.error;
			w->kind = done.kind;
			return PV_BLOCK_FAILED;
		}
	}
	return -1;
}

int pv_block_work(struct pv_block_device *d, struct pv_block_worker *w)
{
	sigset_t all;
	int result = -1;

	/* Signals are for the thread that knows what to do about them; SIGSYS is each thread's own (sandbox.c). */
	sigfillset(&all);
	sigdelset(&all, SIGSYS);
	pthread_sigmask(SIG_BLOCK, &all, NULL);
	pthread_mutex_lock(&d->lock);
	while (result < 0) {
		if (d->ending) {
			result = PV_BLOCK_END;
			break;
		}
		if (!d->running || d->leader) {
			pthread_cond_wait(&d->turn, &d->lock);
			continue;
		}
		d->leader = w;
		d->busy++;
		result = lead(d, w);
		give_lead(d, w);
		if (!--d->busy)
			pthread_cond_broadcast(&d->quiet);
	}
	pthread_mutex_unlock(&d->lock);
	return result;
}

void pv_block_resume(struct pv_block_device *d)
{
	pthread_mutex_lock(&d->lock);
	d->running = true;
	pthread_cond_signal(&d->turn);
	pthread_mutex_unlock(&d->lock);
}

int pv_block_suspend(struct pv_block_device *d, uint32_t timeout_ms)
{
	uint64_t until = now_ns() + timeout_ms * 1000000ull;
	struct timespec deadline = {(time_t)(until / 1000000000u), (long)(until % 1000000000u)};
	int result = 0;

	pthread_mutex_lock(&d->lock);
	d->running = false;
	if (d->leader)
		ring(d);
	while (d->busy && result != ETIMEDOUT)
		result = pthread_cond_timedwait(&d->quiet, &d->lock, &deadline);
	if (!d->busy)
		result = 0;
	pthread_mutex_unlock(&d->lock);
	return result;
}

/* No thread takes anything up any more; those that are out come back to end. */
void pv_block_end(struct pv_block_device *d)
{
	pthread_mutex_lock(&d->lock);
	d->running = false;
	d->ending = true;
	if (d->leader)
		ring(d);
	pthread_cond_broadcast(&d->turn);
	pthread_mutex_unlock(&d->lock);
}

void pv_block_count(struct pv_block_device *d, struct pv_block_counter *into)
{
	pthread_mutex_lock(&d->lock);
	for (int i = 0; i < PV_BLOCK_KINDS; i++)
		into[i] = d->counters[i];
	pthread_mutex_unlock(&d->lock);
}
