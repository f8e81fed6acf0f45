/* store: a small service for a guest that is looked at from outside: HTTP/1.1 over TCP, one process, no thread.
 *
 *   store [--port N] [FILE]      port 80; with a FILE what is appended is durable before it is answered
 *
 *   POST /append    body of up to 1024 bytes becomes the next entry of the log; its number, from 0
 *   GET /log/N      entry N, or 404
 *   GET /length     how many there are
 *   PUT /register   the body is the register's value; GET /register: it
 *   GET /random     32 digits that no other process would answer: two replicas never agree on them. Not the kernel's
 *                   getrandom(), which has the same memory in both, and so the same numbers for a while
 *   GET /time       milliseconds since the machine's start
 *
 * All but the last two answer the same bytes whoever asks and wherever it runs: two replicas that got the same requests
 * send the same answers. Connections stay open, and requests may be sent ahead. Everything has a bound: connections,
 * a request's size, entries. A request that is none gets 400, and its connection is closed.
 */

#include "store_calls.h"

#define CONNECTIONS 64
#define HEADER_MAX 2048
#define BODY_MAX 1024
#define INPUT (HEADER_MAX + BODY_MAX)
#define OUTPUT 4096
#define ANSWER_MAX (BODY_MAX + 256)
#define ENTRIES 65536
#define LOG_SIZE (16u << 20)

struct connection {
	int fd;                          /* -1: free */
	int ends;                        /* after what is in out */
	uint32_t events;
	unsigned in_size, out_size, out_at;
	char in[INPUT], out[OUTPUT];
};

struct text {
	const char *at;
	unsigned size;
};

static struct connection connections[CONNECTIONS];
static char log_bytes[LOG_SIZE];
static struct { uint32_t at, size; } entries[ENTRIES];
static uint32_t entry_count, log_used;
static char register_value[BODY_MAX];
static unsigned register_size;
static int poller, listener, file = -1;

static struct text text_of(const char *text)
{
	unsigned n = 0;
	while (text[n])
		n++;
	return (struct text){text, n};
}

static int is(struct text text, const char *wanted)
{
	unsigned n = text_of(wanted).size;
	return text.size == n && !memcmp(text.at, wanted, n);
}

static int starts(struct text text, const char *wanted, struct text *rest)
{
	unsigned n = text_of(wanted).size;
	if (text.size < n || memcmp(text.at, wanted, n))
		return 0;
	*rest = (struct text){text.at + n, text.size - n};
	return 1;
}

/* Up to 9 digits and nothing else. */
static int number_in(struct text text, uint32_t *found)
{
	if (!text.size || text.size > 9)
		return 0;
	*found = 0;
	for (unsigned i = 0; i < text.size; i++) {
		if (text.at[i] < '0' || text.at[i] > '9')
			return 0;
		*found = *found * 10 + (uint32_t)(text.at[i] - '0');
	}
	return 1;
}

static unsigned put_number(char *into, uint64_t value)
{
	char digits[20];
	unsigned n = 0;
	do
		digits[n++] = (char)('0' + value % 10);
	while (value /= 10);
	for (unsigned i = 0; i < n; i++)
		into[i] = digits[n - 1 - i];
	return n;
}

/* ---- answers ---- */

static void add(struct connection *c, const char *text, unsigned size)
{
	memcpy(c->out + c->out_size, text, size); /* there is room: see serve() */
	c->out_size += size;
}

static void answer(struct connection *c, const char *status, const char *body, unsigned size)
{
	char length[20];
	add(c, "HTTP/1.1 ", 9);
	add(c, status, text_of(status).size);
	add(c, "\r\nContent-Length: ", 18);
	add(c, length, put_number(length, size));
	if (c->ends)
		add(c, "\r\nConnection: close", 19);
	add(c, "\r\n\r\n", 4);
	add(c, body, size);
}

static void refuse(struct connection *c, const char *status)
{
	answer(c, status, "", 0);
}

static void answer_number(struct connection *c, uint64_t value)
{
	char line[21];
	unsigned n = put_number(line, value);
	line[n++] = '\n';
	answer(c, "200 OK", line, n);
}

/* ---- the log ---- */

