# Says what a 32-bit entry found (Multiboot, PVH, ELF32): registers, then what its info pointer leads to.
# -DMULTIBOOT: header, EBX = Multiboot information. -DPVH: note, EBX = hvm_start_info. Neither: ESI = boot_params.
	.code32
#ifdef PVH
	.section .note.pvh, "a", @note
	.long	4, 4, 18
	.asciz	"Xen"
	.long	_start
#endif
	.text
	.globl _start
#ifdef MULTIBOOT
	.balign 4
	.long	0x1badb002, 0, -0x1badb002
#endif
_start:
	mov	%eax, regs+0x00
	mov	%ebx, regs+0x04
	mov	%ecx, regs+0x08
	mov	%edx, regs+0x0c
	mov	%esi, regs+0x10
	mov	%edi, regs+0x14
	mov	%esp, regs+0x18
	mov	%ebp, regs+0x1c
	mov	$stack_top, %esp	# Multiboot promises no stack
	pushfl
	popl	regs+0x20
	mov	%cr0, %eax
	mov	%eax, regs+0x24
	mov	%cr4, %eax
	mov	%eax, regs+0x28
	mov	%cs, regs+0x2c
	mov	%ds, regs+0x2e
	mov	%ss, regs+0x30
	str	%ax
	mov	%ax, regs+0x32
	mov	%ebx, %ebp
	mov	%esi, %edi

	ljmp	$0x10, $1f
1:	mov	$0x18, %eax
	mov	%eax, %ds
	mov	%eax, %es
	mov	%eax, %ss

	mov	$0xe9, %edx
	mov	$regs, %esi
	mov	$0x34, %ecx
	rep outsb
#if defined(MULTIBOOT)
	mov	%ebp, %esi		# flags, mem_lower, mem_upper
	mov	$12, %ecx
	rep outsb
	lea	20(%ebp), %esi		# mods_count
	mov	$4, %ecx
	rep outsb
	mov	24(%ebp), %eax		# the first module
	mov	(%eax), %esi
	mov	4(%eax), %ecx
	sub	%esi, %ecx
	rep outsb
	mov	16(%ebp), %esi
#elif defined(PVH)
	mov	%ebp, %esi		# magic, version, flags, nr_modules
	mov	$16, %ecx
	rep outsb
	mov	32(%ebp), %esi		# rsdp
	mov	$8, %ecx
	rep outsb
	mov	16(%ebp), %eax		# the first module
	mov	(%eax), %esi
	mov	8(%eax), %ecx
	rep outsb
	mov	24(%ebp), %esi
#else
	mov	0x218(%edi), %esi
	mov	0x21c(%edi), %ecx
	rep outsb
	mov	0x228(%edi), %esi
#endif
2:	lodsb
	test	%al, %al
	jz	3f
	out	%al, %dx
	jmp	2b
3:	mov	$0x10, %al
	out	%al, $0xf4

	.data
	.balign 4
regs:	.fill	0x34, 1, 0xee
	.bss
	.balign 16
	.skip	64
stack_top:
