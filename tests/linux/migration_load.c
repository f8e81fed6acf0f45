/* Work that shows whether a guest has noticed that it was moved: memory, a disk, a TCP connection and the clocks.
 *
 *   migration_load MIB DISK PORT
 *
 * A process verifies and rewrites MIB MiB of memory, over and over. Another writes numbered blocks to DISK, past the page
 * cache, and reads others back. A third sends back what comes over one TCP connection to PORT. The first process looks at
 * the clocks, and says every second what was done and what was wrong. When the client ends the connection the others
 * finish: all of the disk is verified once more. What stands on it then is described by a digest, so that the host can
 * find the same. Exits with 0 only if nothing was wrong. To narrow something down: MIB may be 0, and DISK "-".
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 16384
#define BLOCKS_MAX 4096
#define WRITES_PER_FLUSH 8
#define MAGIC 0x766d6d6c6f616421ull
#define TICK_NS 20000000

struct shared {
	volatile int memory_ready, stop;
	volatile uint64_t memory_passes, memory_errors;
	volatile uint64_t disk_writes, disk_reads, disk_errors, disk_slowest_ms;
	volatile uint64_t echo_bytes, echo_errors, echo_ended;
	volatile uint64_t clock_errors, slowest_tick_ms;
};

static struct shared *shared;

/* splitmix64: every bit of the result depends on every bit of x. */
static inline uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15ull;
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ x >> 27) * 0x94d049bb133111ebull;
	return x ^ x >> 31;
}

static uint64_t now_ns(clockid_t clock)
{
	struct timespec t;
	clock_gettime(clock, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void say(const char *text)
{
	if (write(1, text, strlen(text)) < 0)
		_exit(1);
}

static void complain(const char *what, uint64_t where, uint64_t expected, uint64_t found)
{
	char line[160];
	snprintf(line, sizeof(line), "load: WRONG %s at %llu: %016llx, not %016llx\n", what, (unsigned long long)where,
		 (unsigned long long)found, (unsigned long long)expected);
	say(line);
}

/* ---- memory ---- */

static void check_memory(size_t mib)
{
	size_t words = (mib << 20) / sizeof(uint64_t);
	uint64_t *memory = mmap(NULL, mib << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED) {
		shared->memory_errors++;
		shared->memory_ready = 1;
		return;
	}
	for (size_t i = 0; i < words; i++)
		memory[i] = mix(i);
	shared->memory_ready = 1;
	for (uint64_t pass = 1; !shared->stop; pass++) {
		uint64_t old = mix(pass - 1) ^ mix(0), new = mix(pass) ^ mix(0);
		for (size_t i = 0; i < words; i++) {
			uint64_t found = memory[i], pattern = mix(i);
			if (found != (pattern ^ old)) {
				if (shared->memory_errors++ < 4)
					complain("memory", i, pattern ^ old, found);
			}
			memory[i] = pattern ^ new;
		}
		shared->memory_passes = pass;
	}
}

/* ---- disk ---- */

struct block {
	uint64_t magic, number, place;
	uint64_t data[(BLOCK - 32) / sizeof(uint64_t)];
	uint32_t zero, crc; /* of all before it */
};
_Static_assert(sizeof(struct block) == BLOCK, "a block");

static uint32_t crc_table[256];

static uint32_t crc32(const void *data, size_t size)
{
	const uint8_t *at = data;
	uint32_t crc = ~0u;
	if (!crc_table[1])
		for (uint32_t i = 0; i < 256; i++) {
			uint32_t c = i;
			for (int bit = 0; bit < 8; bit++)
				c = c & 1 ? 0xedb88320u ^ c >> 1 : c >> 1;
			crc_table[i] = c;
		}
	while (size--)
		crc = crc_table[(crc ^ *at++) & 0xff] ^ crc >> 8;
	return ~crc;
}

static struct block *block; /* aligned, for O_DIRECT */
static uint64_t written[BLOCKS_MAX];

static void fill(uint64_t place, uint64_t number)
{
	*block = (struct block){.magic = MAGIC, .number = number, .place = place};
	for (size_t i = 0; i < sizeof(block->data) / sizeof(*block->data); i++)
		block->data[i] = mix(number << 20 ^ i);
	block->crc = crc32(block, offsetof(struct block, crc));
}

/* Reads what stands at `place`, which must be what was written there last. Zero bytes where nothing was. */
static void verify(int disk, uint64_t place)
{
	uint64_t number = written[place];
	memset(block, 0xa5, BLOCK);
	if (pread(disk, block, BLOCK, (off_t)(place * BLOCK)) != BLOCK) {
		shared->disk_errors++;
		complain("disk read, errno", place, 0, (uint64_t)errno);
		return;
	}
	shared->disk_reads++;
	if (block->number != number || (number && (block->magic != MAGIC || block->place != place ||
						   block->crc != crc32(block, offsetof(struct block, crc))))) {
		shared->disk_errors++;
		complain("disk block", place, number, block->number);
	}
}

static void check_disk(const char *path)
{
	int disk = open(path, O_RDWR | O_DIRECT);
	uint64_t size = 0, number = 0, digest = 0xcbf29ce484222325ull;
	char line[120];

	if (disk < 0 || ioctl(disk, BLKGETSIZE64, &size) || posix_memalign((void **)&block, 4096, BLOCK)) {
		shared->disk_errors++;
		say("load: WRONG the disk cannot be opened\n");
		return;
	}
	uint64_t blocks = size / BLOCK < BLOCKS_MAX ? size / BLOCK : BLOCKS_MAX;
	while (!shared->stop) {
		uint64_t began = now_ns(CLOCK_MONOTONIC), place = mix(++number) % blocks;
		fill(place, number);
		if (pwrite(disk, block, BLOCK, (off_t)(place * BLOCK)) != BLOCK) {
			shared->disk_errors++;
			complain("disk write, errno", place, 0, (uint64_t)errno);
			break;
		}
		written[place] = number;
		shared->disk_writes++;
		if (number % WRITES_PER_FLUSH == 0 && fdatasync(disk)) {
			shared->disk_errors++;
			complain("disk flush, errno", number, 0, (uint64_t)errno);
		}
		verify(disk, mix(~number) % blocks);
		uint64_t took = (now_ns(CLOCK_MONOTONIC) - began) / 1000000;
		if (took > shared->disk_slowest_ms)
			shared->disk_slowest_ms = took;
	}
	for (uint64_t place = 0; place < blocks; place++) {
		verify(disk, place);
		digest = (digest ^ written[place]) * 0x100000001b3ull;
		digest = (digest ^ (written[place] ? block->crc : 0)) * 0x100000001b3ull;
	}
	if (fdatasync(disk))
		shared->disk_errors++;
	snprintf(line, sizeof(line), "load: disk digest %016llx after %llu writes\n", (unsigned long long)digest,
		 (unsigned long long)number);
	say(line);
	close(disk);
}

/* ---- TCP ---- */

static void echo_failed(const char *what)
{
	shared->echo_errors++;
	complain(what, shared->echo_bytes, 0, (uint64_t)errno);
}

static void echo(int port)
{
	static char buffer[65536];
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
	int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1, client = -1;

	if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof(address)) || listen(listener, 1)) {
		echo_failed("listening, errno");
		return;
	}
	say("load: listening\n");
	client = accept(listener, NULL, NULL);
	setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	for (;;) {
		ssize_t got = recv(client, buffer, sizeof(buffer), 0);
		if (got <= 0) {
			if (got < 0)
				echo_failed("receiving, errno");
			break;
		}
		for (ssize_t sent = 0; sent < got;) {
			ssize_t now = send(client, buffer + sent, (size_t)(got - sent), MSG_NOSIGNAL);
			if (now <= 0) {
				echo_failed("sending, errno");
				return;
			}
			sent += now;
		}
		shared->echo_bytes += (uint64_t)got;
	}
	close(client);
}

