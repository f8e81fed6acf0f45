/* init: the first program of the tiny Linux.
 *
 * Mounts what every program expects, then either
 *   - runs the command that the kernel command line carries as pyvmm.exec=BASE64 and ends the machine with its exit
 *     status, by writing that byte to pyvmm's debug-exit port;
 *   - asks pyvmm's task port what to do, if the kernel command line says pyvmm.wait: a machine that waits there can be
 *     saved once and started from there many times, each time with another command; or
 *   - keeps a shell on the serial line, and does what `poweroff`, `halt` and `reboot` ask for.
 *
 * It is a C program without a C library because it is the first thing that runs, and where the guest kernel is emulated
 * everything it does not do is saved: a shell script doing the same would start a process for each mount (0.2 s each
 * there), a program linked with glibc would first have its 800 KiB copied into the root file system.
 */

#include <asm/ioctls.h>
#include <asm/signal.h>
#include <asm/termbits.h>
#include <asm/unistd.h>
#include <linux/fcntl.h>
#include <linux/mount.h>
#include <linux/random.h>
#include <linux/reboot.h>

#define DEBUG_EXIT_PORT 0xf4
#define COMMAND_LINE_MAX 4096
#define W_OK 2
#define EXEC_ARGUMENT "pyvmm.exec="
#define WAIT_ARGUMENT "pyvmm.wait"
#define TASK_PORT 0x580
#define TASK_PORTS 64
#define SCRIPT_MAX 65536
#define SCRIPT_FD 9
#define STATUS_FD 8 /* as exec_script in pyvmm/cli/exec_console.py has it */

/* ---- system calls: number in RAX, arguments in RDI RSI RDX R10 R8; RCX and R11 are lost ---- */

static long call(long number, long a, long b, long c, long d, long e)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "0"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
			 : "rcx", "r11", "memory");
	return result;
}

#define P(pointer) ((long)(pointer))

static unsigned long length(const char *text)
{
	unsigned long n = 0;

	while (text[n])
		n++;
	return n;
}

static void say(const char *text)
{
	call(__NR_write, 1, P(text), length(text), 0, 0);
}

static void mount(const char *type, const char *where, const char *options)
{
	call(__NR_mount, P(type), P(where), P(type), MS_NOSUID, P(options));
}

static void sleep_nanoseconds(long nanoseconds)
{
	long time[2] = { nanoseconds / 1000000000, nanoseconds % 1000000000 };

	call(__NR_nanosleep, P(time), 0, 0, 0, 0);
}

/* ---- pyvmm.exec=BASE64 ---- */

static int digit(char c)
{
	if (c >= 'A' && c <= 'Z')
		return c - 'A';
	if (c >= 'a' && c <= 'z')
		return c - 'a' + 26;
	if (c >= '0' && c <= '9')
		return c - '0' + 52;
	return c == '+' ? 62 : c == '/' ? 63 : -1;
}

/* Decodes `text` up to the first character that is no digit, in place (the result is shorter than its code). */
static void decode_base64(char *text)
{
	unsigned int bits = 0, have = 0;
	char *out = text;
	int value;

	for (; (value = digit(*text)) >= 0; text++) {
		bits = bits << 6 | value;
		have += 6;
		if (have >= 8) {
			have -= 8;
			*out++ = bits >> have;
		}
	}
	*out = 0;
}

/* What follows `name` where a word of the command line starts with it, not terminated; 0 without one. */
static char *find_word(char *line, const char *name)
{
	unsigned long n = length(name), i;

	for (; *line; line++) {
		for (i = 0; i < n && line[i] == name[i]; i++)
			;
		if (i == n)
			return line + n;
		while (*line && *line != ' ')
			line++;
		if (!*line)
			break;
	}
	return 0;
}

