/* The kernel's side of the storm: answers as fast as it can, ends when the user program says so. */
#include <stdint.h>

#include "apic.h"
#include "calls.h"
#include "cpu.h"
#include "ending.h"
#include "idt.h"
#include "serial.h"
#include "segments.h"
#include "user_mode.h"

#define MSR_EFER 0xc0000080
#define MSR_STAR 0xc0000081
#define MSR_LSTAR 0xc0000082
#define MSR_FMASK 0xc0000084
#ifndef FMASK
#define FMASK 0x47700 /* AC, NT, IOPL, DF, IF, TF */
#endif

extern char user_start[], user_stack_top[];
extern void user_main(uint64_t syscall_entry_address);
extern char syscall_entry[];

static uint64_t serve(uint64_t number, uint64_t a, uint64_t b)
{
    if (number == CALL_EXIT)
        debug_exit((uint8_t)a);
    return number == CALL_FORGED ? 0 : a + b;
}

uint64_t on_syscall(uint64_t number, uint64_t a, uint64_t b, uint64_t from)
{
    (void)from;
    return serve(number, a, b);
}

static void on_int_call(struct interrupt_frame *frame)
{
    frame->rax = serve(frame->rax, frame->rdi, frame->rsi);
}

static void on_page_fault(struct interrupt_frame *frame)
{
    if ((frame->cs & 3) != RPL_USER)
        debug_exit(99);
    frame->rip = frame->rbx;
    frame->rax = 1;
}

void guest_main(void)
{
    serial_init();
    pic_mask_all();
    idt_init();
    idt_set(0x80, on_int_call, true);
    idt_set(VECTOR_PAGE_FAULT, on_page_fault, false);
    tss_load();
    allow_user((uint64_t)user_start, 0x200000);
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | 1 | 1 << 11);
    wrmsr(MSR_STAR, (uint64_t)KERNEL_CODE << 32 | (uint64_t)(USER_CODE32 | RPL_USER) << 48);
    wrmsr(MSR_FMASK, FMASK);
    wrmsr(MSR_LSTAR, (uint64_t)syscall_entry);
    enter_user_mode(user_main, (uint64_t)user_stack_top, (uint64_t)syscall_entry);
}
