/* The user program: system calls without a pause, every answer checked, every register too. */
#include <stdint.h>

#include "calls.h"

static uint64_t by_syscall(uint64_t number, uint64_t a, uint64_t b)
{
    uint64_t result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b) : "rcx", "r11", "memory");
    return result;
}

static uint64_t by_int(uint64_t number, uint64_t a, uint64_t b)
{
    uint64_t result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "D"(a), "S"(b) : "memory");
    return result;
}

/* As SYSCALL would leave RCX and R11, but RCX points behind no SYSCALL: 1 if the fetch faulted. */
static uint64_t forge(uint64_t entry)
{
    uint64_t result = CALL_FORGED;
    __asm__ volatile("lea 1f(%%rip), %%rbx\n\tmov %%rbx, %%rcx\n\tpushfq\n\tpop %%r11\n\tjmp *%1\n1:"
                     : "+a"(result) : "r"(entry) : "rbx", "rcx", "r11", "memory");
    return result;
}

void user_main(uint64_t entry)
{
    for (uint64_t i = 0; i < ROUNDS; i++) {
        if (by_syscall(CALL_ADD, i, 7) != i + 7)
            by_syscall(CALL_EXIT, 1, 0);
        if (by_int(CALL_ADD, i, 9) != i + 9)
            by_syscall(CALL_EXIT, 2, 0);
        if (i % 100 == 0 && forge(entry) != 1)
            by_syscall(CALL_EXIT, 3, 0);
    }
    by_syscall(CALL_EXIT, STATUS_GOOD, 0);
    for (;;)
        ;
}