static char *read_command_line(void)
{
	static char line[COMMAND_LINE_MAX];
	long file = call(__NR_open, P("/proc/cmdline"), O_RDONLY, 0, 0, 0);
	long got = call(__NR_read, file, P(line), sizeof(line) - 1, 0, 0);

	call(__NR_close, file, 0, 0, 0, 0);
	line[got > 0 ? got : 0] = 0;
	return line;
}

/* ---- the task port: pyvmm/devices/task_port.py, pyvmm/cli/fast_linux.py ---- */

struct task {
	unsigned int size; /* of all that follows */
	unsigned long time_ns;
	unsigned char seed[32];
	char script[SCRIPT_MAX + 1];
} __attribute__((packed));

static void read_ports(long port, void *to, unsigned long size)
{
	char *at = to;

	while (size) {
		unsigned long piece = size < TASK_PORTS ? size : TASK_PORTS;

		if (call(__NR_pread64, port, P(at), piece, TASK_PORT, 0) != (long)piece)
			return;
		at += piece;
		size -= piece;
	}
}

/* Who starts from the same saved machine has the same clock and the same random numbers to come. */
static void become_unique(struct task *task)
{
	long now[2] = { task->time_ns / 1000000000, task->time_ns % 1000000000 };
	long random = call(__NR_open, P("/dev/urandom"), O_WRONLY, 0, 0, 0);

	call(__NR_clock_settime, 0 /* CLOCK_REALTIME */, P(now), 0, 0, 0);
	call(__NR_write, random, P(task->seed), sizeof(task->seed), 0, 0);
	call(__NR_ioctl, random, RNDRESEEDCRNG, 0, 0, 0);
	call(__NR_close, random, 0, 0, 0, 0);
}

/* Says that we are ready, which is where the machine may be saved, and gives the script that is to be run; 0: none. */
static char *ask_for_task(void)
{
	static struct task task;
	const unsigned long head = sizeof(task.time_ns) + sizeof(task.seed);
	long port = call(__NR_open, P("/dev/port"), O_RDWR, 0, 0, 0);

	/* What somebody typed while this booted is not for all that start from here. */
	call(__NR_ioctl, 1, TCFLSH, 0 /* TCIFLUSH */, 0, 0);
	call(__NR_pwrite64, port, P("R"), 1, TASK_PORT, 0);
	read_ports(port, &task.size, sizeof(task.size));
	/* Where nothing answers, all bits are set. */
	if (task.size >= head && task.size <= head + SCRIPT_MAX) {
		read_ports(port, (char *)&task + sizeof(task.size), task.size);
		become_unique(&task);
	}
	call(__NR_close, port, 0, 0, 0, 0);
	return task.script[0] ? task.script : 0;
}

/* ---- children ---- */

static const char console[] = "/dev/ttyS0";
static const char *const environment[] = {
	"PATH=/bin:/sbin:/usr/bin:/usr/sbin", "HOME=/root", "TERM=linux", "PS1=tiny:\\w\\$ ", 0,
};
static unsigned long watched; /* the signals that init waits for instead of being interrupted by them */

#define BIT(signal) (1ul << ((signal) - 1))

static void replace(int fd, const char *path, int flags)
{
	long file = call(__NR_open, P(path), O_RDWR | flags, 0, 0, 0);

	if (file < 0)
		return; /* what the kernel opened for init stays */
	call(__NR_dup2, file, fd, 0, 0, 0);
	call(__NR_close, file, 0, 0, 0, 0);
}

/* Starts a program in a session of its own, reading from `input` and writing to the serial line, `script` and `status`
 * (where not negative) as its descriptors SCRIPT_FD and STATUS_FD; gives its process ID. One that reads from the serial
 * line has it as its own terminal: job control and Ctrl-C work. */