static int keep(const char *data, uint32_t size)
{
	if (entry_count == ENTRIES || size > LOG_SIZE - log_used)
		return 0;
	memcpy(log_bytes + log_used, data, size);
	entries[entry_count].at = log_used;
	entries[entry_count++].size = size;
	log_used += size;
	return 1;
}

static int write_whole(const void *data, unsigned size)
{
	const char *at = data;
	while (size) {
		long done = CALL(SYS(write), file, at, size);
		if (done <= 0)
			return 0;
		at += done;
		size -= (unsigned)done;
	}
	return 1;
}

static void append(struct connection *c, struct text body)
{
	if (entry_count == ENTRIES || body.size > LOG_SIZE - log_used) {
		refuse(c, "507 Insufficient Storage");
		return;
	}
	if (file >= 0) {
		uint32_t size = body.size;
		if (!write_whole(&size, sizeof(size)) || !write_whole(body.at, size) || CALL(SYS(fdatasync), file) < 0) {
			/* How much of it is there nobody knows: no more is kept. */
			CALL(SYS(close), file);
			file = -1;
			entry_count = ENTRIES;
			refuse(c, "500 Internal Server Error");
			return;
		}
	}
	keep(body.at, body.size);
	answer_number(c, entry_count - 1);
}

static int read_whole(void *into, unsigned size)
{
	char *at = into;
	while (size) {
		long got = CALL(SYS(read), file, at, size);
		if (got <= 0)
			return 0;
		at += got;
		size -= (unsigned)got;
	}
	return 1;
}

/* What an earlier process kept; an entry that is cut off at the end never was answered. */
static int open_file(const char *path)
{
	static char body[BODY_MAX];
	uint32_t size;
	long whole = 0;

	file = (int)CALL(SYS(open), path, O_RDWR | O_CREAT, 0600);
	if (file < 0)
		return 0;
	while (read_whole(&size, sizeof(size))) {
		if (size > BODY_MAX)
			return 0; /* no log of ours, whose content is worth something to somebody */
		if (!read_whole(body, size) || !keep(body, size))
			break;
		whole += (long)sizeof(size) + size;
	}
	return CALL(SYS(ftruncate), file, whole) >= 0 && CALL(SYS(lseek), file, whole, 0) == whole;
}

/* ---- requests ---- */

static void answer_random(struct connection *c)
{
	uint64_t value = __builtin_ia32_rdtsc() * 0x9e3779b97f4a7c15u;
	char line[33];
	for (unsigned i = 0; i < 32; i++) {
		line[i] = "0123456789abcdef"[value >> 60];
		value = value << 4 | value >> 60;
		if (i == 15)
			value = (value ^ value >> 29) * 0xbf58476d1ce4e5b9u;
	}
	line[32] = '\n';
	answer(c, "200 OK", line, sizeof(line));
}

static void answer_time(struct connection *c)
{
	int64_t now[2];
	CALL(SYS(clock_gettime), 1, now); /* CLOCK_MONOTONIC */
	answer_number(c, (uint64_t)now[0] * 1000 + (uint64_t)now[1] / 1000000);
}

static void carry_out(struct connection *c, struct text method, struct text path, struct text body)
{
	struct text rest;
	uint32_t n;

	if (is(method, "POST") && is(path, "/append")) {
		append(c, body);
	} else if (is(method, "PUT") && is(path, "/register")) {
		memcpy(register_value, body.at, body.size);
		register_size = body.size;
		answer(c, "200 OK", "kept\n", 5);
	} else if (!is(method, "GET")) {
		refuse(c, "405 Method Not Allowed");
	} else if (is(path, "/register")) {
		answer(c, "200 OK", register_value, register_size);
	} else if (is(path, "/length")) {
		answer_number(c, entry_count);
	} else if (starts(path, "/log/", &rest) && number_in(rest, &n) && n < entry_count) {
		answer(c, "200 OK", log_bytes + entries[n].at, entries[n].size);
	} else if (is(path, "/random")) {
		answer_random(c);
	} else if (is(path, "/time")) {
		answer_time(c);
	} else {
		refuse(c, "404 Not Found");
	}
}

static char lower(char c)
{
	return c >= 'A' && c <= 'Z' ? (char)(c + 'a' - 'A') : c;
}

/* A name without blanks, and a colon. "Content-Length : 5" must not pass for another header: its body would be taken
 * for requests (RFC 9112, 5.1). */
