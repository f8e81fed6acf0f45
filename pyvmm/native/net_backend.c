/* Where frames go: a tap, or a stream socket. See net_pump.h. */

#include "net_pump.h"

#include <arpa/inet.h>
#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define STREAM_PREFIX 4u

/* The backend is of no use any more; what the driver sends from now on is dropped, as on an unplugged cable. */
void pv_backend_lose(struct pv_net *n, int why)
{
	if (n->kind == PV_NET_NONE)
		return;
	if (n->interest)
		epoll_ctl(n->epoll, EPOLL_CTL_DEL, n->fd, NULL);
	n->interest = 0;
	n->kind = PV_NET_NONE;
	n->fd = -1;
	n->link_up = false;
	n->link_error = why;
	n->lost = true;
	n->readable = false;
	n->writable = true;
	n->input_start = n->input_end = n->unit_size = 0;
	n->output_start = n->output_end = 0;
}

/* A tap that was deleted says EBADFD. */
static int failed(struct pv_net *n, int error)
{
	if (error == EAGAIN || error == EWOULDBLOCK)
		return PV_NET_NOTHING;
	pv_backend_lose(n, error);
	return PV_NET_GONE;
}

/* One frame with its header, from the tap to the segments: PV_NET_DONE, _NOTHING or _GONE. */
int pv_backend_read_tap(struct pv_net *n, struct iovec *iov, int count, uint32_t *size)
{
	ssize_t got;
	do
		got = readv(n->fd, iov, count);
	while (got < 0 && errno == EINTR);
	if (got < 0)
		return failed(n, errno);
	if (!got) { /* no tap does that */
		pv_backend_lose(n, ENODATA);
		return PV_NET_GONE;
	}
	*size = (uint32_t)got;
	return PV_NET_DONE;
}

/* Read more behind what is there. */
static int fill_input(struct pv_net *n)
{
	uint32_t left = n->input_end - n->input_start;
	if (n->input_start > PV_NET_HEADROOM) {
		memmove(n->input + PV_NET_HEADROOM, n->input + n->input_start, left);
		n->input_start = PV_NET_HEADROOM;
		n->input_end = PV_NET_HEADROOM + left;
	}
	ssize_t got;
	do
		got = recv(n->fd, n->input + n->input_end, PV_NET_INPUT_SIZE - n->input_end, MSG_DONTWAIT);
	while (got < 0 && errno == EINTR);
	if (got < 0)
		return failed(n, errno);
	if (!got) {
		pv_backend_lose(n, ECONNRESET);
		return PV_NET_GONE;
	}
	n->input_end += (uint32_t)got;
	return PV_NET_DONE;
}

/* The next whole frame of what was read; its length's place and the bytes before it become an empty header. */
static int next_of_stream(struct pv_net *n)
{
	if (n->input_start < PV_NET_HEADROOM)
		n->input_start = n->input_end = PV_NET_HEADROOM;
	for (;;) {
		uint32_t there = n->input_end - n->input_start, length = 0;
		if (there >= STREAM_PREFIX) {
			memcpy(&length, n->input + n->input_start, STREAM_PREFIX);
			length = ntohl(length);
			if (!length || length > PV_NET_FRAME_MAX) {
				pv_backend_lose(n, PV_NET_BAD_LENGTH);
				return PV_NET_GONE;
			}
			if (there - STREAM_PREFIX >= length)
				break;
		}
		int result = fill_input(n);
		if (result != PV_NET_DONE)
			return result;
	}
	uint32_t length;
	memcpy(&length, n->input + n->input_start, STREAM_PREFIX);
	length = ntohl(length);
	n->unit = n->input + n->input_start - PV_NET_HEADROOM;
	n->unit_size = PV_NET_HEADER + length;
	memset(n->unit, 0, PV_NET_HEADER);
	n->input_start += STREAM_PREFIX + length;
	return PV_NET_DONE;
}

/* Have a frame wait in `unit`: PV_NET_DONE if one does, else _NOTHING or _GONE. */
int pv_backend_next(struct pv_net *n)
{
	if (n->unit_size)
		return PV_NET_DONE;
	if (n->kind == PV_NET_STREAM)
		return next_of_stream(n);
	if (n->kind == PV_NET_NONE)
		return PV_NET_NOTHING;
	struct iovec whole = {n->input, PV_NET_UNIT};
	uint32_t size;
	int result = pv_backend_read_tap(n, &whole, 1, &size);
	if (result == PV_NET_DONE) {
		n->unit = n->input;
		n->unit_size = size;
	}
	return result;
}

/* Send what is left of a frame: PV_NET_DONE, _WAIT or _GONE. */
int pv_backend_flush(struct pv_net *n)
{
	while (n->output_start < n->output_end) {
		ssize_t sent = send(n->fd, n->output + n->output_start, n->output_end - n->output_start,
				    MSG_DONTWAIT | MSG_NOSIGNAL);
		if (sent >= 0)
			n->output_start += (uint32_t)sent;
		else if (errno != EINTR)
			return failed(n, errno) == PV_NET_GONE ? PV_NET_GONE : PV_NET_WAIT;
	}
	n->output_start = n->output_end = 0;
	return PV_NET_DONE;
}

static int send_to_tap(struct pv_net *n, const struct iovec *iov, int count)
{
	while (writev(n->fd, iov, count) < 0) {
		if (errno == EINTR)
			continue;
		if (errno == EAGAIN)
			return PV_NET_WAIT;
		if (errno == EBADFD || errno == EBADF) {
			pv_backend_lose(n, errno);
			return PV_NET_GONE;
		}
		/* The interface is down (EIO), or the kernel finds fault with the frame: only this one is lost. */
		n->counters.tx_refused++;
		return PV_NET_NOTHING;
	}
	return PV_NET_DONE;
}

static int send_to_stream(struct pv_net *n, struct iovec *iov, int count, uint32_t size)
{
	int result = pv_backend_flush(n);
	if (result != PV_NET_DONE)
		return result;
	uint32_t length = htonl(size - PV_NET_HEADER);
	iov[0] = (struct iovec){&length, STREAM_PREFIX};
	struct msghdr message = {.msg_iov = iov, .msg_iovlen = (size_t)count};
	ssize_t sent;
	do
		sent = sendmsg(n->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
	while (sent < 0 && errno == EINTR);
	if (sent < 0)
		return failed(n, errno) == PV_NET_GONE ? PV_NET_GONE : PV_NET_WAIT;
	/* Whatever did not go out is kept: a frame that is begun must be ended, and the chain goes back. */
	for (int i = 0; i < count; i++) {
		if ((size_t)sent >= iov[i].iov_len) {
			sent -= (ssize_t)iov[i].iov_len;
			continue;
		}
		size_t left = iov[i].iov_len - (size_t)sent;
		memmove(n->output + n->output_end, (uint8_t *)iov[i].iov_base + sent, left);
		n->output_end += (uint32_t)left;
		sent = 0;
	}
	return PV_NET_DONE;
}

/*
 * Send a frame of `size` bytes with its header, which iov[0] holds: PV_NET_DONE, _WAIT (nothing was sent), _GONE, or
 * _NOTHING: the backend refused it.
 */
int pv_backend_send(struct pv_net *n, struct iovec *iov, int count, uint32_t size)
{
	if (n->kind == PV_NET_STREAM)
		return send_to_stream(n, iov, count, size);
	return send_to_tap(n, iov, count);
}
