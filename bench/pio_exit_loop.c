/*
 * The yardstick of pio_exit.py: the least a VMM can do. One vCPU in real mode with KVM's interrupt controllers
 * and timer, as pyvmm sets them up, and a loop around KVM_RUN that reads the exit, counts, and answers.
 *
 *     pio_exit_loop IMAGE CPU [coalesce]
 *
 * IMAGE is loaded at 0x7c00 and run on host CPU number CPU. Ports: 0x300 (16 bits) takes marks: 0x4000 waits for a
 * byte on standard input, 0 begins what is timed, 0x8000 ends it and prints "exits wall_ns thread_cpu_ns"; 0xf4
 * ends the program; all others count.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define MEMORY (1ul << 20)
#define ENTRY 0x7c00
#define PORT_MARK 0x300
#define PORT_END 0xf4
#define PORT_SERIAL 0x3f8
#define MARK_TURN 0x4000
#define MARK_END 0x8000

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static long must(long result, const char *what)
{
	if (result < 0)
		die(what);
	return result;
}

static uint64_t now(clockid_t clock)
{
	struct timespec t;
	clock_gettime(clock, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void load(const char *path, uint8_t *memory)
{
	int fd = (int)must(open(path, O_RDONLY | O_CLOEXEC), path);
	must(read(fd, memory + ENTRY, MEMORY - ENTRY), path);
	close(fd);
}

static uint8_t collected[65536];

int main(int argc, char **argv)
{
	if (argc < 3)
		return 2;
	cpu_set_t cpu;
	CPU_ZERO(&cpu);
	CPU_SET(atoi(argv[2]), &cpu);
	must(sched_setaffinity(0, sizeof cpu, &cpu), "sched_setaffinity");
	int kvm = (int)must(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	int vm = (int)must(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	uint64_t identity_map = 0xfeffc000;
	must(ioctl(vm, KVM_SET_IDENTITY_MAP_ADDR, &identity_map), "KVM_SET_IDENTITY_MAP_ADDR");
	must(ioctl(vm, KVM_SET_TSS_ADDR, 0xfeffd000), "KVM_SET_TSS_ADDR");
	must(ioctl(vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
	struct kvm_pit_config pit = {.flags = KVM_PIT_SPEAKER_DUMMY};
	must(ioctl(vm, KVM_CREATE_PIT2, &pit), "KVM_CREATE_PIT2");
	if (argc > 3) {
		struct kvm_coalesced_mmio_zone zone = {.addr = PORT_SERIAL, .size = 1, .pio = 1};
		must(ioctl(vm, KVM_REGISTER_COALESCED_MMIO, &zone), "KVM_REGISTER_COALESCED_MMIO");
	}

	uint8_t *memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		die("mmap");
	load(argv[1], memory);
	struct kvm_userspace_memory_region region = {
		.memory_size = MEMORY, .userspace_addr = (uint64_t)(uintptr_t)memory};
	must(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");

	int vcpu = (int)must(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
	size_t run_size = (size_t)must(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
	struct kvm_run *run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED)
		die("mmap(kvm_run)");
	struct kvm_coalesced_mmio_ring *ring = (void *)((uint8_t *)run + KVM_COALESCED_MMIO_PAGE_OFFSET * 4096);
	const uint32_t entries = (4096 - sizeof *ring) / sizeof *ring->coalesced_mmio;
	struct kvm_sregs sregs;
	must(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	must(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	struct kvm_regs regs = {.rip = ENTRY, .rsp = ENTRY, .rflags = 2};
	must(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");

	uint64_t count = 0, exits = 0, exits_before = 0, wall = 0, thread = 0;
	uint32_t used = 0;
	for (;;) {
		if (ioctl(vcpu, KVM_RUN, 0) < 0) {
			if (errno == EINTR || errno == EAGAIN)
				continue;
			die("KVM_RUN");
		}
		exits++;
		if (argc > 3) {
			while (ring->first != __atomic_load_n(&ring->last, __ATOMIC_ACQUIRE)) {
				collected[used++ % sizeof collected] = ring->coalesced_mmio[ring->first].data[0];
				__atomic_store_n(&ring->first, (ring->first + 1) % entries, __ATOMIC_RELEASE);
			}
		}
		if (run->exit_reason != KVM_EXIT_IO) {
			fprintf(stderr, "exit reason %u\n", run->exit_reason);
			return 1;
		}
		uint8_t *data = (uint8_t *)run + run->io.data_offset;
		if (run->io.port == PORT_MARK) {
			uint16_t mark;
			memcpy(&mark, data, sizeof mark);
			if (mark == MARK_TURN) {
				char turn;
				if (read(0, &turn, 1) != 1)
					return 1;
			} else if (mark == MARK_END) {
				wall = now(CLOCK_MONOTONIC) - wall;
				thread = now(CLOCK_THREAD_CPUTIME_ID) - thread;
				printf("%llu %llu %llu\n", (unsigned long long)(exits - exits_before),
				       (unsigned long long)wall, (unsigned long long)thread);
				fflush(stdout);
			} else {
				exits_before = exits;
				wall = now(CLOCK_MONOTONIC);
				thread = now(CLOCK_THREAD_CPUTIME_ID);
			}
		} else if (run->io.port == PORT_END) {
			break;
		} else if (run->io.direction == KVM_EXIT_IO_IN) {
			*data = (uint8_t)++count;
		} else {
			collected[used++ % sizeof collected] = *data;
		}
	}
	return 0;
}