static int is_field(struct text line)
{
	unsigned n = 0;
	while (n < line.size && line.at[n] > ' ' && line.at[n] != ':' && line.at[n] != 127)
		n++;
	return n && n < line.size && line.at[n] == ':';
}

/* The value of a header line if its name is `name`, in lower case. */
static int header_is(struct text line, const char *name, struct text *value)
{
	unsigned n = 0;
	for (; name[n]; n++)
		if (n >= line.size || lower(line.at[n]) != name[n])
			return 0;
	if (n >= line.size || line.at[n++] != ':')
		return 0;
	while (n < line.size && (line.at[n] == ' ' || line.at[n] == '\t'))
		n++;
	while (line.size > n && (line.at[line.size - 1] == ' ' || line.at[line.size - 1] == '\t'))
		line.size--;
	*value = (struct text){line.at + n, line.size - n};
	return 1;
}

/* A line of `text` without its CR LF, which `text` begins behind afterwards; 0: there is none. */
static int take_line(struct text *text, struct text *line)
{
	for (unsigned i = 0; i + 1 < text->size; i++) {
		if (text->at[i] == '\r' && text->at[i + 1] == '\n') {
			*line = (struct text){text->at, i};
			*text = (struct text){text->at + i + 2, text->size - i - 2};
			return 1;
		}
	}
	return 0;
}

static int split(struct text *text, char at, struct text *first)
{
	for (unsigned i = 0; i < text->size; i++) {
		if (text->at[i] == at) {
			*first = (struct text){text->at, i};
			*text = (struct text){text->at + i + 1, text->size - i - 1};
			return 1;
		}
	}
	return 0;
}

/* The first request in the input: bytes of it, 0 if it is not whole yet, -1 if it is none. */
static int take_request(struct connection *c)
{
	struct text rest = {c->in, c->in_size}, line, method, path, value;
	uint32_t size = 0;
	int sized = 0;

	if (!take_line(&rest, &line))
		return c->in_size >= HEADER_MAX ? -1 : 0;
	if (!split(&line, ' ', &method) || !split(&line, ' ', &path) || !(is(line, "HTTP/1.1") || is(line, "HTTP/1.0")))
		return -1;
	for (;;) {
		struct text header;
		if (!take_line(&rest, &header))
			return c->in_size >= HEADER_MAX ? -1 : 0;
		if (!header.size)
			break;
		if (!is_field(header))
			return -1;
		if (header_is(header, "content-length", &value)) {
			if (sized || !number_in(value, &size) || size > BODY_MAX)
				return -1;
			sized = 1;
		} else if (header_is(header, "transfer-encoding", &value)) {
			return -1; /* no request of ours is so long that it would need it */
		} else if (header_is(header, "connection", &value) && is(value, "close")) {
			c->ends = 1;
		}
	}
	if (rest.at - c->in > HEADER_MAX)
		return -1;
	if (rest.size < size) {
		c->ends = 0;
		return 0;
	}
	carry_out(c, method, path, (struct text){rest.at, size});
	return (int)(rest.at - c->in) + (int)size;
}

/* ---- connections ---- */

static void watch(struct connection *c, uint32_t events)
{
	if (events != c->events) {
		struct epoll_item item = {events, (uint64_t)(c - connections)};
		CALL(SYS(epoll_ctl), poller, EPOLL_MOD, c->fd, &item);
		c->events = events;
	}
}

static void drop(struct connection *c)
{
	CALL(SYS(close), c->fd);
	c->fd = -1;
}

static int flush(struct connection *c)
{
	while (c->out_at < c->out_size) {
		long done = CALL(SYS(sendto), c->fd, c->out + c->out_at, c->out_size - c->out_at, 0x4000); /* MSG_NOSIGNAL */
		if (done == -11) /* EAGAIN */
			return 1;
		if (done <= 0)
			return 0;
		c->out_at += (unsigned)done;
	}
	c->out_at = c->out_size = 0;
	return 1;
}

/* Answer the next request, if it is here and there is room: whether it was. */
static int answer_next(struct connection *c)
{
	if (c->ends || OUTPUT - c->out_size < ANSWER_MAX)
		return 0;
	int used = take_request(c);
	if (used < 0) {
		c->ends = 1;
		refuse(c, "400 Bad Request");
		return 0;
	}
	c->in_size -= (unsigned)used;
	memmove(c->in, c->in + used, c->in_size);
	return used > 0;
}

