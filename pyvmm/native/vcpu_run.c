/*
 * The run loop: KVM_RUN again and again, coming back only with what Python must see.
 *
 * A pending port or memory access is completed by the next KVM_RUN, so state may be read only after a
 * PV_EXIT_KICKED: there KVM_RUN has returned EINTR because of immediate_exit, after completing it.
 */

#include "core.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Known once a thread, not asked at every exit: on some hosts the system call costs 4 % of one. */
static __thread int32_t this_thread;

static int32_t thread_id(void)
{
	if (!this_thread)
		this_thread = (int32_t)syscall(SYS_gettid);
	return this_thread;
}

static void forget_thread(void)
{
	this_thread = 0;
}

/* The thread that forks goes on in the child with a copy of its variables and another ID. */
__attribute__((constructor)) static void watch_forks(void)
{
	pthread_atfork(NULL, NULL, forget_thread);
}

static int kick_signal(void)
{
	return SIGRTMIN + 4; /* glibc keeps the first two for itself; 4 stays clear of common picks */
}

static void ignore(int signal)
{
}

/*
 * The signal must have a handler (not SIG_IGN) and no SA_RESTART, or KVM_RUN would not return. Whoever started
 * this process may have blocked it; threads inherit the mask of the one that makes them.
 */
int pv_install_kick_signal(void)
{
	struct sigaction action = {.sa_handler = ignore};
	sigset_t kick;
	sigemptyset(&action.sa_mask);
	sigemptyset(&kick);
	sigaddset(&kick, kick_signal());
	if (sigaction(kick_signal(), &action, NULL))
		return -errno;
	return -pthread_sigmask(SIG_UNBLOCK, &kick, NULL);
}

struct pv_vcpu *pv_vcpu_new(struct pv_vm *vm, int fd, size_t run_size)
{
	struct pv_vcpu *vcpu = calloc(1, sizeof *vcpu);
	if (!vcpu)
		return NULL;
	vcpu->run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (vcpu->run == MAP_FAILED) {
		int error = errno;
		free(vcpu);
		errno = error;
		return NULL;
	}
	vcpu->vm = vm;
	vcpu->fd = fd;
	vcpu->run_size = run_size;
	if (!vm->ring && run_size >= (KVM_COALESCED_MMIO_PAGE_OFFSET + 1) * PV_PAGE)
		vm->ring = (void *)(vcpu->run + KVM_COALESCED_MMIO_PAGE_OFFSET * PV_PAGE);
	return vcpu;
}

void pv_vcpu_free(struct pv_vcpu *vcpu)
{
	if (!vcpu)
		return;
	if ((uint8_t *)vcpu->vm->ring >= vcpu->run && (uint8_t *)vcpu->vm->ring < vcpu->run + vcpu->run_size)
		vcpu->vm->ring = NULL;
	munmap(vcpu->run, vcpu->run_size);
	free(vcpu);
}

/* From any thread: make the vCPU return PV_EXIT_KICKED soon, also if it is just about to enter KVM_RUN. */
void pv_vcpu_kick(struct pv_vcpu *vcpu)
{
	__atomic_store_n(&pv_kvm_run(vcpu)->immediate_exit, 1, __ATOMIC_SEQ_CST);
	int32_t thread = atomic_load(&vcpu->thread_id);
	if (thread)
		syscall(SYS_tgkill, getpid(), thread, kick_signal());
}

void pv_vcpu_cancel_kick(struct pv_vcpu *vcpu)
{
	__atomic_store_n(&pv_kvm_run(vcpu)->immediate_exit, 0, __ATOMIC_SEQ_CST);
}

/*
 * Let others at the ring while the entry just handed out is dealt with. In the thread that got the entry, and
 * before it waits for anything: whoever wants the ring meanwhile waits with it.
 */
void pv_vcpu_release_ring(struct pv_vcpu *vcpu)
{
	if (!vcpu->holds_ring)
		return;
	vcpu->holds_ring = false;
	pv_vm_release_ring(vcpu->vm);
}

