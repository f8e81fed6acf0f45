/*
 * The native core: what every exit and every output byte passes through.
 *
 * Policy (which port is a sink, whether the syscall work-around is on) is set from Python; nothing here
 * decides. Everything a guest controls is bounded before use.
 */
#ifndef PYVMM_CORE_H
#define PYVMM_CORE_H

#include "kvm_api.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#define PV_MAX_REGIONS 16
#define PV_SINKS 4
#define PV_SINK_SIZE 65536
#define PV_PORTS 65536
#define PV_PAGE 4096u

/* What pv_vcpu_run() returns: the exits that Python must see. */
enum {
	PV_EXIT_KICKED = 1,      /* KVM_RUN returned EINTR: I/O is completed, state may be read */
	PV_EXIT_IO,              /* port access: port, size, count, is_write, data (count 1) or bytes */
	PV_EXIT_MMIO,            /* memory access: address, size, is_write, data */
	PV_EXIT_DEBUG,
	PV_EXIT_EMULATION,       /* KVM's emulator gave up: suberror, insn, insn_size */
	PV_EXIT_MSR,             /* RDMSR/WRMSR handed to user space: address = index, data */
	PV_EXIT_SHUTDOWN,        /* triple fault */
	PV_EXIT_HLT,             /* only without an in-kernel irqchip */
	PV_EXIT_DIRTY_RING_FULL,
	PV_EXIT_ERRNO,           /* KVM_RUN failed: error */
	PV_EXIT_OTHER,           /* reason is KVM's exit_reason, raw its first words */
};

struct pv_exit {
	uint32_t reason;
	uint16_t port;
	uint8_t size;
	uint8_t is_write;
	uint32_t count;
	uint64_t address;
	uint64_t data;           /* value written, or the answer to a read, for count == 1 */
	uint8_t *bytes;          /* size * count bytes inside the kvm_run page, for count > 1 */
	uint32_t suberror;
	uint8_t insn_size;
	uint8_t insn[15];
	int error;
	uint64_t raw[8];
};

struct pv_region {
	uint64_t gpa, size;
	uint8_t *hva;
	uint64_t *dirty;         /* what the host writes is marked here: KVM's log does not see it */
};

struct pv_sink {
	uint32_t used;
	uint8_t bytes[PV_SINK_SIZE];
};

struct pv_vm {
	/* Guest RAM. Fixed before the first vCPU runs, so it is read without a lock. */
	uint32_t region_count;
	struct pv_region regions[PV_MAX_REGIONS];

	/* Port hints (see devices/device.py: PortHint). Single bytes and words, changed while vCPUs run. */
	_Atomic uint8_t sink_of[PV_PORTS];    /* 0: none, else sink number + 1 */
	_Atomic uint16_t latch_of[PV_PORTS];  /* 0: none, else 0x100 | value */

	/* Bytes collected by sinks; sink_event is written when the first byte arrives. */
	pthread_mutex_t sink_lock;
	struct pv_sink sinks[PV_SINKS];
	_Atomic uint32_t sinks_pending;
	int sink_event;

	/*
	 * KVM's ring of coalesced writes: one per VM, mapped behind every vCPU's kvm_run. Whoever takes an
	 * entry holds the lock until the entry is carried out, also across a return to Python: entries must
	 * not overtake each other, nor the exit they were drained for.
	 */
	pthread_mutex_t ring_lock;
	struct kvm_coalesced_mmio_ring *ring;
};

/* State of the work-arounds for entering CPL 0 on one vCPU (user_entry.c). */
struct pv_user_entry {
	bool syscall_on;         /* SYSCALL arrives as a #PF */
	bool int_on;             /* INT n arrives as a #UD */
	bool stepping;           /* one instruction runs with the breakpoints off */
	bool rearm;              /* breakpoints are to be set even if they did not move */
	bool stale;              /* look at LSTAR, FMASK and the IDT again before the next entry */
	uint64_t lstar, fmask;
	uint64_t idt_base;
	uint64_t pf_handler;     /* address a breakpoint is on, 0: none */
	uint64_t ud_handler;
};

/* What a debugger wants of one vCPU (guest_debug.c). All zero while none is attached. */
#define PV_WATCHES 4
#define PV_DR6_STEP (1ull << 14)
#define PV_NOWHERE (~0ull)
struct pv_watch {
	uint64_t gpa;
	uint8_t size;            /* at most 8; 0: unused */
	uint8_t old[8];          /* what was there when the vCPU was last let go */
};

struct pv_guest_debug {
	bool on;
	bool step;               /* come back after one instruction */
	bool block_irq;          /* and take no interrupt meanwhile */
	bool finish_access;      /* the instruction stepped over waits for KVM_RUN to complete its access */
	uint8_t trap_vector;     /* a handler of the guest's at which to stop, see user_entry.c; 0: none */
	uint32_t inject;         /* KVM_GUESTDBG_INJECT_*, for the next KVM_RUN */
	uint16_t user_cs, user_ss; /* a step's that began at CPL 3, else 0 */
	uint64_t trap_handler;   /* where that is: real mode's may be at 0 */
	uint64_t address[4];     /* breakpoint registers, enabled in dr7 */
	uint64_t dr7;
	struct pv_watch watches[PV_WATCHES]; /* looked at after each instruction */
};

