/* hello: the least a guest can be.
 *
 * 16-bit real mode, one sector, no firmware: the state every x86 CPU since 1978 wakes up in.
 * There is no BIOS in this machine, so INT 10h ("print a character") leads nowhere; the only way
 * to be heard is a device. The serial port takes bytes at I/O port 0x3f8.
 *
 * What to watch: every IN and OUT is a place where the guest stops and a VMM takes over; all of a
 * machine that is not CPU and memory is made of such stops. Run it with `--report FILE` and compare
 * the number of exits with the number of bytes printed: KVM can collect OUTs to a port that needs no
 * answer, but an IN wants one at once.
 */
#define SERIAL_DATA 0x3f8
#define SERIAL_LINE_STATUS 0x3fd
#define TRANSMITTER_EMPTY 0x20

    .code16
    .text
    .global _start
_start:
    /* Interrupts off first: the interrupt vector table at address 0 is empty here, and a timer tick
     * through an empty vector would run whatever lies at 0000:0000. */
    cli

    /* The address of this code is 0x7c00, but 0000:7c00 and 07c0:0000 are the same address
     * (segment * 16 + offset: SDM vol. 3B, "8086 Emulation": "Address Translation"). A BIOS may
     * use either. The linker assumed 0000, and a far jump settles it. */
    ljmp $0, $settled
settled:
    /* Data and stack segments hold whatever the loader left. All 0: offset = physical address. */
    xor %ax, %ax
    mov %ax, %ds
    mov %ax, %ss
    mov $0x7c00, %sp            /* grows down, away from the code. SS and SP go together: the CPU
                                   holds interrupts back for one instruction after a load of SS */
    cld                         /* LODSB shall count upwards */

    mov $greeting, %si
    call print

    /* One thing that only real mode has: addresses built from two 16-bit halves. The same byte,
     * by another name: 0x7c0 * 16 + (greeting - 0x7c00). */
    mov $0x07c0, %ax
    mov %ax, %es
    mov $greeting - 0x7c00, %di
    mov $same, %si
    mov %es:(%di), %al
    cmp greeting, %al
    je 1f
    mov $different, %si
1:  call print

    /* The end. HLT waits for an interrupt; with IF=0 none can come, so this CPU will never do
     * anything again. A VMM that sees all CPUs like that may call it a clean end. */
end:
    cli
    hlt
    jmp end                     /* an NMI wakes even this */

/* Print the string at DS:SI, which ends with a zero byte. */
print:
    lodsb                       /* AL = *SI++ */
    test %al, %al
    jz 2f
    mov %al, %ah
    mov $SERIAL_LINE_STATUS, %dx
1:  in %dx, %al                 /* is there room? On real hardware a byte takes 87 us to leave */
    test $TRANSMITTER_EMPTY, %al
    jz 1b
    mov %ah, %al
    mov $SERIAL_DATA, %dx
    out %al, %dx
    jmp print
2:  ret

greeting:
    .asciz "Hello from 16-bit real mode.\r\n"
same:
    .asciz "07c0:offset and 0000:7c00+offset are the same byte.\r\n"
different:
    .asciz "segments do not add up\r\n"