static void answer_read(struct pv_vcpu *vcpu)
{
	struct kvm_run *run = pv_kvm_run(vcpu);
	if (run->exit_reason == KVM_EXIT_IO)
		memcpy(vcpu->run + run->io.data_offset, &vcpu->exit.data, run->io.size);
	else if (run->exit_reason == KVM_EXIT_MMIO)
		memcpy(run->mmio.data, &vcpu->exit.data, sizeof run->mmio.data);
	else if (run->exit_reason == KVM_EXIT_X86_RDMSR || run->exit_reason == KVM_EXIT_X86_WRMSR) {
		run->msr.data = vcpu->exit.data;
		run->msr.error = (uint8_t)vcpu->exit.error;
	}
	vcpu->read_pending = false;
}

/* A port access. True: served here. False: *exit is filled for Python. */
static bool take_io(struct pv_vcpu *vcpu)
{
	struct kvm_run *run = pv_kvm_run(vcpu);
	struct pv_exit *exit = &vcpu->exit;
	uint8_t *bytes = vcpu->run + run->io.data_offset;

	if (run->io.size == 1 && run->io.count == 1) {
		if (run->io.direction == KVM_EXIT_IO_OUT) {
			if (pv_sink_byte(vcpu->vm, run->io.port, *bytes))
				return true;
		} else {
			uint16_t latch = atomic_load(&vcpu->vm->latch_of[run->io.port]);
			if (latch) {
				*bytes = (uint8_t)latch;
				return true;
			}
		}
	}
	exit->port = run->io.port;
	exit->size = run->io.size;
	exit->count = run->io.count;
	exit->is_write = run->io.direction == KVM_EXIT_IO_OUT;
	exit->bytes = bytes;
	exit->data = 0;
	if (exit->count == 1) {
		if (exit->is_write)
			memcpy(&exit->data, bytes, run->io.size);
		else
			vcpu->read_pending = true;
	}
	return false;
}

static void take_mmio(struct pv_vcpu *vcpu)
{
	struct kvm_run *run = pv_kvm_run(vcpu);
	struct pv_exit *exit = &vcpu->exit;

	exit->address = run->mmio.phys_addr;
	exit->size = (uint8_t)run->mmio.len;
	exit->count = 1;
	exit->is_write = run->mmio.is_write;
	exit->data = 0;
	if (exit->is_write)
		memcpy(&exit->data, run->mmio.data, run->mmio.len <= 8 ? run->mmio.len : 8);
	else
		vcpu->read_pending = true;
}

static void take_internal_error(struct pv_vcpu *vcpu)
{
	struct kvm_run *run = pv_kvm_run(vcpu);
	struct pv_exit *exit = &vcpu->exit;

	exit->suberror = run->emulation_failure.suberror;
	exit->insn_size = 0;
	/* The bytes are there only if KVM says so (flag, and enough words). */
	if (run->internal.suberror == KVM_INTERNAL_ERROR_EMULATION && run->emulation_failure.ndata >= 3 &&
	    (run->emulation_failure.flags & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES)) {
		exit->insn_size = run->emulation_failure.insn_size;
		if (exit->insn_size > sizeof exit->insn)
			exit->insn_size = sizeof exit->insn;
		memcpy(exit->insn, run->emulation_failure.insn_bytes, exit->insn_size);
	}
	for (int i = 0; i < 8; i++)
		exit->raw[i] = i < 16 && (uint32_t)i < run->internal.ndata ? run->internal.data[i] : 0;
}

