/* ring3: the kernel's side of user mode.
 *
 * A kernel enters CPL 3 by pretending to return to it, and gets control back through doors that it
 * has set up before: SYSCALL, an INT gate, and the exceptions a user program causes. This guest opens
 * all three and prints who came through which, with what. user.c is the program that knocks.
 *
 * The status at the end is chosen by the user program and reaches pyvmm through the debug-exit port.
 */
#include <stdint.h>

#include "apic.h"
#include "calls.h"
#include "cpu.h"
#include "ending.h"
#include "idt.h"
#include "print.h"
#include "segments.h"
#include "serial.h"
#include "user_mode.h"

#define MSR_EFER 0xc0000080
#define MSR_STAR 0xc0000081
#define MSR_LSTAR 0xc0000082
#define MSR_FMASK 0xc0000084

#define EFER_SCE (1 << 0)  /* SYSCALL is #UD without it */
#define EFER_NXE (1 << 11) /* no-execute pages; it also makes "was a fetch" appear in #PF codes */

#define RFLAGS_TF (1 << 8)
#define RFLAGS_IF (1 << 9)
#define RFLAGS_DF (1 << 10)
#define RFLAGS_NT (1 << 14)
#define RFLAGS_AC (1 << 18)

#define USER_PAGE_SIZE 0x200000

extern char user_start[], user_stack_top[]; /* the linker script: one 2 MiB page */
extern void user_main(uint64_t syscall_entry_address);
extern char syscall_entry[]; /* syscall.S */

static bool in_user_page(uint64_t address)
{
    return address - (uint64_t)user_start < USER_PAGE_SIZE;
}

static uint64_t serve(uint64_t number, uint64_t a, uint64_t b)
{
    switch (number) {
    case CALL_ADD:
        return a + b;
    case CALL_EXIT:
        debug_exit((uint8_t)a);
    default:
        print("no such call: %lu\n", number);
        debug_exit(1);
    }
}

/* Called by syscall.S. `from` is the instruction after SYSCALL. */
uint64_t on_syscall(uint64_t number, uint64_t a, uint64_t b, uint64_t from)
{
    if (number == CALL_FORGED) {
        print("a jump was taken for a SYSCALL\n");
        debug_exit(2);
    }
    print("syscall from %s: number %lu, arguments 0x%lx 0x%lx\n",
          in_user_page(from) ? "user code" : "nowhere", number, a, b);
    return serve(number, a, b);
}

/* An interrupt gate saves more than SYSCALL: the frame says at which CPL the caller ran. */
static void on_int_call(struct interrupt_frame *frame)
{
    print("int 0x80 from CPL %lu: number %lu, arguments 0x%lx 0x%lx\n", frame->cs & 3, frame->rax,
          frame->rdi, frame->rsi);
    frame->rax = serve(frame->rax, frame->rdi, frame->rsi);
}

/* An agreement with user.c: where it expects a fault, it leaves the address to go on at in RBX, and
 * finds 1 in RAX afterwards. Real kernels call something like it a signal handler. */
static void recover(struct interrupt_frame *frame)
{
    if ((frame->cs & 3) != RPL_USER || !in_user_page(frame->rbx)) {
        print("not a fault of the user program: 0x%lx\n", frame->rip);
        debug_exit(3);
    }
    frame->rip = frame->rbx;
    frame->rax = 1;
}

static void on_general_protection(struct interrupt_frame *frame)
{
    /* The error code is 0, or names the table entry that was refused: bit 1 for the IDT, and from bit 3
     * on its number (SDM vol. 3A, "Error Code"). */
    print("general protection fault at CPL %lu, error code 0x%lx\n", frame->cs & 3,
          frame->error_code);
    recover(frame);
}

static void on_invalid_opcode(struct interrupt_frame *frame)
{
    print("invalid opcode at CPL %lu\n", frame->cs & 3);
    recover(frame);
}

static void on_page_fault(struct interrupt_frame *frame)
{
    /* Bits of the error code: SDM vol. 3A, "Interrupt 14—Page-Fault Exception (#PF)". */
    uint64_t code = frame->error_code;
    print("page fault at CPL %lu: %s of %s page, error code 0x%lx\n", frame->cs & 3,
          code & 0x10 ? "fetch" : code & 0x02 ? "write" : "read",
          code & 0x01 ? "a protected" : "an absent", code);
    recover(frame);
}

void guest_main(void)
{
    serial_init();
    pic_mask_all(); /* the user program runs with IF=1, and no one shall interrupt it */

    idt_init();
    idt_set(INT_CALL_VECTOR, on_int_call, true); /* DPL 3: INT from CPL 3 is #GP otherwise */
    idt_set(VECTOR_INVALID_OPCODE, on_invalid_opcode, false);
    idt_set(VECTOR_GENERAL_PROTECTION, on_general_protection, false);
    idt_set(VECTOR_PAGE_FAULT, on_page_fault, false);
    tss_load();
    allow_user((uint64_t)user_start, USER_PAGE_SIZE);

    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SCE | EFER_NXE);
    wrmsr(MSR_STAR, (uint64_t)KERNEL_CODE << 32 | (uint64_t)(USER_CODE32 | RPL_USER) << 48);
    /* IF: no interrupt while RSP is the user's. TF: no single-step trap in the kernel. DF: the C ABI.
     * NT: would confuse IRET. AC: would open a door in kernels that use SMAP. */
    wrmsr(MSR_FMASK, RFLAGS_TF | RFLAGS_IF | RFLAGS_DF | RFLAGS_NT | RFLAGS_AC);
    wrmsr(MSR_LSTAR, (uint64_t)syscall_entry);

    print("entering user mode\n");
    enter_user_mode(user_main, (uint64_t)user_stack_top, (uint64_t)syscall_entry);
}
