# Says what a 64-bit entry found: registers first, then what RSI (boot_params) leads to.
# Everything goes to the debug console as raw bytes; test_boot_entry.py knows the order.
	.code64
	.globl _start
_start:
	mov	%rax, regs+0x00(%rip)
	mov	%rbx, regs+0x08(%rip)
	mov	%rcx, regs+0x10(%rip)
	mov	%rdx, regs+0x18(%rip)
	mov	%rsi, regs+0x20(%rip)
	mov	%rdi, regs+0x28(%rip)
	mov	%rsp, regs+0x30(%rip)
	mov	%rbp, regs+0x38(%rip)
	pushfq				# the stack it was given must be usable
	pop	regs+0x40(%rip)
	mov	%cr0, %rax
	mov	%rax, regs+0x48(%rip)
	mov	%cr3, %rax
	mov	%rax, regs+0x50(%rip)
	mov	%cr4, %rax
	mov	%rax, regs+0x58(%rip)
	mov	$0xc0000080, %ecx	# EFER
	rdmsr
	mov	%eax, regs+0x60(%rip)
	mov	%edx, regs+0x64(%rip)
	mov	%cs, regs+0x68(%rip)
	mov	%ds, regs+0x6a(%rip)
	mov	%ss, regs+0x6c(%rip)
	str	%ax
	mov	%ax, regs+0x6e(%rip)
	sgdt	regs+0x70(%rip)
	mov	$0xfee00020, %ebx	# local APIC ID: the identity map reaches to 4 GiB
	mov	(%rbx), %eax
	mov	%eax, regs+0x7c(%rip)
	mov	%rsi, %rbp

	# A far return and segment loads read the GDT that is in memory.
	push	$0x10
	lea	1f(%rip), %rax
	push	%rax
	lretq
1:	mov	$0x18, %eax
	mov	%eax, %ds
	mov	%eax, %es
	mov	%eax, %ss

	mov	$0xe9, %edx
	lea	regs(%rip), %rsi
	mov	$0x80, %ecx
	rep outsb
	lea	bss(%rip), %rsi		# cleared memory behind the file's part
	mov	$4, %ecx
	rep outsb
	movzwl	0x40e, %esi		# EBDA, by the BIOS data area: the MP floating pointer
	shl	$4, %esi
	mov	$4, %ecx
	rep outsb
	mov	0x70(%rbp), %rsi	# acpi_rsdp_addr
	mov	$8, %ecx
	rep outsb
	mov	0x218(%rbp), %esi	# ramdisk_image, ramdisk_size
	mov	0x21c(%rbp), %ecx
	rep outsb
	mov	0x228(%rbp), %esi	# cmd_line_ptr, to its NUL
2:	lodsb
	test	%al, %al
	jz	3f
	out	%al, %dx
	jmp	2b
3:	mov	$0x10, %al
	out	%al, $0xf4

	.data
	.balign 8
regs:	.fill	0x80, 1, 0xee
	.bss
bss:	.skip	16