static long start(const char *const *arguments, const char *input, long script, long status)
{
	long child = call(__NR_fork, 0, 0, 0, 0, 0);

	if (child)
		return child;
	call(__NR_rt_sigprocmask, SIG_UNBLOCK, P(&watched), 0, sizeof(watched), 0);
	call(__NR_setsid, 0, 0, 0, 0, 0);
	/*
	 * When the leader of a terminal's session ends, the terminal is hung up, and what it has not sent yet is thrown
	 * away. A command's output must not be: it gets no terminal of its own.
	 */
	int flags = input == console ? 0 : O_NOCTTY;

	replace(0, input, flags);
	replace(1, console, flags);
	call(__NR_dup2, 1, 2, 0, 0, 0);
	if (script >= 0)
		call(__NR_dup2, script, SCRIPT_FD, 0, 0, 0);
	if (status >= 0)
		call(__NR_dup2, status, STATUS_FD, 0, 0, 0);
	call(__NR_chdir, P("/root"), 0, 0, 0, 0);
	call(__NR_execve, P(arguments[0]), P(arguments), P(environment), 0, 0);
	say("pyvmm: init: cannot run ");
	say(arguments[0]);
	say("\n");
	call(__NR_exit, 127, 0, 0, 0, 0);
	return -1;
}

/* Takes one ended child; gives its process ID (0 or less: none has ended). */
static long reap(int *status)
{
	return call(__NR_wait4, -1, P(status), 1 /* WNOHANG */, 0, 0);
}

/* ---- the end ---- */

static void end_machine(unsigned int how)
{
	call(__NR_sync, 0, 0, 0, 0, 0);
	call(__NR_ioctl, 1, TCSBRK, 1, 0, 0);
	call(__NR_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, how, 0, 0);
}

/* Hands `status` to pyvmm. The write ends the machine, unless nothing listens at that port: then power off. */
static void exit_machine(unsigned char status)
{
	long port = call(__NR_open, P("/dev/port"), O_WRONLY, 0, 0, 0);

	/* What the command wrote is still on its way through the UART: TCSBRK with 1 waits for it (tcdrain). */
	call(__NR_ioctl, 1, TCSBRK, 1, 0, 0);
	call(__NR_sync, 0, 0, 0, 0, 0);
	call(__NR_pwrite64, port, P(&status), 1, DEBUG_EXIT_PORT, 0);
	end_machine(LINUX_REBOOT_CMD_POWER_OFF);
}

/* ---- the two lives of init ---- */

/* Output is to arrive as the command wrote it: no CR before LF, and no echo of what the host sends. */
static void make_raw(int fd)
{
	struct termios settings;

	if (call(__NR_ioctl, fd, TCGETS, P(&settings), 0, 0) < 0)
		return;
	settings.c_oflag &= ~OPOST;
	settings.c_lflag &= ~ECHO;
	call(__NR_ioctl, fd, TCSETS, P(&settings), 0, 0);
}

/* Ends the machine with the status that `child` ends with, or says that it is going to end with: it writes that to
 * `told`, a pipe, and sends SIGUSR1. Taking a process down takes a while where the kernel is emulated, and so nobody has
 * to wait for it. */
static void exit_with(long child, long told)
{
	const unsigned long news = BIT(SIGCHLD) | BIT(SIGUSR1);
	char text[4];
	long got, ended, i;
	int status;

	for (;;) {
		call(__NR_rt_sigtimedwait, P(&news), 0, 0, sizeof(news), 0);
		got = call(__NR_read, told, P(text), sizeof(text), 0, 0);
		if (got > 0) {
			for (status = 0, i = 0; i < got && text[i] >= '0' && text[i] <= '9'; i++)
				status = status * 10 + text[i] - '0';
			exit_machine(status);
		}
		/* As shells say it: the exit status, or 128 and the signal that ended it. */
		while ((ended = reap(&status)) > 0)
			if (ended == child)
				exit_machine(status & 0x7f ? 128 + (status & 0x7f) : status >> 8);
	}
}