struct pv_vcpu {
	struct pv_vm *vm;
	int fd;
	uint8_t *run;            /* struct kvm_run, mapped */
	size_t run_size;
	bool exit_pending;       /* KVM_RUN returned an exit that is not handed out yet */
	bool read_pending;       /* Python owes the answer to a read of one value */
	bool holds_ring;
	_Atomic int32_t thread_id;
	struct pv_exit exit;
	uint64_t exits;          /* returns of KVM_RUN */
	uint64_t native_exits;   /* of these, served without Python */
	uint64_t syscalls;       /* SYSCALLs completed by the work-around (user_entry.c) */
	uint64_t faults;         /* real faults that hit its breakpoints */
	uint64_t interrupts;     /* INT n completed by it */
	uint64_t hypercalls;     /* VMCALLs answered by it */
	struct pv_user_entry entry;
	struct pv_guest_debug debug;
};

/* kvm_ioctl.c */
long pv_ioctl(int fd, unsigned long request, void *argument);
long pv_ioctl_number(int fd, unsigned long request, unsigned long argument);

/* dirty_bitmap.c */
void pv_dirty_mark(uint64_t *bits, uint64_t first, uint64_t end);
void pv_dirty_merge(uint64_t *bits, const uint64_t *from, size_t words);
void pv_dirty_harvest(uint64_t *bits, uint64_t *into, size_t words);

/* guest_memory.c */
int pv_punch_hole(int fd, uint64_t size);
const uint8_t *pv_gpa(struct pv_vm *vm, uint64_t gpa, uint64_t size);
bool pv_write_physical(struct pv_vm *vm, uint64_t gpa, const void *from, size_t n);
bool pv_compare_exchange(struct pv_vm *vm, uint64_t gpa, size_t size, void *old, const void *new);
int pv_translate(struct pv_vm *vm, uint64_t cr3, uint64_t cr4, uint64_t gva, uint64_t *gpa);
bool pv_read_virtual(struct pv_vm *vm, uint64_t cr3, uint64_t cr4, uint64_t gva, void *to, size_t n);

/* coalesced_ring.c */
bool pv_sink_byte(struct pv_vm *vm, uint16_t port, uint8_t byte);
int pv_vm_drain_ring(struct pv_vm *vm, struct pv_exit *entry);
void pv_vm_release_ring(struct pv_vm *vm);
struct pv_vm *pv_vm_new(void);
void pv_vm_free(struct pv_vm *vm);
int pv_vm_add_region(struct pv_vm *vm, uint64_t gpa, uint64_t size, uint64_t hva, uint64_t *dirty);
int pv_vm_set_sink(struct pv_vm *vm, uint16_t port, int sink);
void pv_vm_set_latch(struct pv_vm *vm, uint16_t port, int value);
size_t pv_vm_take_sink(struct pv_vm *vm, int sink, uint8_t *buffer, size_t size);

/* vcpu_run.c */
struct pv_vcpu *pv_vcpu_new(struct pv_vm *vm, int fd, size_t run_size);
void pv_vcpu_free(struct pv_vcpu *vcpu);
int pv_vcpu_run(struct pv_vcpu *vcpu);
void pv_vcpu_release_ring(struct pv_vcpu *vcpu);
void pv_vcpu_kick(struct pv_vcpu *vcpu);
void pv_vcpu_cancel_kick(struct pv_vcpu *vcpu);
int pv_install_kick_signal(void);

/* user_entry.c */
enum pv_handled { PV_NOT_MINE, PV_HANDLED, PV_FAILED };
void pv_vcpu_enable_user_entry(struct pv_vcpu *vcpu, int syscall_on, int int_on);
int pv_vcpu_settle_user_entry(struct pv_vcpu *vcpu);
enum pv_handled pv_user_entry_debug_exit(struct pv_vcpu *vcpu);
enum pv_handled pv_user_entry_msr_exit(struct pv_vcpu *vcpu);
int pv_user_entry_refresh(struct pv_vcpu *vcpu);
void pv_user_entry_look(struct pv_vcpu *vcpu);

/* guest_debug.c */
int pv_vcpu_set_debug(struct pv_vcpu *vcpu, const struct pv_guest_debug *wanted);
int pv_vcpu_step_past_trap(struct pv_vcpu *vcpu);
int pv_debug_arm(struct pv_vcpu *vcpu);
bool pv_debug_stepping(const struct pv_vcpu *vcpu);
bool pv_debug_breakpoint_at(const struct pv_vcpu *vcpu, uint64_t pc);
bool pv_debug_nothing_changed(struct pv_vcpu *vcpu, uint64_t dr6);

static inline struct kvm_run *pv_kvm_run(struct pv_vcpu *vcpu)
{
	return (struct kvm_run *)vcpu->run;
}

#endif
