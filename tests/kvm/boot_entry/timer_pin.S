# Which IOAPIC pin does the PIT's interrupt arrive at? Unmasks pins 0 and 2 with vectors 0x40 and 0x42 and
# prints, from the local APIC's request register, those that come (interrupts stay off).
	.code64
	.globl _start
_start:
	mov	$0xff, %al		# the 8259s stay out of it
	out	%al, $0x21
	out	%al, $0xa1
	mov	$0xfee00000, %ebx
	movl	$0x1ff, 0xf0(%rbx)	# local APIC on, spurious vector 0xff
	mov	$0xfec00000, %ecx
	movl	$0x11, (%rcx)		# pin 0: destination APIC 0
	movl	$0, 0x10(%rcx)
	movl	$0x10, (%rcx)		# vector 0x40, fixed, edge, high, unmasked
	movl	$0x40, 0x10(%rcx)
	movl	$0x15, (%rcx)		# pin 2
	movl	$0, 0x10(%rcx)
	movl	$0x14, (%rcx)
	movl	$0x42, 0x10(%rcx)
	mov	$0x34, %al		# channel 0, rate generator, 1.19 MHz / 0x1000: every 3.4 ms
	out	%al, $0x43
	xor	%al, %al
	out	%al, $0x40
	mov	$0x10, %al
	out	%al, $0x40
	mov	$1000000, %esi
1:	mov	0x220(%rbx), %eax	# IRR, vectors 0x40 to 0x5f
	test	%eax, %eax
	jnz	2f
	dec	%esi
	jnz	1b
2:	out	%al, $0xe9
	mov	$0x10, %al
	out	%al, $0xf4
