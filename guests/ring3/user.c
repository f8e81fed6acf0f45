/* ring3, the user program. It runs at CPL 3 and can reach nothing but its own 2 MiB page.
 *
 * It has no way to print: whatever appears on the serial port, the kernel printed because this
 * program came through one of its doors. What it sees for itself goes into its exit status.
 */
#include <stdint.h>

#include "calls.h"

#define STATUS_ALL_AS_EXPECTED 0x15
#define STATUS_SURPRISE 0x05

#define KERNEL_ADDRESS 0x100000 /* the first byte of the kernel's image */
#define RFLAGS_IF (1 << 9)

static uint64_t call_by_syscall(uint64_t number, uint64_t a, uint64_t b)
{
    uint64_t result;
    /* RCX and R11 are where SYSCALL saves RIP and RFLAGS, so their old contents are lost. */
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b)
                     : "rcx", "r11", "memory");
    return result;
}

static uint64_t call_by_int(uint64_t number, uint64_t a, uint64_t b)
{
    uint64_t result;
    __asm__ volatile("int %1" : "=a"(result) : "i"(INT_CALL_VECTOR), "a"(number), "D"(a), "S"(b)
                     : "memory");
    return result;
}

/* The rest do what user mode must not. Each leaves the way out in RBX; 1 means that a fault came and
 * the kernel sent us there. */
#define FAULTS(instruction)                                                                          \
    ({                                                                                               \
        uint64_t faulted = 0;                                                                        \
        __asm__ volatile("lea 1f(%%rip), %%rbx\n\t" instruction "\n1:"                               \
                         : "+a"(faulted) : : "rbx", "memory");                                       \
        faulted == 1;                                                                                \
    })

static uint64_t faults_on_kernel_memory(void)
{
    uint64_t faulted = 0;
    __asm__ volatile("lea 1f(%%rip), %%rbx; movb (%1), %%cl; 1:"
                     : "+a"(faulted) : "r"((uint64_t)KERNEL_ADDRESS) : "rbx", "rcx", "memory");
    return faulted;
}

/* Jump to the kernel's entry with everything as SYSCALL would leave it: RCX = return address, R11 =
 * flags, and try to clear IF as FMASK would (POPF at CPL 3 with IOPL 0 ignores the attempt without a
 * word: SDM vol. 2B, POPF). The page is the kernel's, so the fetch must fault. */
static uint64_t faults_on_forged_syscall(uint64_t entry)
{
    uint64_t result = CALL_FORGED;
    __asm__ volatile("lea 1f(%%rip), %%rbx\n\t"
                     "mov %%rbx, %%rcx\n\t"
                     "pushfq\n\t"
                     "pop %%r11\n\t"
                     "mov %%r11, %%rdx\n\t"
                     "and %2, %%rdx\n\t"
                     "push %%rdx\n\t"
                     "popfq\n\t"
                     "jmp *%1\n"
                     "1:"
                     : "+a"(result) : "r"(entry), "i"(~RFLAGS_IF)
                     : "rbx", "rcx", "rdx", "r11", "memory", "cc");
    return result;
}

static uint64_t flags(void)
{
    uint64_t value;
    __asm__ volatile("pushfq; pop %0" : "=r"(value) : : "memory");
    return value;
}

void user_main(uint64_t syscall_entry_address)
{
    unsigned surprises = 0;
    surprises += call_by_syscall(CALL_ADD, 0x11, 0x22) != 0x33;
    surprises += !(flags() & RFLAGS_IF); /* FMASK cleared it for the kernel, SYSRET restored it */
    surprises += call_by_int(CALL_ADD, 0x44, 0x55) != 0x99;

    surprises += !FAULTS("cli");      /* IOPL is 0: who runs at CPL 3 may not stop interrupts */
    surprises += !FAULTS("int $14");  /* its gate has DPL 0: nobody can fake a page fault */
    surprises += !FAULTS("ud2");      /* the instruction that is guaranteed not to be one */
    surprises += faults_on_kernel_memory() != 1;
    surprises += faults_on_forged_syscall(syscall_entry_address) != 1;

    /* The doors still work after someone has kicked them. */
    surprises += call_by_syscall(CALL_ADD, 0x1000, 0x234) != 0x1234;
    call_by_int(CALL_EXIT, surprises ? STATUS_SURPRISE : STATUS_ALL_AS_EXPECTED, 0);
    for (;;) /* CALL_EXIT does not return; to return from here would be to jump to address 0 */
        ;
}
