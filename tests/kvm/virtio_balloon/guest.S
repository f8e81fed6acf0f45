# A driver for the balloon: writes to 64 pages, then gives as many of them as the host wants, and reads one again.
# Prints: the target, and 1 if the page reads as zeros; then waits for the target to change and gives the exit code
# (5.5 of virtio 1.2; without interrupts: it looks at the used ring and at the configuration).
	.code32
	.text
	.globl _start
	.balign 4
	.long	0x1badb002, 0, -0x1badb002	# Multiboot header
_start:
	mov	$0x400000, %edi		# pages from 4 MiB on get a word each
	mov	$64, %ecx
1:	movl	$0x11111111, (%edi)
	add	$0x1000, %edi
	loop	1b

	mov	$0xd0000000, %ebx
	cmpl	$0x74726976, (%ebx)
	jne	fail
	cmpl	$5, 0x08(%ebx)
	jne	fail
	movl	$1, 0x70(%ebx)		# ACKNOWLEDGE
	movl	$3, 0x70(%ebx)		# DRIVER
	movl	$1, 0x24(%ebx)		# features 32 to 63: VERSION_1
	movl	$1, 0x20(%ebx)
	movl	$11, 0x70(%ebx)		# FEATURES_OK
	cmpl	$11, 0x70(%ebx)
	jne	fail
	movl	$0, 0x30(%ebx)		# the inflate queue with 8 entries
	movl	$8, 0x38(%ebx)
	movl	$table, 0x80(%ebx)
	movl	$available, 0x90(%ebx)
	movl	$used, 0xa0(%ebx)
	movl	$1, 0x44(%ebx)
	movl	$15, 0x70(%ebx)		# DRIVER_OK

	mov	0x100(%ebx), %ecx	# num_pages
	mov	%cl, %al
	out	%al, $0xe9
	lea	(, %ecx, 4), %eax	# bytes of the list
	mov	%eax, table+8
	mov	$list, %edi
	mov	$0x400, %eax		# page numbers from 4 MiB on
2:	mov	%eax, (%edi)
	inc	%eax
	add	$4, %edi
	loop	2b
	movw	$1, available+2
	movl	$0, 0x50(%ebx)		# the doorbell
3:	cmpw	$1, used+2
	jne	3b
	mov	0x100(%ebx), %eax
	mov	%eax, 0x104(%ebx)	# actual

4:	cmpl	$0, 0x100(%ebx)		# the host wants them back, having looked
	jne	4b
	cmpl	$1, 0xfc(%ebx)		# in a new generation
	jne	fail
	xor	%eax, %eax
	cmpl	$0, 0x403000
	sete	%al
	out	%al, $0xe9
	cmpl	$0x11111111, 0x43f000	# the last page was not given
	jne	fail
	movl	$0, 0x104(%ebx)
	mov	$0x10, %al
	out	%al, $0xf4
fail:	mov	$0x7f, %al
	out	%al, $0xf4
	hlt

	.balign 16
table:	.long	list, 0			# one descriptor, device-readable
	.long	0
	.word	0, 0
	.fill	7 * 16
available:
	.fill	6 + 8 * 2
	.balign 4
used:	.fill	6 + 8 * 8
	.balign 16
list:	.fill	64 * 4
