/* What Python sees of core.h; the comments are there. */

#define PV_MAX_REGIONS ...
#define PV_SINKS ...
#define PV_SINK_SIZE ...

#define PV_EXIT_KICKED ...
#define PV_EXIT_IO ...
#define PV_EXIT_MMIO ...
#define PV_EXIT_DEBUG ...
#define PV_EXIT_EMULATION ...
#define PV_EXIT_MSR ...
#define PV_EXIT_SHUTDOWN ...
#define PV_EXIT_HLT ...
#define PV_EXIT_DIRTY_RING_FULL ...
#define PV_EXIT_ERRNO ...
#define PV_EXIT_OTHER ...

struct pv_exit {
	uint32_t reason;
	uint16_t port;
	uint8_t size;
	uint8_t is_write;
	uint32_t count;
	uint64_t address;
	uint64_t data;
	uint8_t *bytes;
	uint32_t suberror;
	uint8_t insn_size;
	uint8_t insn[15];
	int error;
	uint64_t raw[8];
	...;
};

#define PV_WATCHES ...
#define PV_NOWHERE ...
struct pv_watch { uint64_t gpa; uint8_t size; uint8_t old[8]; ...; };
struct pv_guest_debug {
	_Bool on, step, block_irq;
	uint8_t trap_vector;
	uint32_t inject;
	uint64_t trap_handler;
	uint64_t address[4];
	uint64_t dr7;
	struct pv_watch watches[...];
	...;
};

struct pv_vcpu {
	int fd;
	uint8_t *run;
	struct pv_exit exit;
	uint64_t exits;
	uint64_t native_exits;
	uint64_t syscalls;
	uint64_t faults;
	uint64_t interrupts;
	uint64_t hypercalls;
	int32_t thread_id;
	struct pv_guest_debug debug;
	...;
};

struct pv_vm { int sink_event; uint32_t sinks_pending; ...; };

long pv_ioctl(int fd, unsigned long request, void *argument);
long pv_ioctl_number(int fd, unsigned long request, unsigned long argument);

_Bool pv_compare_exchange(struct pv_vm *vm, uint64_t gpa, size_t size, void *old, const void *new);
int pv_punch_hole(int fd, uint64_t size);
struct pv_vm *pv_vm_new(void);
void pv_vm_free(struct pv_vm *vm);
int pv_vm_add_region(struct pv_vm *vm, uint64_t gpa, uint64_t size, uint64_t hva, uint64_t *dirty);
void pv_dirty_mark(uint64_t *bits, uint64_t first, uint64_t end);
void pv_dirty_merge(uint64_t *bits, const uint64_t *from, size_t words);
void pv_dirty_harvest(uint64_t *bits, uint64_t *into, size_t words);
int pv_vm_set_sink(struct pv_vm *vm, uint16_t port, int sink);
void pv_vm_set_latch(struct pv_vm *vm, uint16_t port, int value);
size_t pv_vm_take_sink(struct pv_vm *vm, int sink, uint8_t *buffer, size_t size);
int pv_vm_drain_ring(struct pv_vm *vm, struct pv_exit *entry);
void pv_vm_release_ring(struct pv_vm *vm);

struct pv_vcpu *pv_vcpu_new(struct pv_vm *vm, int fd, size_t run_size);
void pv_vcpu_free(struct pv_vcpu *vcpu);
int pv_vcpu_run(struct pv_vcpu *vcpu);
void pv_vcpu_release_ring(struct pv_vcpu *vcpu);
void pv_vcpu_kick(struct pv_vcpu *vcpu);
void pv_vcpu_cancel_kick(struct pv_vcpu *vcpu);
void pv_vcpu_enable_user_entry(struct pv_vcpu *vcpu, int syscall_on, int int_on);
int pv_vcpu_settle_user_entry(struct pv_vcpu *vcpu);
int pv_vcpu_set_debug(struct pv_vcpu *vcpu, const struct pv_guest_debug *wanted);
int pv_vcpu_step_past_trap(struct pv_vcpu *vcpu);
int pv_install_kick_signal(void);
int pv_translate(struct pv_vm *vm, uint64_t cr3, uint64_t cr4, uint64_t gva, uint64_t *gpa);
