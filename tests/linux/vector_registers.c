/* Two processes keep different values in vector registers over system calls that switch between them. The kernel must
 * save the registers as wide as user code uses them; one that saves only XMM loses the upper halves of YMM.
 *
 * Prints "no AVX", or "kept", or which half of whose register was lost; exits with 0 only if all were kept.
 */

#include <cpuid.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define SWITCHES 200

/* Loads YMM5, calls sched_yield, stores YMM5, all in one piece of assembly: the compiler's code uses no vectors here. */
static void over_a_yield(const unsigned char *before, unsigned char *after)
{
	long number = SYS_sched_yield;

	__asm__ volatile("vmovdqu (%1), %%ymm5\n\t"
			 "syscall\n\t"
			 "vmovdqu %%ymm5, (%2)\n\t"
			 "vzeroupper"
			 : "+a"(number)
			 : "r"(before), "r"(after)
			 : "rcx", "r11", "xmm5", "memory");
}

static int lost_halves(unsigned char pattern)
{
	unsigned char before[32], after[32];
	int lost = 0;

	memset(before, pattern, sizeof(before));
	for (int i = 0; i < SWITCHES; i++) {
		over_a_yield(before, after);
		lost |= (memcmp(before, after, 16) != 0) | (memcmp(before + 16, after + 16, 16) != 0) << 1;
	}
	return lost;
}

int main(void)
{
	unsigned int a, b, c, d;
	int mine, status = 0;
	pid_t child;

	__cpuid(1, a, b, c, d);
	if (!(c & bit_AVX) || !(c & bit_OSXSAVE)) {
		puts("no AVX");
		return 0;
	}
	child = fork();
	if (child == 0)
		_exit(lost_halves(0xee));
	mine = lost_halves(0x11);
	waitpid(child, &status, 0);
	if (mine || status)
		printf("lost: parent %d, child %d (1: lower half, 2: upper half)\n", mine, WEXITSTATUS(status));
	else
		puts("kept");
	return mine || status;
}
