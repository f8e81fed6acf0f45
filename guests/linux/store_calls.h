/* What store.c asks of the system. In the guest: without a C library, as init.c does and says why. With -DHOSTED: by
 * one, so that tests can run the same program under sanitizers. Results are -errno, either way.
 */
#pragma once

#include <linux/fcntl.h>
#include <stdint.h>

#ifdef HOSTED
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
#define CALL_(n, a, b, c, d, e, ...)                                                                                    \
	({ long result_ = syscall(n, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), 0L);                        \
	   result_ < 0 ? -errno : result_; })
#else
#include <asm/unistd.h>
#define SYS(name) __NR_##name

static inline long bare_call(long number, long a, long b, long c, long d, long e)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = 0;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "0"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}

#define CALL_(n, a, b, c, d, e, ...) bare_call((long)(n), (long)(a), (long)(b), (long)(c), (long)(d), (long)(e))

/* gcc makes calls of these from loops and initializers. */
void *memcpy(void *to, const void *from, unsigned long n)
{
	void *start = to;
	__asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
	return start;
}

void *memmove(void *to, const void *from, unsigned long n)
{
	char *t = to;
	const char *f = from;
	if (t <= f)
		return memcpy(to, from, n);
	while (n--)
		t[n] = f[n];
	return to;
}

void *memset(void *to, int value, unsigned long n)
{
	void *start = to;
	__asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(value) : "memory");
	return start;
}

int memcmp(const void *a, const void *b, unsigned long n)
{
	const unsigned char *x = a, *y = b;
	for (; n; n--, x++, y++)
		if (*x != *y)
			return *x - *y;
	return 0;
}
#endif

#define CALL(...) CALL_(__VA_ARGS__, 0, 0, 0, 0, 0)
#ifndef SYS
#define SYS(name) SYS_##name
#endif

/* <sys/epoll.h> and <netinet/in.h> are the C library's. */
struct epoll_item {
	uint32_t events;
	uint64_t data;
} __attribute__((packed));
#define EPOLL_IN 1u
#define EPOLL_OUT 4u
#define EPOLL_ADD 1
#define EPOLL_DEL 2
#define EPOLL_MOD 3

struct address {
	uint16_t family, port;  /* port: big-endian */
	uint32_t ip;
	uint8_t zero[8];
};