static void run_command(const char *command)
{
	const char *const shell[] = { "/bin/sh", "-c", command, 0 };
	int told[2] = { -1, -1 };

	call(__NR_pipe2, P(told), O_CLOEXEC | O_NONBLOCK, 0, 0, 0);
	make_raw(1);
	exit_with(start(shell, "/dev/null", -1, told[1]), told[0]);
}

/* A shell that has started and waits for its script, when the machine is saved, need not be started afterwards. Returns
 * if the task is none. */
static void run_task(void)
{
	const char *const shell[] = { "/bin/sh", "-c", "kill -USR1 1; . /proc/self/fd/9", 0 };
	const char *script;
	int pipe[2], told[2], status;
	long child;

	if (call(__NR_pipe2, P(pipe), O_CLOEXEC, 0, 0, 0) < 0 ||
	    call(__NR_pipe2, P(told), O_CLOEXEC | O_NONBLOCK, 0, 0, 0) < 0)
		return;
	child = start(shell, "/dev/null", pipe[0], told[1]);
	call(__NR_close, pipe[0], 0, 0, 0, 0);
	/* Its signal, or its end. */
	call(__NR_rt_sigtimedwait, P(&watched), 0, 0, sizeof(watched), 0);
	sleep_nanoseconds(300000000); /* until it reads; too short a time would cost time later, nothing else */
	script = ask_for_task();
	if (script) {
		make_raw(1);
		call(__NR_write, pipe[1], P(script), length(script), 0, 0);
	}
	call(__NR_close, pipe[1], 0, 0, 0, 0);
	if (script)
		exit_with(child, told[0]);
	call(__NR_wait4, child, P(&status), 0, 0, 0);
}

static void keep_shell(void)
{
	/* A leading "-" would make it a login shell, which reads /etc/profile. */
	const char *const shell[] = { "/bin/sh", "-i", 0 };
	long child = start(shell, console, -1, -1), ended;
	int status;

	for (;;) {
		/* Wait for a signal without handlers: what busybox's poweroff, halt and reboot send, or a child's end. */
		switch (call(__NR_rt_sigtimedwait, P(&watched), 0, 0, sizeof(watched), 0)) {
		case SIGUSR1:
			end_machine(LINUX_REBOOT_CMD_HALT);
			break;
		case SIGUSR2:
			end_machine(LINUX_REBOOT_CMD_POWER_OFF);
			break;
		case SIGTERM:
			end_machine(LINUX_REBOOT_CMD_RESTART);
			break;
		case SIGCHLD:
			while ((ended = reap(&status)) > 0) {
				if (ended != child)
					continue;
				if (status) /* do not spin if it cannot even start */
					sleep_nanoseconds(1000000000);
				child = start(shell, console, -1, -1);
			}
			break;
		}
	}
}

__attribute__((used)) static void init(void)
{
	char *line, *command;

	say("pyvmm: init\n");
	watched = BIT(SIGCHLD) | BIT(SIGUSR1) | BIT(SIGUSR2) | BIT(SIGTERM);
	call(__NR_rt_sigprocmask, SIG_BLOCK, P(&watched), 0, sizeof(watched), 0);
	mount("proc", "/proc", 0);
	mount("sysfs", "/sys", 0);
	mount("devtmpfs", "/dev", 0);
	mount("tmpfs", "/tmp", "mode=1777");
	/* On a disk that cannot be written to, the shell's own folder still can. */
	if (call(__NR_access, P("/root"), W_OK, 0, 0, 0) < 0)
		mount("tmpfs", "/root", "mode=700");
	line = read_command_line();
	command = find_word(line, EXEC_ARGUMENT);
	if (command) {
		decode_base64(command);
		run_command(command);
	}
	if (find_word(line, WAIT_ARGUMENT))
		run_task();
	keep_shell();
}

/* The kernel enters here with RSP on 16 bytes, as C code expects it before a call. */
__asm__(".globl _start\n_start:\n\tcall init\n\tud2\n");