/* All of them; 0: the connection is over. Who does not take answers gets no more. */
static int serve(struct connection *c)
{
	for (;;) {
		if (!flush(c))
			return 0;
		if (c->out_size)
			break;
		while (answer_next(c))
			;
		if (!c->out_size)
			break; /* no request is whole */
	}
	if (c->ends && !c->out_size)
		return 0;
	watch(c, c->out_size ? EPOLL_OUT : EPOLL_IN);
	return 1;
}

static void ready(struct connection *c, uint32_t events)
{
	if (!(events & EPOLL_OUT) || !c->out_size) {
		long got = c->in_size < INPUT ? CALL(SYS(recvfrom), c->fd, c->in + c->in_size, INPUT - c->in_size, 0) : 0;
		if (got == -11)
			return;
		if (got <= 0) {
			drop(c);
			return;
		}
		c->in_size += (unsigned)got;
	}
	if (!serve(c))
		drop(c);
}

static void take_in(void)
{
	int fd = (int)CALL(SYS(accept4), listener, 0, 0, 0x80800); /* SOCK_NONBLOCK | SOCK_CLOEXEC */
	if (fd < 0)
		return;
	for (unsigned i = 0; i < CONNECTIONS; i++) {
		struct connection *c = &connections[i];
		if (c->fd >= 0)
			continue;
		*c = (struct connection){.fd = fd, .events = EPOLL_IN};
		struct epoll_item item = {EPOLL_IN, i};
		if (CALL(SYS(epoll_ctl), poller, EPOLL_ADD, fd, &item) < 0)
			drop(c);
		return;
	}
	CALL(SYS(close), fd); /* too many */
}

static void say(const char *text)
{
	CALL(SYS(write), 2, text, text_of(text).size);
}

static int begin(uint32_t port)
{
	struct address any = {.family = 2, .port = (uint16_t)(port << 8 | port >> 8)}; /* AF_INET */
	struct epoll_item item = {EPOLL_IN, CONNECTIONS};
	int on = 1;

	listener = (int)CALL(SYS(socket), 2, 0x80001, 0); /* SOCK_STREAM | SOCK_CLOEXEC */
	CALL(SYS(setsockopt), listener, 1, 2, &on, sizeof(on)); /* SO_REUSEADDR: one may be started after the other */
	poller = (int)CALL(SYS(epoll_create1), 0);
	return listener >= 0 && poller >= 0 && CALL(SYS(bind), listener, &any, sizeof(any)) >= 0 &&
	       CALL(SYS(listen), listener, 16) >= 0 && CALL(SYS(epoll_ctl), poller, EPOLL_ADD, listener, &item) >= 0;
}

static int run(int count, char **words)
{
	struct epoll_item items[16];
	uint32_t port = 80;
	int at = 1;

	for (unsigned i = 0; i < CONNECTIONS; i++)
		connections[i].fd = -1;
	if (count > 2 && is(text_of(words[1]), "--port")) {
		if (!number_in(text_of(words[2]), &port) || !port || port > 65535) {
			say("store: --port takes a number from 1 to 65535\n");
			return 2;
		}
		at = 3;
	}
	if (count > at && !open_file(words[at])) {
		say("store: the file cannot be used\n");
		return 1;
	}
	if (!begin(port)) {
		say("store: the port cannot be had\n");
		return 1;
	}
	say("store: ready\n");
	for (;;) {
		long found = CALL(SYS(epoll_wait), poller, items, 16, -1);
		for (long i = 0; i < found; i++) {
			if (items[i].data == CONNECTIONS)
				take_in();
			else if (connections[items[i].data].fd >= 0)
				ready(&connections[items[i].data], items[i].events);
		}
	}
}

#ifdef HOSTED
int main(int count, char **words)
{
	return run(count, words);
}
#else
__attribute__((used)) static void enter(long *stack)
{
	CALL(SYS(exit_group), run((int)stack[0], (char **)(stack + 1)));
}

/* The stack as the kernel leaves it: argc, then argv (x86-64 ABI, 3.4.1). */
__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall enter\n");
#endif