/* ---- the clocks, and reports ---- */

static const clockid_t clocks[] = {CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_REALTIME};
#define CLOCKS (sizeof(clocks) / sizeof(*clocks))

static void look_at_clocks(uint64_t *last)
{
	for (size_t i = 0; i < CLOCKS; i++) {
		uint64_t now = now_ns(clocks[i]);
		if (now < last[i]) {
			shared->clock_errors++;
			complain("clock", i, last[i], now);
		}
		if (!i && last[i] && (now - last[i]) / 1000000 > shared->slowest_tick_ms)
			shared->slowest_tick_ms = (now - last[i]) / 1000000;
		last[i] = now;
	}
}

static void report(void)
{
	static unsigned long number;
	char line[300];
	uint64_t up = now_ns(CLOCK_BOOTTIME);
	snprintf(line, sizeof(line),
		 "load: %lu up %llu.%03llu memory %llu/%llu disk %llu/%llu/%llu slowest %llu echo %llu/%llu clock %llu"
		 " slowest %llu\n",
		 ++number, (unsigned long long)(up / 1000000000), (unsigned long long)(up / 1000000 % 1000),
		 (unsigned long long)shared->memory_passes, (unsigned long long)shared->memory_errors,
		 (unsigned long long)shared->disk_writes, (unsigned long long)shared->disk_reads,
		 (unsigned long long)shared->disk_errors, (unsigned long long)shared->disk_slowest_ms,
		 (unsigned long long)shared->echo_bytes, (unsigned long long)shared->echo_errors,
		 (unsigned long long)shared->clock_errors, (unsigned long long)shared->slowest_tick_ms);
	say(line);
}

int main(int count, char **words)
{
	const struct timespec tick = {.tv_nsec = TICK_NS};
	uint64_t last[CLOCKS] = {0}, reported = now_ns(CLOCK_MONOTONIC);
	pid_t worker[3];
	int status, failed = 0;

	if (count != 4)
		return 2;
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	for (int i = 0; i < 3; i++) {
		worker[i] = fork();
		if (worker[i] == 0) {
			if (i == 0 && atoi(words[1]))
				check_memory((size_t)atoi(words[1]));
			else if (i == 1 && strcmp(words[2], "-"))
				check_disk(words[2]);
			else if (i == 2)
				echo(atoi(words[3]));
			_exit(0);
		}
		while (atoi(words[1]) && !shared->memory_ready) /* which takes its time where every page fault is emulated */
			nanosleep(&tick, NULL);
	}
	while (waitpid(worker[2], &status, WNOHANG) == 0) {
		look_at_clocks(last);
		nanosleep(&tick, NULL);
		if (now_ns(CLOCK_MONOTONIC) - reported >= 1000000000u) {
			reported += 1000000000u;
			report();
		}
	}
	failed |= status;
	shared->stop = 1;
	for (int i = 0; i < 2; i++) {
		waitpid(worker[i], &status, 0);
		failed |= status;
	}
	report();
	failed |= shared->memory_errors || shared->disk_errors || shared->echo_errors || shared->clock_errors;
	say(failed ? "load: FAILED\n" : "load: all is well\n");
	return failed != 0;
}