/* Turn the exit KVM_RUN left into one for Python; 0: nothing left to do, run on. */
static int take_exit(struct pv_vcpu *vcpu)
{
	struct kvm_run *run = pv_kvm_run(vcpu);
	struct pv_exit *exit = &vcpu->exit;
	enum pv_handled handled;

	exit->reason = run->exit_reason;
	exit->error = 0;
	switch (run->exit_reason) {
	case KVM_EXIT_IO:
		return take_io(vcpu) ? 0 : PV_EXIT_IO;
	case KVM_EXIT_MMIO:
		take_mmio(vcpu);
		return PV_EXIT_MMIO;
	case KVM_EXIT_DEBUG:
		handled = pv_user_entry_debug_exit(vcpu);
		if (handled == PV_HANDLED)
			return 0;
		if (handled == PV_FAILED)
			return PV_EXIT_ERRNO;
		if (pv_debug_nothing_changed(vcpu, run->debug.arch.dr6))
			return 0;
		exit->address = run->debug.arch.pc;
		exit->raw[0] = run->debug.arch.exception;
		exit->raw[1] = run->debug.arch.dr6;
		exit->raw[2] = run->debug.arch.dr7;
		return PV_EXIT_DEBUG;
	case KVM_EXIT_X86_RDMSR:
	case KVM_EXIT_X86_WRMSR:
		handled = pv_user_entry_msr_exit(vcpu);
		if (handled == PV_HANDLED)
			return 0;
		if (handled == PV_FAILED)
			return PV_EXIT_ERRNO;
		exit->address = run->msr.index;
		exit->data = run->msr.data;
		exit->is_write = run->exit_reason == KVM_EXIT_X86_WRMSR;
		exit->error = 1; /* #GP unless Python answers */
		vcpu->read_pending = true;
		return PV_EXIT_MSR;
	case KVM_EXIT_INTERNAL_ERROR:
		take_internal_error(vcpu);
		return PV_EXIT_EMULATION;
	case KVM_EXIT_SHUTDOWN:
		return PV_EXIT_SHUTDOWN;
	case KVM_EXIT_HLT:
		return PV_EXIT_HLT;
	case KVM_EXIT_DIRTY_RING_FULL:
		return PV_EXIT_DIRTY_RING_FULL;
	case KVM_EXIT_INTR:
	case KVM_EXIT_IRQ_WINDOW_OPEN:
		return 0;
	default:
		memcpy(exit->raw, &run->hw, sizeof exit->raw);
		return PV_EXIT_OTHER;
	}
}

/* Whether an exit's instruction is complete only after the next KVM_RUN; KVM then does not report its step (5.15-6.18). */
static bool leaves_access(uint32_t reason)
{
	return reason == KVM_EXIT_IO || reason == KVM_EXIT_MMIO || reason == KVM_EXIT_X86_RDMSR ||
	       reason == KVM_EXIT_X86_WRMSR;
}

/* The access of the instruction stepped over is complete: report the step in KVM's stead. False: nothing to tell. */
static bool stepped_over_access(struct pv_vcpu *vcpu)
{
	struct pv_exit *exit = &vcpu->exit;

	vcpu->debug.finish_access = false;
	if (pv_debug_nothing_changed(vcpu, PV_DR6_STEP))
		return false;
	exit->reason = KVM_EXIT_DEBUG;
	exit->address = 0;
	exit->raw[0] = 1;
	exit->raw[1] = PV_DR6_STEP;
	return true;
}

/* Run until Python is needed; the answer is one of PV_EXIT_*. */
int pv_vcpu_run(struct pv_vcpu *vcpu)
{
	struct kvm_run *run = pv_kvm_run(vcpu);

	atomic_store(&vcpu->thread_id, thread_id());
	pv_vcpu_release_ring(vcpu);
	if (vcpu->read_pending)
		answer_read(vcpu);
	for (;;) {
		if (!vcpu->exit_pending) {
			if (vcpu->entry.stale && pv_user_entry_refresh(vcpu)) {
				vcpu->exit.error = errno;
				return PV_EXIT_ERRNO;
			}
			if (vcpu->debug.finish_access)
				run->immediate_exit = 1;
			if (ioctl(vcpu->fd, KVM_RUN, 0) < 0) {
				int error = errno;
				if (error == EAGAIN) /* an AP that waits for its SIPI */
					continue;
				if (error != EINTR) {
					vcpu->exit.error = error;
					vcpu->exit.reason = run->exit_reason;
					return PV_EXIT_ERRNO;
				}
				run->exit_reason = KVM_EXIT_INTR;
			}
			vcpu->exits++;
			vcpu->exit_pending = true;
			pv_user_entry_look(vcpu);
		}
		/* What the guest wrote before this exit comes before it. */
		int drained = pv_vm_drain_ring(vcpu->vm, &vcpu->exit);
		if (drained) {
			vcpu->holds_ring = true;
			return drained;
		}
		vcpu->exit_pending = false;
		if (run->exit_reason == KVM_EXIT_INTR) {
			pv_vcpu_cancel_kick(vcpu);
			/* Not "run on" where nothing changed: somebody else's kick may have been this one. */
			return vcpu->debug.finish_access && stepped_over_access(vcpu) ? PV_EXIT_DEBUG : PV_EXIT_KICKED;
		}
		if (pv_debug_stepping(vcpu))
			vcpu->debug.finish_access = leaves_access(run->exit_reason);
		int kind = take_exit(vcpu);
		if (kind)
			return kind;
		vcpu->native_exits++;
	}
}
