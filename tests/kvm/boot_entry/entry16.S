# Says what a flat real-mode image found: registers and segments, and that its stack works.
	.code16
	.globl _start
_start:
	push	%cs			# 14 words; the stack it was given must be usable
	push	%ds
	push	%es
	push	%ss
	pushf
	push	%ax
	push	%bx
	push	%cx
	push	%dx
	push	%si
	push	%di
	push	%bp
	call	1f
1:	smsw	%ax			# the return address is where we run
	push	%ax
	mov	%sp, %si
	mov	$28, %cx
	mov	$0xe9, %dx
	rep outsb %ss:(%si), %dx
	mov	%si, %ax		# SP as it was at entry
	out	%al, %dx
	mov	%ah, %al
	out	%al, %dx
	mov	$0x10, %al
	out	%al, $0xf4
