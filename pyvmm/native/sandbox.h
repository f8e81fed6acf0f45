/* What a process gives up once it is set up: see pyvmm/host/sandbox.py. */
#ifndef PV_SANDBOX_H
#define PV_SANDBOX_H

#include <stddef.h>
#include <stdint.h>

#define PV_SYSCALL_NAME 28 /* bytes of one name, with its zero */

/*
 * From now on a system call that a seccomp filter traps ends the process by SIGSYS, after one line on stderr that names
 * it. names: count records of PV_SYSCALL_NAME bytes, by number; they must stay. 0 or -errno.
 */
int pv_sandbox_watch(const char *names, size_t count);

/*
 * Take every capability but those in keep (bit n: capability n) from all threads of the process: effective, permitted,
 * inheritable, ambient and, where the thread may, bounding. pv_sandbox_watch comes first. 0 or -errno; -ETIMEDOUT if
 * a thread has not done it within two seconds (one that blocks SIGSYS).
 */
int pv_drop_capabilities(uint64_t keep);

#endif
