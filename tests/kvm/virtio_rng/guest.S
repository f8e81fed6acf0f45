# A driver for the entropy device, without interrupts of its own: it looks at the local APIC's request register.
# Prints: used length, InterruptStatus before and after the acknowledgement, 16 random bytes, and the device's status
# once its ring is broken (4.2, 2.7 and 5.4 of virtio 1.2).
	.code32
	.text
	.globl _start
	.balign 4
	.long	0x1badb002, 0, -0x1badb002	# Multiboot header
_start:
	mov	$0xff, %al		# the 8259s stay out of it
	out	%al, $0x21
	out	%al, $0xa1
	mov	$0xfee00000, %ebp
	movl	$0x1ff, 0xf0(%ebp)	# local APIC on
	mov	$0xfec00000, %ecx
	movl	$0x25, (%ecx)		# pin 10: destination APIC 0
	movl	$0, 0x10(%ecx)
	movl	$0x24, (%ecx)		# vector 0x50, fixed, edge, high, unmasked
	movl	$0x50, 0x10(%ecx)

	mov	$0xd0000000, %ebx
	cmpl	$0x74726976, (%ebx)
	jne	fail
	cmpl	$4, 0x08(%ebx)
	jne	fail
	movl	$1, 0x70(%ebx)		# ACKNOWLEDGE
	movl	$3, 0x70(%ebx)		# DRIVER
	movl	$1, 0x24(%ebx)		# features 32 to 63: VERSION_1
	movl	$1, 0x20(%ebx)
	movl	$11, 0x70(%ebx)		# FEATURES_OK
	cmpl	$11, 0x70(%ebx)
	jne	fail
	movl	$0, 0x30(%ebx)		# queue 0 with 8 entries
	movl	$8, 0x38(%ebx)
	movl	$table, 0x80(%ebx)
	movl	$available, 0x90(%ebx)
	movl	$used, 0xa0(%ebx)
	movl	$1, 0x44(%ebx)
	movl	$15, 0x70(%ebx)		# DRIVER_OK

	movw	$1, available+2
	movl	$0, 0x50(%ebx)		# the doorbell
1:	testl	$0x10000, 0x220(%ebp)	# vector 0x50 requested?
	jz	1b
	mov	used+8, %al
	out	%al, $0xe9
	mov	0x60(%ebx), %eax
	out	%al, $0xe9
	mov	%eax, 0x64(%ebx)
	mov	0x60(%ebx), %eax
	out	%al, $0xe9
	mov	$buffer, %esi
	mov	$16, %ecx
	mov	$0xe9, %edx
	rep outsb

	movw	$99, available+6	# a head that is not in the table
	movw	$2, available+2
	movl	$0, 0x50(%ebx)
2:	mov	0x70(%ebx), %eax
	test	$0x40, %al		# DEVICE_NEEDS_RESET
	jz	2b
	out	%al, $0xe9
	mov	$0x10, %al
	out	%al, $0xf4
fail:	mov	$0x7f, %al
	out	%al, $0xf4
	hlt

	.balign 16
table:	.long	buffer, 0		# one descriptor: 16 bytes, device-writable
	.long	16
	.word	2, 0
	.fill	7 * 16
available:
	.fill	6 + 8 * 2
	.balign 4
used:	.fill	6 + 8 * 8
	.balign 16
buffer:	.fill	16
