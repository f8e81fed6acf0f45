#define _GNU_SOURCE
#include "sandbox.h"

#include <dirent.h>
#include <errno.h>
#include <linux/capability.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef SYS_SECCOMP
#define SYS_SECCOMP 1
#endif

#define LAST_CAPABILITY 63
#define PATIENCE_MS 2000

static const char *syscall_names;
static size_t syscall_count;
static uint64_t kept;

static void append(char *line, size_t size, const char *text)
{
	strncat(line, text, size - strlen(line) - 1);
}

/* One line, if stderr takes it at once: a reader that has stopped must not keep the offender alive. */
static void report(int number)
{
	struct pollfd out = {.fd = STDERR_FILENO, .events = POLLOUT};
	char line[160] = "pyvmm: the sandbox refused the system call ", digits[12];
	int at = sizeof digits - 1;
	unsigned rest = number < 0 ? 0 : (unsigned)number;

	digits[at] = 0;
	do
		digits[--at] = '0' + rest % 10;
	while ((rest /= 10) && at);
	if (number >= 0 && (size_t)number < syscall_count && syscall_names[number * PV_SYSCALL_NAME])
		append(line, sizeof line, syscall_names + (size_t)number * PV_SYSCALL_NAME);
	else
		append(line, sizeof line, "number");
	append(line, sizeof line, " (");
	append(line, sizeof line, digits + at);
	append(line, sizeof line, ") and ends the process; --sandbox off runs without it\n");
	if (poll(&out, 1, 0) == 1 && (out.revents & POLLOUT) && write(STDERR_FILENO, line, strlen(line)) < 0)
		return;
}

/* Capabilities belong to threads, and only a thread itself can drop its own. */
static int drop_own(void)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[2];

	/* First the bounding set, while the thread still has CAP_SETPCAP. One that never had it cannot, and without exec
	 * it is no use to it. */
	for (int c = 0; c <= LAST_CAPABILITY; c++)
		if (!(kept >> c & 1) && prctl(PR_CAPBSET_DROP, c, 0, 0, 0))
			break;
	prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
	if (syscall(SYS_capget, &header, data))
		return -errno;
	for (int i = 0; i < 2; i++) {
		data[i].permitted &= (uint32_t)(kept >> 32 * i);
		data[i].effective = data[i].permitted;
		data[i].inheritable = 0;
	}
	return syscall(SYS_capset, &header, data) ? -errno : 0;
}

static void on_sigsys(int number, siginfo_t *info, void *context)
{
	int saved = errno;

	if (info->si_code == SYS_SECCOMP) {
		report(info->si_syscall);
		/* The default action now, so that nobody sees another end than the one that was meant. */
		signal(SIGSYS, SIG_DFL);
		syscall(SYS_tgkill, getpid(), (pid_t)syscall(SYS_gettid), SIGSYS);
	} else if (info->si_code == SI_TKILL && info->si_pid == getpid()) {
		drop_own();
	}
	errno = saved;
}

int pv_sandbox_watch(const char *names, size_t count)
{
	/* SA_NODEFER: the second SIGSYS must not wait for this one's end. */
	struct sigaction action = {.sa_sigaction = on_sigsys, .sa_flags = SA_SIGINFO | SA_RESTART | SA_NODEFER};

	syscall_names = names;
	syscall_count = count;
	return sigaction(SIGSYS, &action, NULL) ? -errno : 0;
}

/* Whether thread still holds more than it may; 0 also for one that has ended. */
static int holds_more(pid_t thread)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = thread};
	struct __user_cap_data_struct data[2];

	if (syscall(SYS_capget, &header, data))
		return errno == ESRCH ? 0 : -errno;
	for (int i = 0; i < 2; i++)
		if ((data[i].permitted | data[i].inheritable) & ~(uint32_t)(kept >> 32 * i))
			return 1;
	return 0;
}

/* Tell all threads that hold more than they may; how many there are, or -errno. */
static int tell_others(void)
{
	DIR *tasks = opendir("/proc/self/task");
	struct dirent *entry;
	int told = 0;

	if (!tasks)
		return -errno;
	while (told >= 0 && (entry = readdir(tasks))) {
		pid_t thread = (pid_t)atoi(entry->d_name);
		int more = thread > 0 ? holds_more(thread) : 0;

		if (more < 0)
			told = more;
		else if (more && !syscall(SYS_tgkill, getpid(), thread, SIGSYS))
			told++;
	}
	closedir(tasks);
	return told;
}

int pv_drop_capabilities(uint64_t keep)
{
	const struct timespec moment = {.tv_nsec = 1000000};
	int result, clean = 0;

	kept = keep;
	result = drop_own();
	/* Twice nobody: a thread that was being born during the first look is seen in the second. */
	for (int waited = 0; !result && waited < PATIENCE_MS; waited++) {
		int told = tell_others();

		if (told < 0)
			return told;
		clean = told ? 0 : clean + 1;
		if (clean == 2)
			return 0;
		if (told)
			nanosleep(&moment, NULL);
	}
	return result ? result : -ETIMEDOUT;
}
